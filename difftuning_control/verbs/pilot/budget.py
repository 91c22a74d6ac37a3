"""How the side of a pilot with a forgetting budget kept it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from difftuning_control.evaluation.band_losses import losses_of
from difftuning_control.evaluation.pilot_figures import PilotBudget
from difftuning_control.objective.budget import spread_budget
from difftuning_control.verbs.analyze import read_multipliers
from difftuning_control.verbs.pilot.side_tuning import BUDGET


def kept_budget(sides: list[dict[str, Any]], output: Path) -> PilotBudget | None:
    """Of the side with a forgetting budget: was it kept, and what did it cost on the target against plain."""
    by_name = {s["name"]: s for s in sides}
    if BUDGET not in by_name:
        return None
    side, length = by_name[BUDGET], by_name[BUDGET]["best_length"]
    rows = [r for r in side["runs"] if r["steps"] == length]
    rises = [losses_of(row)["bank"].rises for row in rows]
    loss, plain = (by_name[n]["summary"][str(length)]["target_loss"]["mean"] for n in (BUDGET, "plain"))
    return PilotBudget(
        side=BUDGET,
        allowed=spread_budget(side["tuning"]["forgetting_budget"]),
        rise=[sum(column) / len(column) for column in zip(*rises)],
        multipliers=read_multipliers(output / rows[0]["folder"]),
        target_cost=loss / plain - 1,
    )
