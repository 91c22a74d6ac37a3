"""Settings of the pictures that a study draws: how many, from which noise, in how many steps, seen by which network."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

from difftuning_control.errors import UserError

USUAL_GUIDANCE = 4.0


Settings = TypeVar("Settings", bound="SamplerSettings")


@dataclass(kw_only=True)
class SamplerSettings:
    """How a picture is drawn.

    Args:
        steps: sampling steps of a picture (when empty 20, or the few that the model was distilled to). [steps, ≥ 1]
        guidance_scale: scale of classifier-free guidance (when empty 4, or 1 of a model that was distilled). [≥ 0]
    """

    usual_steps: ClassVar[int] = 20

    steps: int | None = None
    guidance_scale: float | None = None

    def for_model(self: Settings, few: tuple[int, float] | None) -> Settings:
        """These with the steps and the scale that are left out: those of a model that was distilled, or the usual."""
        steps, scale = (self.usual_steps, USUAL_GUIDANCE) if few is None else few
        return replace(
            self,
            steps=steps if self.steps is None else self.steps,
            guidance_scale=scale if self.guidance_scale is None else self.guidance_scale,
        )

    @property
    def drawn(self) -> tuple[int, float]:
        """Steps and guidance, once they are known."""
        assert self.steps is not None
        assert self.guidance_scale is not None
        return self.steps, self.guidance_scale


@dataclass(kw_only=True)
class DrawSettings(SamplerSettings):
    """How pictures are drawn and seen.

    Args:
        features: network whose features are compared: lite0, dinov2, clip, inception, or a local model directory.
        pictures: number of prompts, taken from the captions of held-out pictures. [pictures, ≥ 5]
    """

    features: str = "lite0"
    pictures: int = 64

    def check_drawing(self, section: str) -> None:
        """Refuse settings out of range, named with their section.

        Raises:
            UserError: naming the first.
        """
        check_least(section, self, {"pictures": 5, "steps": 1, "guidance_scale": 0})


@dataclass(kw_only=True)
class SeededDrawSettings(DrawSettings):
    """How pictures are drawn and seen, where a spread over seeds is wanted.

    Args:
        seeds: seeds of the noise; every prompt is drawn once a seed, and the spread is over seeds. [≥ 0]
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])

    def check_drawing(self, section: str, least_seeds: int = 1) -> None:
        super().check_drawing(section)
        seeds = self.seeds
        if len(set(seeds)) < max(len(seeds), least_seeds) or any(seed < 0 for seed in seeds):
            raise UserError(
                f"{section}seeds is {seeds}; expected at least {least_seeds} different whole numbers of at least 0."
            )


def check_least(section: str, values: object, least: dict[str, int]) -> None:
    """Refuse values that are given, and not finite or below the least.

    Raises:
        UserError: naming the first.
    """
    for name, lowest in least.items():
        value = getattr(values, name)
        if value is None:  # as it suits the model
            continue
        if not lowest <= value < math.inf:
            raise UserError(f"{section}{name} is {value}; expected at least {lowest}.")


def check_domain_scale(scale: float | None, unconditional_strength: float | None = None) -> None:
    """Refuse a scale below 1, at which pipelines have no second branch; 1 is the tuned model alone.

    Raises:
        UserError: if it is not a finite number of at least 1, the strength is none from 0 to 1, or it is given without
            a scale.
    """
    if scale is not None and not 1 <= scale < math.inf:
        raise UserError(
            f"domain_guidance_scale is {scale}; expected a finite number of at least 1, or nothing for none."
        )
    if unconditional_strength is None:
        return
    if not 0 <= unconditional_strength <= 1:
        raise UserError(f"unconditional_strength is {unconditional_strength}; expected 0 to 1.")
    if scale is None:
        raise UserError("unconditional_strength needs a scale of Domain Guidance; give --domain_guidance_scale too.")
