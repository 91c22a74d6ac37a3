"""The objective of each side of a pilot: the recipe's own, with the schedule and the bank that the side stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from difftuning_control.recipe.studies import POWER
from difftuning_control.recipe.training import ScheduleConfig, TuningConfig

BUDGET, ALLOWED = "difftuning_budget", 0.1


def side_tuning(side: str, base: TuningConfig, schedule: Path) -> TuningConfig:
    """A side's objective: the recipe's with another schedule; for plain without a bank.

    Args:
        schedule: file of the measured schedule.
    """
    allowed, base = base.forgetting_budget, replace(base, forgetting_budget=None)
    if side == "plain":
        return replace(base, schedule=ScheduleConfig("constant"), retention_ratio=0.0, retention_weight=0.0)
    if side == "prior":
        return replace(base, schedule=ScheduleConfig("constant", xi=1.0))
    if side == "difftuning_measured":
        return replace(base, schedule=ScheduleConfig("measured", path=str(schedule)))
    if (match := POWER.fullmatch(side)) is not None:
        return replace(base, schedule=ScheduleConfig("power", tau=float(match[1])))
    return replace(
        base, schedule=ScheduleConfig("constant", xi=1.0), forgetting_budget=ALLOWED if allowed is None else allowed
    )
