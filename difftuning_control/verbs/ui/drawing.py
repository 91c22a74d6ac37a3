"""What a comparison draws: prompts, who draws them, and the settings of the sliders, checked before anything loads."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from difftuning_control.errors import UserError
from difftuning_control.recipe.inputs import MAX_SEED

BASE = "base"
MOST_PICTURES = 64  # of a grid
Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Drawing:
    """What is drawn, by whom.

    Args:
        sides: base, names of runs, or of steps that they kept (runs/mine/step-000010).
        domain: draw runs with Domain Guidance, whose scale is then `guidance`. [at least 1]
        mixture: under Domain Guidance, strength of the adapter in the unconditional branch, 1 for ordinary guidance. [0
            to 1]
        strength: of the adapter of runs. [0 to 1]
        over_noise: points (u, share) between which that strength is a straight line; none for all of it throughout.
        hand_over: u₀, at and below which the pretrained model finishes the picture; 0 for never. [0 to 1]
        photo: the picture whose condition ControlNets are shown.
        is_condition: whether it is a condition already.
        control: strength of ControlNets. [0 to 1]
        control_over_noise: as `over_noise`, of ControlNets.
        begin: the picture that is drawn over.
        change: how far it is taken back into noise. [0 to 1]
        resolution: side in pixels; the run's own, or the model's, when None.
    """

    sides: tuple[str, ...]
    prompts: tuple[str, ...]
    seed: int = 0
    steps: int = 15
    guidance: float = 4.0
    domain: bool = False
    mixture: float = 0.0
    strength: float = 1.0
    over_noise: Points = ()
    hand_over: float = 0.0
    photo: Path | None = None
    is_condition: bool = False
    control: float = 1.0
    control_over_noise: Points = ()
    begin: Path | None = None
    change: float = 0.6
    resolution: int | None = None

    def __post_init__(self) -> None:
        if not self.prompts or not self.sides:
            raise UserError("there is nothing to draw; write a prompt, and choose the base or a run.")
        if len(self.prompts) * len(self.sides) > MOST_PICTURES:
            raise UserError(
                f"{len(self.prompts)} prompts of {len(self.sides)} sides are more than {MOST_PICTURES} pictures; take "
                "fewer."
            )
        for name, value, low, high in (
            ("seed", self.seed, 0, MAX_SEED),
            ("steps", self.steps, 1, 200),
            ("guidance", self.guidance, 1 if self.domain else 0, 50),
            ("mixture", self.mixture, 0, 1),
            ("strength", self.strength, 0, 1),
            ("hand-over", self.hand_over, 0, 1),
            ("the ControlNet's strength", self.control, 0, 1),
            ("change", self.change, 0, 1),
        ):
            if not low <= value <= high:
                raise UserError(f"{name} is {value:g}; expected {low} to {high}.")

    @property
    def adapter_schedule(self) -> dict[str, Any] | None:
        """The adapter's strength over u, as `attach` takes it; None where it acts as it is."""
        return schedule_of(self.strength, self.over_noise)

    @property
    def control_schedule(self) -> dict[str, Any] | None:
        """That of ControlNets."""
        return schedule_of(self.control, self.control_over_noise)

    @property
    def has_extras(self) -> bool:
        """Whether a run draws otherwise than the stock pipeline would."""
        return self.domain or self.adapter_schedule is not None or self.hand_over > 0


def schedule_of(strength: float, points: Points) -> dict[str, Any] | None:
    """A strength times a line over u as a table; None of full strength throughout."""
    if strength == 1 and not points:
        return None
    points = points or ((0.0, 1.0), (1.0, 1.0))
    return {"kind": "table", "u": [u for u, _ in points], "strength": [strength * share for _, share in points]}


def points_of(text: str, what: str) -> Points:
    """Points from what people write, `0:0, 0.5:1, 1:1`; the first holds below it and the last above.

    Raises:
        UserError: if it is anything else.
    """
    if not text.strip():
        return ()
    try:
        pairs = [pair.split(":") for pair in text.replace(";", ",").split(",") if pair.strip()]
        points = [(float(u), float(share)) for u, share in pairs]
    except ValueError:
        points = []
    rises = all(before[0] < after[0] for before, after in pairwise(points))
    if not points or not rises or not all(0 <= value <= 1 for point in points for value in point):
        raise UserError(
            f"{what} over the noise is {text.strip()[:80]!r}; expected pairs u:strength from 0 to 1 with rising u, "
            "such as 0:0, 0.5:1, 1:1."
        )
    before = [(0.0, points[0][1])] if points[0][0] > 0 else []
    after = [(1.0, points[-1][1])] if points[-1][0] < 1 else []
    return (*before, *points, *after)
