"""The measurements of a model while it trains: losses by noise band, sample pictures, fidelity to conditions.

The pretrained model is measured in the same way before anything is attached to it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image

from difftuning_control.evaluation.band_losses import BandLosses, LossChange, LossChanges
from difftuning_control.evaluation.drawing import sample_pictures, save_grid
from difftuning_control.evaluation.fidelity import FidelityCurve
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.system.durable import write_json
from difftuning_control.system.terminal import activity
from difftuning_control.training.inputs import TrainingInputs
from difftuning_control.training.metrics_log import MetricsLog
from difftuning_control.training.phases import Phases
from difftuning_control.training.weights import TrainedWeights

if TYPE_CHECKING:
    from difftuning_control.families.family import Family


@dataclass(frozen=True)
class Gauge:
    """What a run measures with.

    Args:
        together: all processes draw, since of a sharded model no process can draw alone.
    """

    recipe: Recipe
    family: Family
    inputs: TrainingInputs
    accelerator: Accelerator
    phases: Phases
    together: bool = False

    def losses(self, denoiser: torch.nn.Module) -> dict[str, BandLosses]:
        """The losses on held-out rows by role and noise band."""
        with self.phases("validation"), self.accelerator.autocast():
            return {role: validator.measure(denoiser) for role, validator in self.inputs.validation.items()}

    def pictures(self, controlled: bool = True) -> list[Any]:
        """The pictures of a sample grid; `controlled` off draws them without the ControlNet."""
        if not self.accelerator.is_main_process and not self.together:
            return []
        shown = self.inputs.control.shown if self.inputs.control is not None and controlled else None
        training = self.recipe.training
        with self.phases("sampling"), self.accelerator.autocast():
            return sample_pictures(
                self.family,
                self.inputs.sample_prompts,
                seed=training.seed,
                steps=training.sample_steps,
                guidance_scale=training.sample_guidance_scale,
                resolution=self.inputs.resolution,
                control=shown,
            )


@dataclass(frozen=True)
class Baseline:
    """The pretrained model's losses by role and noise band, its sample pictures, and the seconds of both."""

    losses: dict[str, BandLosses]
    pictures: list[Any]
    seconds: dict[str, float]

    @classmethod
    def measure(cls, gauge: Gauge) -> Baseline:
        """Of the model as it is loaded, to which nothing is attached yet."""
        show = gauge.accelerator.is_main_process
        begun = time.monotonic()
        with activity("validation", show, "of the pretrained model"):
            losses = gauge.losses(gauge.family.model)
        seconds = {"validation": time.monotonic() - begun}
        if not gauge.recipe.training.sample_every:
            return cls(losses, [], seconds)
        begun = time.monotonic()
        with activity("sampling", show, "the pretrained model's pictures"):
            pictures = gauge.pictures(controlled=False)
        return cls(losses, pictures, seconds | {"sampling": time.monotonic() - begun})

    def beside(self, tuned: dict[str, BandLosses]) -> LossChanges:
        """Its losses and those of tuned weights, by role."""
        return {role: LossChange(base=base, tuned=tuned[role]) for role, base in self.losses.items()}


class Monitor:
    """Measures the weights as they would be used after a step, and logs what it finds."""

    def __init__(
        self, gauge: Gauge, baseline: Baseline, weights: TrainedWeights, log: MetricsLog, curve: FidelityCurve | None
    ):
        self.gauge, self.baseline, self.weights, self.log, self.curve = gauge, baseline, weights, log, curve
        self.inputs, self.accelerator, self.config = gauge.inputs, gauge.accelerator, gauge.recipe.training
        self.output = Path(gauge.recipe.output)
        self.seconds = dict(baseline.seconds)  # of each kind of measurement, the last one's

    @property
    def phases(self) -> Phases:
        """What the phases of the run have taken."""
        return self.gauge.phases

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.seconds[kind] = time.monotonic() - begun

    def validate(self, step: int) -> dict[str, BandLosses]:
        """The losses by role and noise band."""
        with self._timed("validation"), self.weights.averaged():
            losses = self.gauge.losses(self.weights.model)
        row: dict[str, float] = {}
        for role, bands in losses.items():
            row |= {f"validation/{role}_{u:.1f}": value for u, value in zip(bands.centres, bands.losses)}
        self.log.write(step, row)
        return losses

    def save_grid(self, step: int) -> None:
        """A grid of the pretrained model's pictures and of these weights', under `samples`."""
        with self._timed("sampling"), self.weights.averaged():
            tuned = self.gauge.pictures()
        if not self.accelerator.is_main_process:
            return
        rows = {"base": self.baseline.pictures, f"step {step}": tuned}
        if self.inputs.control is not None:
            conditions = self.inputs.control.shown.permute(0, 2, 3, 1).numpy()
            rows = {"condition": [Image.fromarray(c) for c in conditions], **rows}
        grid = self.output / "samples" / f"step-{step:06d}.png"
        save_grid(grid, rows, self.inputs.sample_prompts)
        self.log.show(step, grid)

    def measure_fidelity(self, step: int) -> None:
        """The next point of the curve, the same on every process."""
        control, family = self.inputs.control, self.gauge.family
        assert self.curve is not None
        assert control is not None
        assert control.probe is not None
        measured: list[Any] = [None, None]  # with the ControlNet, and once without
        if self.accelerator.is_main_process:
            with (
                self._timed("fidelity"),
                self.gauge.phases("sampling"),
                self.weights.averaged(),
                self.accelerator.autocast(),
            ):
                measured[0] = control.probe.measure(family)
                measured[1] = control.probe.measure(family, controlled=False) if not self.curve.without else None
        with_control, without = broadcast_object_list(measured)
        if without is not None:
            self.curve.without = without
        self.curve.add(step, with_control)
        self.log.write(step, {f"fidelity/{name}": value for name, value in with_control.items()})
        if self.accelerator.is_main_process:
            write_json(self.output / "fidelity.json", self.curve.describe().to_dict())

    def planned_end(self, done: int) -> int:
        """The step at which the run will end, as far as can be said after `done` steps."""
        stop = None
        if self.config.stop_when is not None:
            assert self.curve is not None
            stop = self.curve.stop_at(self.config.stop_after)
        return self.config.max_steps if stop is None else min(self.config.max_steps, max(stop, done))
