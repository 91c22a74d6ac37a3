"""Models that were distilled to few steps: how they draw, and what they are known by before anything is loaded.

References:
    Latent Consistency Models (Luo et al., 2023), https://arxiv.org/abs/2310.04378
    Adversarial Diffusion Distillation (Sauer et al., 2023), https://arxiv.org/abs/2311.17042
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from difftuning_control.system.text import harmless

USUAL_STEPS, MOST_STEPS = 4, 16  # of a distilled model; a number in a name that is larger is none of few steps
CONSISTENCY = ("LCM", "TCD")  # in the class of schedulers that are for nothing else
NAMED = re.compile(r"(?<![a-z])(turbo|schnell|lightning|lcm|tcd|hyper(?:-?sd)?|dmd2?)(?![a-z])")
COUNTED = re.compile(r"(?<!\d)(\d+)[-_ ]?steps?(?![a-z])")


@dataclass(frozen=True)
class FewSteps:
    """How a model draws that was distilled.

    Args:
        steps: as published.
        guidance_scale: 1 where it draws without guidance, else the scale that it is told.
        known_by: what says so, as the end of a sentence.
    """

    steps: int
    guidance_scale: float
    known_by: str

    @property
    def drawn(self) -> tuple[int, float]:
        """Steps and guidance."""
        return self.steps, self.guidance_scale

    def __str__(self) -> str:
        how = "without guidance" if self.guidance_scale == 1 else f"at guidance {self.guidance_scale:g}"
        return f"{self.steps} steps {how} (by {self.known_by})"


@dataclass(frozen=True)
class Configs:
    """What a model is known by: its name, and the configurations of its parts; empty where they are not there.

    Args:
        name: a Hub id or a directory, of which the last part counts.
        index: of the pipeline.
        scheduler: with its class as `_class_name`.
        denoiser: of the UNet or transformer.
    """

    name: str
    index: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    denoiser: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scheduler_class(self) -> str:
        return str(self.scheduler.get("_class_name", ""))


def by_index(configs: Configs, steps: int) -> FewSteps | None:
    """A model whose pipeline says so."""
    return FewSteps(steps, 1.0, "is_distilled of its pipeline") if configs.index.get("is_distilled") else None


def by_scheduler(configs: Configs, steps: int) -> FewSteps | None:
    """A model whose scheduler is one of consistency models."""
    name = configs.scheduler_class
    if not any(kind in name for kind in CONSISTENCY):
        return None
    return FewSteps(steps, 1.0, f"its scheduler, {harmless(name)}")


def by_name(configs: Configs, steps: int) -> FewSteps | None:
    """A model that is called Turbo or the like, in as many steps as its name says."""
    name = re.split(r"[/\\]", configs.name.rstrip("/\\"))[-1]
    if NAMED.search(name.lower()) is None:
        return None
    said = COUNTED.search(name.lower())
    steps = int(said[1]) if said is not None and 1 <= int(said[1]) <= MOST_STEPS else steps
    return FewSteps(steps, 1.0, f"its name, {harmless(name)}")
