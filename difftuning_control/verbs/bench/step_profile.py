"""Where a training step's time goes: rows, the denoiser's forward, backward, optimizer, and what is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from difftuning_control.data.prepare import resolution_of
from difftuning_control.families.family import Family
from difftuning_control.families.loading import load_base
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.training.inputs import TrainingInputs, prepare_inputs
from difftuning_control.training.loop import TrainingLoop
from difftuning_control.training.reader import RowReader
from difftuning_control.training.setup import build_objective, make_accelerator

Loop = TypeVar("Loop", bound=TrainingLoop)
STAGES = ("rows", "forward", "backward", "optimizer")


class ProfiledLoop(TrainingLoop):
    """A loop that adds up the CPU seconds of the stages of its steps; the first step is left out."""

    def measure(self, steps: int) -> dict[str, float]:
        """Share of each stage in the CPU time of the steps; `rest` is what belongs to none."""
        spent = dict.fromkeys(STAGES, 0.0)
        denoiser = self.denoiser

        def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                begun = time.process_time()
                try:
                    return function(*args, **kwargs)
                finally:
                    spent[name] += time.process_time() - begun

            return call

        self.reader = RowReader(self.source, self.config.gradient_accumulation_steps, ahead=False)
        object.__setattr__(self.source, "rows", timed("rows", self.source.rows))
        denoiser.forward = timed("forward", denoiser.forward)
        self.accelerator.backward = timed("backward", self.accelerator.backward)
        self.optimizer.step = timed("optimizer", self.optimizer.step)
        denoiser.train()
        self.step(0)
        spent.update(dict.fromkeys(STAGES, 0.0))
        begun = time.process_time()
        for step in range(1, steps + 1):
            self.step(step)
        total = time.process_time() - begun
        shares = {name: seconds / total for name, seconds in spent.items()}
        return shares | {"rest": 1 - sum(shares.values()), "seconds_a_step": total / steps}


def loop_of(recipe: Recipe, kind: type[Loop]) -> Loop:
    """A training loop of the recipe with a model of its own, before its first step; nothing is written but caches."""
    accelerator = make_accelerator(recipe)
    family: Family = load_base(recipe).to(accelerator.device)
    objective = build_objective(recipe, family.training_process(resolution_of(family, recipe.data)))
    inputs: TrainingInputs = prepare_inputs(recipe, family, objective, accelerator)
    return kind(recipe, family, objective, inputs, accelerator, "")


def step_in_turn(loops: Sequence[TrainingLoop], steps: int, clock: Callable[[], float]) -> list[list[float]]:
    """Seconds of every step of each loop, which go step by step in turn, so that a noisy machine is noisy for all."""
    for loop in loops:
        loop.denoiser.train()
        loop.step(0)
    seconds: list[list[float]] = [[] for _ in loops]
    for step in range(1, steps + 1):
        for loop, found in zip(loops, seconds):
            begun = clock()
            loop.step(step)
            found.append(clock() - begun)
    return seconds
