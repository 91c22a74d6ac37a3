"""The runs of a page: a table of them, what is shown of one, verifying it, deleting it, exporting it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from difftuning_control.errors import UserError
from difftuning_control.recipe.requests import ExportRequest, VerifyRequest
from difftuning_control.runs.gate_results import GateResults
from difftuning_control.runs.kept import kept_steps
from difftuning_control.runs.listing import list_runs
from difftuning_control.runs.record import RECORD, read_run
from difftuning_control.system.durable import discard
from difftuning_control.system.text import harmless
from difftuning_control.system.untrusted import is_text
from difftuning_control.verbs.ui.files import report_address
from difftuning_control.verbs.ui.importing import import_models
from difftuning_control.verbs.ui.jobs import Jobs
from difftuning_control.verbs.ui.places import Places
from difftuning_control.verbs.ui.render import render

FIGURES = ("target_loss", "retention_loss", "fidelity", "kid", "memorisation")


def runs_of(places: Places) -> list[dict[str, Any]]:
    """A row for each run, as `difftune runs` lists it."""
    return list_runs(places.folder)


def finished_runs(places: Places) -> list[dict[str, Any]]:
    """The rows of those that ended well and whose name is text, which a list of the page can hold."""
    return [row for row in runs_of(places) if row["state"] == "done" and is_text(row["run"])]


def run_folder(places: Places, name: str) -> Path:
    """The folder of a run by its name in the table.

    Raises:
        UserError: if there is none.
    """
    real = places.run(name)
    if not (real / RECORD).is_file():
        raise UserError(f"there is no run {name}; it may have been deleted or moved. Look at the table again.")
    return real


def runs_table(rows: list[dict[str, Any]], chosen: str | None) -> str:
    used = [name for name in FIGURES if any(row[name] is not None for row in rows)]
    return render("runs", rows=rows, figures=used, chosen=chosen, shown=shown)


def shown(name: str, value: Any) -> str:
    """A figure as the table has it."""
    if value is None:
        return ""
    return f"{value:+.1%}" if name == "retention_loss" else f"{value:.4g}" if isinstance(value, float) else str(value)


def run_details(places: Places, name: str) -> str:
    """What a run is, how it was judged, and its report.

    Raises:
        UserError: if there is no such run.
    """
    folder = run_folder(places, name)
    record, report = read_run(folder), folder / "report.html"
    has_text_name = is_text(str(report))
    judged = record.gates if record is not None and record.gates is not None else GateResults()
    return render(
        "run",
        name=name,
        record=record,
        gates=[(line, judged.figures[gate].passed) for gate, line in judged.lines.items()],
        kept=kept_steps(folder),
        report=report_address(report) if report.is_file() and has_text_name else None,
        has_text_name=has_text_name,
    )


def verified(places: Places, name: str) -> str:
    """What `difftune verify` prints of a run.

    Raises:
        UserError: if it is not finished.
    """
    import_models()
    from difftuning_control.runs.verify import table, verify  # saves diffusers until something is verified

    result = verify(VerifyRequest(str(run_folder(places, name))))
    said = "as it was" if result["status"] == "same" else "not what it was"
    return render("text", title=f"{name} is {said}.", good=result["status"] == "same", text=table(result))


def what_goes(places: Places, name: str) -> str:
    """The question before a run is deleted.

    Raises:
        UserError: if there is no such run.
    """
    folder = run_folder(places, name)
    files = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    size = sum(p.stat().st_size for p in files) / 2**20
    return f"Delete {harmless(name)} with {len(files)} files ({size:.1f} MiB)? It cannot be brought back."


def delete_run(places: Places, name: str) -> None:
    """Take a run's folder away.

    Raises:
        UserError: if it runs, is the page's own folder, or has other runs in it.
    """
    folder = run_folder(places, name)
    if folder in (places.folder, *places.pictures) or any(p.is_relative_to(folder) for p in places.pictures):
        raise UserError(f"{name} is a folder of this page itself; delete it outside.")
    if any(p.parent != folder for p in folder.rglob(RECORD)):
        raise UserError(f"{name} has other runs in it; delete those first, or the folder outside of this page.")
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{name} is running; stop it first.") from None
    try:
        discard(folder)
    finally:
        lock.release()


def export_words(
    places: Places, name: str, form: str, base: str, adapter: str, to: str, despite_gates: bool
) -> tuple[list[str], Path]:
    """The command that exports a run, and the folder it writes.

    Raises:
        UserError: for options that do not go together, or a folder elsewhere.
    """
    folder = run_folder(places, name)
    free = Jobs(places).free_place(places.folder / "exports", f"{folder.name}-{form}")
    target = places.writable(to.strip() or free)
    options = {"format": form} if form != "diffusers" else {"format": form, "base": base, "adapter": adapter}
    ExportRequest(str(folder), str(target), despite_gates=despite_gates, **options)  # type: ignore[arg-type]
    words = ["export", str(folder), "--to", str(target), *(f"--{key}={value}" for key, value in options.items())]
    return [*words, *(["--despite_gates"] if despite_gates else [])], target
