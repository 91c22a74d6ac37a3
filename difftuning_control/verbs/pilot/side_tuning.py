"""The objective and the bank of each side of a pilot: the recipe's own, with what the side stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from difftuning_control.evaluation.pilot_figures import is_at_an_end
from difftuning_control.recipe.inputs import BankConfig
from difftuning_control.recipe.studies import retains_general, scheduled_side
from difftuning_control.recipe.training import ScheduleConfig, TuningConfig

MEASURED = "difftuning_measured"
BUDGET, ALLOWED = "difftuning_budget", 0.1
TAUGHT: dict[str, dict[str, Any]] = {
    "teacher_bank": {"retention_rows": "bank"},
    "teacher_empty": {"retention_rows": "pictures", "retention_prompts": "empty"},
    "teacher_own": {"retention_rows": "pictures", "retention_prompts": "own"},
}


def side_tuning(side: str, base: TuningConfig, schedule: Path) -> TuningConfig:
    """A side's objective: the recipe's with another schedule, or with a teacher; for plain without retention.

    Args:
        schedule: file of the measured schedule.

    Raises:
        UserError: if the recipe's settings do not go with a teacher.
    """
    measured = ScheduleConfig("measured", path=str(schedule))
    if side in TAUGHT:
        own = measured if base.schedule.kind == "auto" else base.schedule
        return replace(base, schedule=own, retention="teacher", **TAUGHT[side])
    allowed = base.forgetting_budget
    base = replace(base, forgetting_budget=None, retention="samples", retention_rows="bank")
    if retains_general(side):
        base = replace(base, retention_prompts="own")
    if side == "plain":
        return replace(base, schedule=ScheduleConfig("constant"), retention_ratio=0.0, retention_weight=0.0)
    if side == MEASURED:
        return replace(base, schedule=measured)
    if (named := scheduled_side(side)) is not None:
        own = ScheduleConfig("constant", xi=1.0)
        if named.tau is not None:
            own = ScheduleConfig("power", tau=float(named.tau), psi=1.0 if named.kind == "retention" else None)
        weight = base.retention_weight if named.weight is None else float(named.weight)
        return replace(base, schedule=own, retention_weight=weight)
    return replace(
        base, schedule=ScheduleConfig("constant", xi=1.0), forgetting_budget=ALLOWED if allowed is None else allowed
    )


def side_bank(side: str, base: BankConfig, output: Path) -> BankConfig:
    """A side's bank: the pilot's, or of a side that retains general prompts one of its own."""
    return replace(base, prompts="general", path=str(output / "bank-general")) if retains_general(side) else base


def beyond(best: float, rates: list[float]) -> list[float]:
    """The next learning rate past the end at which the best one lies, as far as the last two are apart; none within."""
    if not is_at_an_end(best, rates):
        return []
    ordered = sorted(rates)
    neighbour = ordered[1] if best == ordered[0] else ordered[-2]
    return [float(f"{best * best / neighbour:.3g}")]
