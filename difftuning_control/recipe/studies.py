"""Requests of `evaluate`, `analyze` and `pilot`: what is measured and how, as dataclasses that check their ranges."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

from difftuning_control.errors import UserError
from difftuning_control.recipe.drawing import DrawSettings, SeededDrawSettings, check_domain_scale, check_least
from difftuning_control.recipe.requests import Moved
from difftuning_control.system.home import expand_paths

U0 = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
DEFAULT_SIDES = ("plain", "prior", "difftuning_tau1", "difftuning_measured")
TEACHERS = ("teacher_bank", "teacher_empty", "teacher_own")
LEAST_OUTSIDE = 5  # prompts that a KID is measured on
NUMBER = r"(\d+(?:\.\d+)?)"
SCHEDULED = re.compile(rf"(prior|(difftuning|retention)_tau{NUMBER})(_general)?(?:_lambda{NUMBER})?")


class ScheduledSide(NamedTuple):
    """A side of a pilot whose name says its schedule.

    Args:
        plain: its name up to the schedule.
        kind: difftuning, retention, or None of prior preservation.
        tau: τ as it is written; None of prior preservation.
        general: given where it has a bank of its own, of general prompts, and retains it under these.
        weight: λ as it is written; None where none is.
    """

    plain: str
    kind: str | None
    tau: str | None
    general: str | None
    weight: str | None


def scheduled_side(name: str) -> ScheduledSide | None:
    """What a side's name says; None of one that says no schedule."""
    match = SCHEDULED.fullmatch(name)
    return None if match is None else ScheduledSide(*match.groups())


def retains_general(name: str) -> bool:
    """Whether a side has a bank of its own, of general prompts, and retains it under these."""
    side = scheduled_side(name)
    return side is not None and side.general is not None


@dataclass
class Evaluation(SeededDrawSettings):
    """What to evaluate and how.

    Args:
        runs: folders of finished runs of one base, or of steps that they kept (RUN/step-000010).
        data: real pictures of the new domain that no run was tuned on; those that the first run held out when empty.
        source: real pictures of the old domain; the decoded knowledge bank when empty.
        domain_guidance_scale: the runs draw at this scale (1 or more) with Domain Guidance instead, the base as before.
        unconditional_strength: in [0, 1], with domain_guidance_scale; of the adapter in the unconditional branch, 0 for
            the pretrained model and 1 for ordinary guidance.
        outside: prompts outside the new domain, where the tuned model should still draw what the base drew.
        batch_size: pictures drawn at once.
        output: folder of the results.
        moved: where the runs' inputs lie now, if they were moved.
    """

    runs: list[str]
    data: str | None = None
    source: str | None = None
    domain_guidance_scale: float | None = None
    unconditional_strength: float | None = None
    outside: list[str] = field(default_factory=list)
    batch_size: int = 16
    output: str = "runs/evaluation"
    moved: Moved = field(default_factory=Moved)

    def __post_init__(self) -> None:
        expand_paths(self, "runs", "data", "source", "features", "output")
        if not self.runs or len(set(self.runs)) < len(self.runs):
            raise UserError(f"runs is {self.runs}; give the folders of finished runs, each once.")
        self.check_drawing("")
        check_least("", self, {"batch_size": 1})
        check_domain_scale(self.domain_guidance_scale, self.unconditional_strength)


@dataclass
class AnalysisConfig(DrawSettings):
    """What an analysis measures.

    Args:
        rows: at most so many target pictures, and as many bank samples, are measured. [rows, ≥ 4]
        draws: noise levels a row and band. [levels, ≥ 1]
        staged: also hand over between the tuned and the pretrained model at every u0 (needs a run).
        u0: noise coordinates at which to hand over. [u, 0 to 1]
        pictures: pictures that are drawn at every u0. [pictures, ≥ 5]
        steps: sampling steps of a picture (when empty 15, or the few that the model was distilled to). [steps, ≥ 1]
        seed: seed of the noise. [≥ 0]
        batch_size: pictures drawn at once. [pictures, ≥ 1]
    """

    usual_steps: ClassVar[int] = 15

    rows: int = 64
    draws: int = 2
    staged: bool = False
    u0: list[float] = field(default_factory=lambda: list(U0))
    pictures: int = field(default=48, kw_only=True)
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        expand_paths(self, "features")
        self.check_drawing("analysis.")
        check_least("analysis.", self, {"rows": 4, "draws": 1, "seed": 0, "batch_size": 1})
        if not self.u0 or not all(0 <= u <= 1 for u in self.u0):
            raise UserError(f"analysis.u0 is {self.u0}; expected numbers from 0 to 1.")


@dataclass
class PilotConfig(SeededDrawSettings):
    """What a pilot compares.

    Args:
        sides: what is compared: plain (the yardstick), prior (ψ = ξ = 1), `difftuning_tau<number>`,
            `retention_tau<number>` (ψ = 1, ξ = 1 − u^τ), these three also with a bank of their own, of general prompts,
            retained under these (prior_general), and with a λ of their own (prior_lambda0.3,
            prior_general_lambda0.3), difftuning_measured, difftuning_budget, which takes the recipe's
            forgetting_budget, or 0.1, or with the recipe's own schedule retention by a teacher: on the bank
            (teacher_bank), or on the pictures with the empty prompt (teacher_empty) or their own (teacher_own).
        seeds: seeds of training and of the pictures, at least two; the spread is over these. [≥ 0]
        learning_rates: candidates of the search; half, once and twice the recipe's when empty. [> 0]
        widen: while a side's best learning rate is the lowest or the highest tried, try one more beyond it, at most so
            many times. [≥ 0]
        lengths: steps at which every run is judged, read off one run each; its last step when empty. A side's best one
            is chosen on the prompts of the search. [steps, ≥ 1]
        pictures: generated pictures a run and length. [pictures, ≥ 5]
        steps: sampling steps of a picture (when empty 15, or the few that the model was distilled to). [steps, ≥ 1]
        guidance_scale: scale of classifier-free guidance of all sides (when empty 4, or 1 of a model that was
            distilled). [≥ 0]
        guidance_scales: of each side's weights at its best length ordinary and Domain Guidance are tried at these
            scales, and the best of each is judged beside the figures at guidance_scale; not done when empty. [≥ 1]
        unconditional_strength: with guidance_scales a mixture of the two ways is tried as well, with so much of the
            adapter in the unconditional branch; not done when empty. [> 0 and < 1]
        outside: at least five prompts outside the new domain for which every side, at its best, is drawn too: does it
            still draw what the pretrained model drew? Or general, for 32 that come with the package; none when empty.
        batch_size: pictures drawn at once. [pictures, ≥ 1]
    """

    usual_steps: ClassVar[int] = 15

    sides: list[str] = field(default_factory=lambda: list(DEFAULT_SIDES))
    learning_rates: list[float] = field(default_factory=list)
    widen: int = 0
    lengths: list[int] = field(default_factory=list)
    pictures: int = field(default=48, kw_only=True)
    guidance_scales: list[float] = field(default_factory=list)
    unconditional_strength: float | None = None
    outside: list[str] | Literal["general"] = field(default_factory=list)
    batch_size: int = 16

    def __post_init__(self) -> None:
        expand_paths(self, "features")
        for side in self.sides:
            scheduled = scheduled_side(side)
            named = side in (*DEFAULT_SIDES, "difftuning_budget", *TEACHERS)
            if not named and (scheduled is None or 0 in map(float, filter(None, (scheduled.tau, scheduled.weight)))):
                raise UserError(
                    f"pilot.sides names {side}; expected plain, prior, difftuning_tau<number>, retention_tau<number> "
                    "(these three also with _general after it, _lambda<number>, or both), difftuning_measured, "
                    f"difftuning_budget, {', '.join(TEACHERS[:-1])} or {TEACHERS[-1]}."
                )
        if len(set(self.sides)) < len(self.sides) or "plain" not in self.sides or len(self.sides) < 2:
            raise UserError(f"pilot.sides is {self.sides}; expected plain and at least one other, each once.")
        self.check_drawing("pilot.", least_seeds=2)
        check_least("pilot.", self, {"batch_size": 1, "widen": 0})
        if len(set(self.lengths)) < len(self.lengths) or any(length < 1 for length in self.lengths):
            raise UserError(f"pilot.lengths is {self.lengths}; expected different numbers of steps of at least 1.")
        if not all(0 < rate < math.inf for rate in self.learning_rates):
            raise UserError(f"pilot.learning_rates is {self.learning_rates}; expected finite numbers above 0.")
        scales = self.guidance_scales
        if len(set(scales)) < len(scales) or not all(1 <= scale < math.inf for scale in scales):
            raise UserError(f"pilot.guidance_scales is {scales}; expected different finite numbers of at least 1.")
        strength = self.unconditional_strength
        if strength is not None and not (0 < strength < 1 and scales):
            raise UserError(
                f"pilot.unconditional_strength is {strength} and pilot.guidance_scales is {scales}; expected a number "
                "between 0 and 1 (the ends are tried anyway), and scales to try it at."
            )
        prompts = [] if self.outside == "general" else self.outside
        if 0 < len(prompts) < LEAST_OUTSIDE or len(set(prompts)) < len(prompts):
            raise UserError(
                f"pilot.outside is {prompts}; expected general, at least {LEAST_OUTSIDE} prompts, each once, or none."
            )
