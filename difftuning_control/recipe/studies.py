"""What `evaluate`, `analyze` and `pilot` measure and how, as dataclasses that check their ranges."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from difftuning_control.errors import UserError
from difftuning_control.recipe.requests import Moved

U0 = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SIDES = ("plain", "prior", "difftuning_tau1", "difftuning_measured")
POWER = re.compile(r"difftuning_tau(\d+(?:\.\d+)?)")


def _check(section: str, values: object, least: dict[str, int]) -> None:
    for name, lowest in least.items():
        value = getattr(values, name)
        if not lowest <= value < math.inf:
            raise UserError(f"{section}{name} is {value}; expected at least {lowest}.")


def _check_seeds(name: str, seeds: list[int], least: int) -> None:
    if len(set(seeds)) < max(len(seeds), least) or any(seed < 0 for seed in seeds):
        raise UserError(f"{name} is {seeds}; expected at least {least} different whole numbers of at least 0.")


@dataclass
class Evaluation:
    """What to evaluate and how.

    Args:
        runs: folders of finished runs of one base, or of steps that they kept (RUN/step-000010).
        data: real pictures of the new domain that no run was tuned on; those that the first run held out when empty.
        source: real pictures of the old domain; the decoded knowledge bank when empty.
        features: lite0, dinov2, clip, inception, or a local model directory.
        pictures: how many prompts, taken from the captions of the data.
        seeds: of the noise; every prompt is drawn once a seed, and the spread is over seeds.
        steps: sampling steps.
        guidance_scale: classifier-free guidance.
        domain_guidance_scale: the runs draw at this scale (1 or more) with Domain Guidance instead, the base as before.
        outside: prompts outside the new domain, where the tuned model should still draw what the base drew.
        batch_size: pictures drawn at once.
        output: folder of the results.
        moved: where the runs' inputs lie now, if they were moved.
    """

    runs: list[str]
    data: str | None = None
    source: str | None = None
    features: str = "lite0"
    pictures: int = 64
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    steps: int = 20
    guidance_scale: float = 4.0
    domain_guidance_scale: float | None = None
    outside: list[str] = field(default_factory=list)
    batch_size: int = 16
    output: str = "runs/evaluation"
    moved: Moved = field(default_factory=Moved)

    def __post_init__(self) -> None:
        if not self.runs or len(set(self.runs)) < len(self.runs):
            raise UserError(f"runs is {self.runs}; give the folders of finished runs, each once.")
        _check_seeds("seeds", self.seeds, 1)
        _check("", self, {"pictures": 5, "steps": 1, "guidance_scale": 0, "batch_size": 1})
        check_domain_scale(self.domain_guidance_scale)


@dataclass
class AnalysisConfig:
    """What an analysis measures.

    Args:
        rows: at most so many target pictures and as many bank samples.
        draws: noise levels a row and band.
        staged: also hand over between the tuned and the pretrained model at every u0 (needs a run).
        u0: where to hand over.
        pictures: pictures at every u0.
        steps: sampling steps.
        guidance_scale: classifier-free guidance.
        features: lite0, dinov2, clip, inception, or a local model directory.
        seed: of the noise.
        batch_size: pictures drawn at once.
    """

    rows: int = 64
    draws: int = 2
    staged: bool = False
    u0: list[float] = field(default_factory=lambda: list(U0))
    pictures: int = 48
    steps: int = 15
    guidance_scale: float = 4.0
    features: str = "lite0"
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        least = {"rows": 4, "draws": 1, "pictures": 5, "steps": 1, "seed": 0, "guidance_scale": 0, "batch_size": 1}
        _check("analysis.", self, least)
        if not self.u0 or not all(0 <= u <= 1 for u in self.u0):
            raise UserError(f"analysis.u0 is {self.u0}; expected numbers from 0 to 1.")


@dataclass
class PilotConfig:
    """What a pilot compares.

    Args:
        sides: plain (the yardstick), prior, difftuning_tau<number>, difftuning_measured, or difftuning_budget, which
            takes the recipe's forgetting_budget, or 0.1.
        seeds: of training and of the pictures; the spread is over these.
        learning_rates: candidates of the search; half, once and twice the recipe's when empty.
        lengths: steps at which every run is judged, read off one run each; its last step when empty.
        pictures: generated pictures a run and length.
        steps: sampling steps.
        guidance_scale: classifier-free guidance of all sides.
        guidance_scales: of each side's final weights ordinary and Domain Guidance (SD, SDXL, SD3) are tried at these
            scales of at least 1, and the best of each judged beside the figures at guidance_scale; not done when empty.
        features: lite0, dinov2, clip, inception, or a local model directory.
        batch_size: pictures drawn at once.
    """

    sides: list[str] = field(default_factory=lambda: list(SIDES))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    learning_rates: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    pictures: int = 48
    steps: int = 15
    guidance_scale: float = 4.0
    guidance_scales: list[float] = field(default_factory=list)
    features: str = "lite0"
    batch_size: int = 16

    def __post_init__(self) -> None:
        for side in self.sides:
            power = POWER.fullmatch(side)
            if side not in (*SIDES, "difftuning_budget") and (power is None or float(power[1]) == 0):
                raise UserError(
                    f"pilot.sides names {side}; expected plain, prior, difftuning_tau<number>, difftuning_measured or "
                    "difftuning_budget."
                )
        if len(set(self.sides)) < len(self.sides) or "plain" not in self.sides or len(self.sides) < 2:
            raise UserError(f"pilot.sides is {self.sides}; expected plain and at least one other, each once.")
        _check_seeds("pilot.seeds", self.seeds, 2)
        _check("pilot.", self, {"pictures": 5, "steps": 1, "guidance_scale": 0, "batch_size": 1})
        if len(set(self.lengths)) < len(self.lengths) or any(length < 1 for length in self.lengths):
            raise UserError(f"pilot.lengths is {self.lengths}; expected different numbers of steps of at least 1.")
        if not all(0 < rate < math.inf for rate in self.learning_rates):
            raise UserError(f"pilot.learning_rates is {self.learning_rates}; expected finite numbers above 0.")
        scales = self.guidance_scales
        if len(set(scales)) < len(scales) or not all(1 <= scale < math.inf for scale in scales):
            raise UserError(f"pilot.guidance_scales is {scales}; expected different finite numbers of at least 1.")


def check_domain_scale(scale: float | None) -> None:
    """Refuse a scale below 1, at which pipelines have no second branch; 1 is the tuned model alone.

    Raises:
        UserError: if it is not a finite number of at least 1.
    """
    if scale is not None and not 1 <= scale < math.inf:
        raise UserError(
            f"domain_guidance_scale is {scale}; expected a finite number of at least 1, or nothing for none."
        )
