"""Tables of a report: losses by noise band, for the target and for the bank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from difftuning_control.evaluation.band_losses import LossChanges


def loss_tables(sides: Mapping[str, Sequence[LossChanges]]) -> list[dict[str, Any]]:
    """For target and bank: the bands, the pretrained model's loss, and each side's mean loss.

    Args:
        sides: the losses of the runs of each side, by its name.
    """
    tables = []
    for role in ("target", "bank"):
        columns: dict[str, list[float]] = {}
        u: list[float] = []
        for name, each in sides.items():
            runs = [losses[role] for losses in each if role in losses]
            if runs:
                u = runs[0].base.centres
                columns.setdefault("base", runs[0].base.losses)
                columns[name] = [sum(v) / len(v) for v in zip(*(run.tuned.losses for run in runs))]
        if columns:
            tables.append({"role": role, "u": u, "columns": columns})
    return tables
