"""`difftune runs`: every run below a folder with its state, settings, figures and gates."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftuning_control.errors import UserError
from difftuning_control.runs.gates import retention_loss
from difftuning_control.runs.history import read_history
from difftuning_control.runs.record import COMPLETE, FAILED, RECORD, RUNNING, RunRecord, record_from
from difftuning_control.system.durable import is_held
from difftuning_control.system.text import harmless

if TYPE_CHECKING:
    from rich.table import Table

STATES = {COMPLETE: "done", FAILED: "failed", RUNNING: "interrupted"}
COLUMNS = (
    "run",
    "state",
    "model",
    "method",
    "steps",
    "target_loss",
    "retention_loss",
    "fidelity",
    "kid",
    "memorisation",
    "gates",
)
FORMULA = (
    "=",
    "+",
    "-",
    "@",
    "＝",
    "＋",
    "－",
    "＠",
    "\t",
    "\r",
    "\n",
)  # with these a spreadsheet takes a cell for a formula


def list_runs(folder: str | Path) -> list[dict[str, Any]]:
    """A row for each run, by its place; figures that were not measured are None, and losses are of held-out pictures.

    Raises:
        UserError: if there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root} is no folder; give one with runs in it.")
    return [_row(place, root) for place in _places(root)]


def _places(root: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if RECORD in names:
            yield Path(place)


def _row(place: Path, root: Path) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row["run"] = place.name if place == root else place.relative_to(root).as_posix()
    try:
        record = record_from(json.loads((place / RECORD).read_text(encoding="utf-8")))
        return row | _described(record, place)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return row | {"state": "unreadable"}


def _described(record: RunRecord, place: Path) -> dict[str, Any]:
    judged, curve = record.gates, record.fidelity
    state = STATES[record.status]
    if state == "interrupted" and _is_locked(place):
        state = "running"
    figures = {name: gate.value for name, gate in judged.figures.items()} if judged is not None else {}
    target = record.losses.get("target")
    adapter = record.adapter_kind if record.method == "lora" else None
    fidelity = curve.values[-1] if curve is not None and curve.values else None
    return {
        "state": state,
        "model": record.model_id,
        "method": adapter or record.method,
        "steps": record.steps or _last_step(place),
        "target_loss": _mean(target.tuned.losses) if target is not None else None,
        "retention_loss": figures.get("retention_loss", retention_loss(record.losses)),
        "fidelity": figures.get("fidelity", fidelity),
        "kid": figures.get("kid"),
        "memorisation": figures.get("memorisation"),
        "gates": None if judged is None else "passed" if judged.passed else "failed",
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _last_step(place: Path) -> int:
    """The last step that a run logged whole; 0 if there is none."""
    try:
        return max((row["step"] for row in read_history(place)), default=0)
    except (OSError, ValueError, KeyError):
        return 0


def _is_locked(place: Path) -> bool:
    """Whether a process holds the folder, which a run does as long as it lives."""
    from filelock import FileLock, Timeout  # saves it where no folder has a lock

    lock = place / ".lock"
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a colleague's, which only its owner may write
        return is_held(lock)


# --- what is printed ------------------------------------------------------------------------------------------------


def as_json(rows: list[dict[str, Any]]) -> str:
    return json.dumps(rows, indent=2)  # in ASCII: names can hold what a terminal obeys


def as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_cell(row[name]) for name in COLUMNS] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    """A value as it may stand in a spreadsheet."""
    if not isinstance(value, str):
        return value
    return "'" + harmless(value) if value.startswith(FORMULA) else harmless(value)


def print_table(rows: list[dict[str, Any]]) -> None:
    """The runs as a table as wide as the terminal; in a file or a pipe as wide as it needs to be."""
    from rich.console import Console  # saves rich for --json and --csv

    wide = None if sys.stdout.isatty() else 10_000
    Console(width=wide, highlight=False).print(as_table(rows))


def as_table(rows: list[dict[str, Any]]) -> Table:
    from rich.box import SIMPLE_HEAD  # these too
    from rich.table import Table
    from rich.text import Text

    colours = {"done": "green", "passed": "green", "running": "cyan", "failed": "red", "unreadable": "red"}
    used = [name for name in COLUMNS if name in COLUMNS[:5] or any(row[name] is not None for row in rows)]
    table = Table(box=SIMPLE_HEAD)
    for name in used:
        table.add_column(name, justify="left" if name in (*COLUMNS[:4], "gates") else "right", overflow="fold")
    for row in rows:
        cells = [_shown(name, row[name]) for name in used]
        table.add_row(*(Text(cell, colours.get(cell, "")) for cell in cells))  # a Text's markup is no markup
    return table


def _shown(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name == "retention_loss":
        return f"{value:+.1%}"
    return f"{value:.4g}" if isinstance(value, float) else harmless(str(value))
