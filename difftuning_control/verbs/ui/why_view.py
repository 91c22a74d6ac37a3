"""Why a run came out as it did: what it learnt and forgot by noise level, its schedule, its budget, and the reports."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from difftuning_control.errors import UserError
from difftuning_control.evaluation.band_losses import LossChange
from difftuning_control.evaluation.report.lines import Line, line_chart
from difftuning_control.runs.record import RECORD, RunRecord, read_run
from difftuning_control.system.untrusted import is_text
from difftuning_control.verbs.ui.files import report_address
from difftuning_control.verbs.ui.places import Places
from difftuning_control.verbs.ui.render import render
from difftuning_control.verbs.ui.runs_view import run_folder
from difftuning_control.verbs.ui.why_texts import TEXTS

POINTS = 33  # of a schedule's lines
WIDE, HIGH = 460, 240
ROLES = {"target": "learnt", "bank": "forgot"}
REPORT = "report.html"


def why(places: Places, run: str | None, language: str) -> str:
    """The page of a run, in `en` or `ja`.

    Raises:
        UserError: if there is no such run.
    """
    texts = TEXTS[language]
    if run is None:
        return render("why", t=texts, language=language, run=None)
    record = read_run(run_folder(places, run))
    if record is None:
        raise UserError(f"the record of {run} cannot be read; look at it with difftune verify {run}.")
    return render(
        "why",
        t=texts,
        language=language,
        run=run,
        chain=[_chain(record.losses[role], role, texts) for role in ROLES if role in record.losses],
        schedule=_schedule(record, texts),
        budget=[] if record.budget is None else [*zip(*(getattr(record.budget, n) for n in BUDGET))],
    )


BUDGET = ("u", "allowed", "rise", "kept")


def _chain(losses: LossChange, role: str, texts: Mapping[str, str]) -> dict[str, str]:
    """The chart of a role, and what changed in all of it."""
    base, tuned = losses.base, losses.tuned
    lines = [
        Line("base", base.centres, base.losses, "base", dashed=True, marked=True),
        Line("tuned", tuned.centres, tuned.losses, role, marked=True),
    ]
    before, after = sum(base.losses), sum(tuned.losses)
    change = f"{after / before - 1:+.1%}".replace("-", "−") if before else "?"
    chart = line_chart(texts[role], lines, texts["u"], None, WIDE, HIGH)
    return {"title": texts[role], "chart": chart, "said": texts[ROLES[role]].format(change=change)}


def _schedule(record: RunRecord, texts: Mapping[str, str]) -> str:
    """ψ and ξ over u; nothing of a schedule that is code, or that is measured and no longer there."""
    u = [i / (POINTS - 1) for i in range(POINTS)]
    if record.schedule is not None:
        u, psi, xi = record.schedule.u, record.schedule.psi, record.schedule.xi
    elif (config := record.recipe.tuning.schedule).kind in ("power", "paper", "constant"):
        import torch  # saves it where nothing is computed

        schedule, at = config.build(1000), torch.tensor(u, dtype=torch.float64)
        psi, xi = schedule.psi(at).tolist(), schedule.xi(at).tolist()
    else:
        return ""
    lines = [Line("ψ", u, psi, "target"), Line("ξ", u, xi, "bank")]
    return line_chart(texts["schedule"], lines, texts["u"], None, WIDE, HIGH)


def reports_of(places: Places) -> list[str]:
    """The reports of analyses and pilots below the page's folder, which are those that no run has, by names of text."""
    return sorted(filter(is_text, (places.name(folder) for folder in _studies(places.folder))))


def _studies(root: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".")]
        if REPORT in names and RECORD not in names:
            yield Path(place)


def report_frame(places: Places, name: str | None, language: str) -> str:
    """One of these reports in a frame.

    Raises:
        UserError: if it lies elsewhere.
    """
    path = places.readable(f"{name}/{REPORT}") if name else None
    there = path is not None and path.is_file()
    return render("report", address=report_address(path) if there and path else None, name=name, t=TEXTS[language])
