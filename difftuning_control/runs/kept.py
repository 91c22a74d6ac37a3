"""Weights that `training.save_at` kept: `RUN/step-000010` stands for the run as it was after ten steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

from difftuning_control.errors import UserError
from difftuning_control.evaluation.band_losses import LossChanges, read_losses
from difftuning_control.runs.record import RECORD, RunRecord
from difftuning_control.system.digests import digest_of

STEP = re.compile(r"step-(\d{6,})")
LOSSES = "losses.json"


def step_folder(step: int) -> str:
    """The name of the folder in which a run keeps the weights of a step."""
    return f"step-{step:06d}"


def place_of_run(place: str | Path) -> tuple[Path, int | None]:
    """The folder of a run, and the step that is meant where a folder of kept weights was named."""
    path = Path(place)
    match = STEP.fullmatch(path.name)
    if match is not None and not (path / RECORD).exists() and (path.parent / RECORD).is_file():
        return path.parent, int(match[1])
    return path, None


def kept_steps(run: str | Path) -> list[int]:
    """The steps of which a run kept its weights, in order."""
    matches = (STEP.fullmatch(p.name) for p in Path(run).glob("step-*") if (p / LOSSES).is_file())
    return sorted(int(match[1]) for match in matches if match is not None)


def read_kept_losses(folder: Path) -> LossChanges:
    """The losses beside kept weights.

    Raises:
        ValueError, TypeError or AttributeError: if the file holds something else.
    """
    found: LossChanges = read_losses(json.loads((folder / LOSSES).read_text(encoding="utf-8")))
    return found


def record_at(record: RunRecord, run: Path, step: int) -> RunRecord:
    """The record of a run as if it had ended after a step that it kept; the run itself need not be finished.

    Names of outputs are those in the folder of the step.

    Raises:
        UserError: if these weights were not kept.
    """
    folder = run / step_folder(step)
    if not (folder / LOSSES).is_file():
        raise UserError(f"the run {run} kept no weights after {step} steps; name a step of its training.save_at.")
    try:
        losses = read_kept_losses(folder)
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{folder / LOSSES} cannot be read; name another step of the run.") from None
    prefix = f"{step_folder(step)}/"
    files = {n.removeprefix(prefix): h for n, h in (record.files or {}).items() if n.startswith(prefix)}
    outputs = {n: h for n, h in files.items() if n != LOSSES}
    curve = None if record.fidelity is None else record.fidelity.until(step)
    return record.after(step, digest_of([record.identity, step]), losses, outputs, curve)
