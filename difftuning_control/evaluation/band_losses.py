"""Losses by noise band as they are kept: of one model, and of a run before and after, by the role of the rows.

A run's record, the `losses.json` beside kept weights and a pilot's rows hold them in this form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from difftuning_control.system.sections import Section, dict_of


@dataclass(kw_only=True)
class BandLosses(Section):
    """Mean ℓ over the rows in each of the equally wide bands of u, from nearly clean to pure noise.

    Args:
        centres: of the bands, in u.
        losses: one a band.
    """

    KEYS: ClassVar = {"centres": "u", "losses": "loss"}

    centres: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return sum(self.losses) / len(self.losses)


@dataclass(kw_only=True)
class LossChange(Section):
    """The losses of the same rows under the pretrained model and under tuned weights.

    Args:
        base: of the pretrained model.
        tuned: of the tuned weights.
    """

    READERS: ClassVar = {"base": BandLosses.from_dict, "tuned": BandLosses.from_dict}

    base: BandLosses = field(default_factory=BandLosses)
    tuned: BandLosses = field(default_factory=BandLosses)

    @property
    def rises(self) -> list[float]:
        """tuned / base − 1 of each band."""
        return [after / before - 1 for before, after in zip(self.base.losses, self.tuned.losses)]


LossChanges: TypeAlias = dict[str, LossChange]  # by role: target, bank

read_losses = dict_of(LossChange)  # of what a JSON file holds


def losses_of(row: Mapping[str, Any]) -> LossChanges:
    """The losses in a row of a pilot's figures; none where the row has none."""
    found: LossChanges = read_losses(row.get("losses") or {})
    return found


def losses_at_best(side: Mapping[str, Any]) -> list[LossChanges]:
    """The losses of each run of a pilot's side, at the length at which the side is best."""
    return [losses_of(row) for row in side["runs"] if row["steps"] == side["best_length"]]


def plain_losses(losses: LossChanges) -> dict[str, Any]:
    """What a JSON file holds of them."""
    return {role: change.to_dict() for role, change in losses.items()}
