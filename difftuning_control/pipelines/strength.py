"""How strongly something acts at each noise level while a pipeline samples: a map from u in [0, 1] to [0, 1].

It scales what the user has set (an adapter's weight, a ControlNet's conditioning scale), and never exceeds it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from difftuning_control.errors import UserError
from difftuning_control.objective.schedules import KINDS, Schedule, schedule_from_dict
from difftuning_control.recipe.training import ScheduleConfig

EXPECTED = (
    "a power {'kind': 'power', 'tau': 1.0}, a table {'kind': 'table', 'u': [0, 1], 'strength': [0, 1]}, the folder of "
    "a run or its schedule.json, or a function of u"
)


@dataclass(frozen=True)
class Strength:
    """A strength over u; called with u in [0, 1], gives a float in [0, 1].

    Args:
        function: from u to the strength.
        values: what describes it in JSON; None for a function of the user's, which cannot be saved.
    """

    function: Callable[[float], float]
    values: dict[str, Any] | None = None

    def __call__(self, u: float) -> float:
        """The strength at u.

        Raises:
            UserError: if the function gives something else than a number in [0, 1].
        """
        strength = self.function(u)
        if not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
            raise UserError(f"the schedule gives {strength!r} at u = {u:.3f}; expected a number from 0 to 1.")
        return float(strength)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled by its values where it has some, and made from them anew."""
        return (Strength, (self.function,)) if self.values is None else (as_strength, (self.values,))


def as_strength(given: Any) -> Strength:
    """A strength from what users write.

    Args:
        given: a `Strength`; a schedule or its dictionary, whose ψ(u)/ψ(1) is taken; a table
            `{"kind": "table", "u": …, "strength": …}`, linear between its points, which must reach from 0 to 1; the
            folder of a run or a schedule.json, whose ψ is taken; or a function of u.

    Raises:
        UserError: if it is none of these, or a table does not cover [0, 1] or leaves it.
    """
    if isinstance(given, Strength):
        return given
    if isinstance(given, (str, Path)):
        return _of_schedule(psi_of_run(given))
    if isinstance(given, dict):
        kind = given.get("kind")
        if kind == "table":
            return _of_table(given)
        if not isinstance(kind, str) or kind not in KINDS:
            known = ", ".join([*KINDS, "table"])
            raise UserError(f"the schedule's kind is {kind!r}; expected one of {known}.")
        try:
            return _of_schedule(schedule_from_dict(given))
        except ValueError as error:
            raise UserError(f"the schedule cannot be used: {error}") from None
    if isinstance(given, Schedule):
        return _of_schedule(given)
    if callable(given):
        return Strength(given)
    raise UserError(f"the schedule is {given!r}; expected {EXPECTED}.")


def psi_of_run(run: str | Path) -> Schedule:
    """The ψ that a finished run was trained with, or that of a measured `schedule.json`.

    Raises:
        UserError: if there is no run, or it is not finished.
    """
    from difftuning_control.runs.finished import finished_run  # saves data and runs for what is drawn without a run

    if Path(run).is_file():
        return ScheduleConfig("measured", path=str(run)).build(1000)
    record = finished_run(run)
    if record.schedule is not None:
        return record.schedule.build()
    return record.recipe.tuning.schedule.build(1000)


def _of_schedule(schedule: Schedule) -> Strength:
    def psi(u: float) -> float:
        return float(schedule.psi(torch.tensor(u, dtype=torch.float64)))

    largest = psi(1.0)  # ψ never falls
    return Strength(lambda u: min(psi(u) / largest, 1.0), schedule.to_dict())


def _of_table(given: dict[str, Any]) -> Strength:
    """Linear between the table's points."""
    if set(given) != {"kind", "u", "strength"}:
        raise UserError(f"a table has the keys {', '.join(map(str, given))}; expected kind, u and strength.")
    for name in ("u", "strength"):
        values = given[name]
        numbers = isinstance(values, (list, tuple)) and all(isinstance(v, (int, float)) for v in values)
        if not numbers or not all(0 <= v <= 1 for v in values):
            raise UserError(f"the table's {name} is {values!r}; expected a list of numbers from 0 to 1.")
    u, strength = (torch.tensor(given[name], dtype=torch.float64) for name in ("u", "strength"))
    if len(u) != len(strength) or len(u) < 2 or not bool((u[1:] > u[:-1]).all()):
        raise UserError(f"the table's u {given['u']} must rise and be as long as its strength, {len(strength)} values.")
    if u[0] != 0 or u[-1] != 1:
        raise UserError(
            f"the table covers u from {u[0]:g} to {u[-1]:g}; expected 0 to 1, so that every step has a value."
        )

    def interpolate(at: float) -> float:
        right = int(torch.searchsorted(u, torch.tensor(at, dtype=torch.float64)).clamp(1, len(u) - 1))
        share = (at - u[right - 1]) / (u[right] - u[right - 1])
        return float(torch.lerp(strength[right - 1], strength[right], share).clamp(0, 1))

    values = {"kind": "table", "u": u.tolist(), "strength": strength.tolist()}
    return Strength(interpolate, values)


def stored(strength: Strength | None) -> dict[str, Any] | None:
    """What a configuration keeps of a strength; nothing of a function."""
    if strength is None or strength.values is None:
        return None
    return json.loads(json.dumps(strength.values))


def check_u(value: float, name: str) -> float:
    """The value, if it is a noise level in [0, 1].

    Raises:
        UserError: otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1 or math.isnan(value):
        raise UserError(f"{name} is {value}; expected 0 to 1.")
    return float(value)
