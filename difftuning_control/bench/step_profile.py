"""Where a training step's time goes: rows, the denoiser's forward, backward, optimizer, and what is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from difftuning_control.families.family import Family
from difftuning_control.inputs import TrainingInputs
from difftuning_control.loop import TrainingLoop
from difftuning_control.recipe import Recipe

PHASES = ("rows", "forward", "backward", "optimizer")


class ProfiledLoop(TrainingLoop):
    """A loop that adds up the CPU seconds of its phases; the first step is left out."""

    def measure(self, steps: int) -> dict[str, float]:
        """Share of each phase in the CPU time of the steps; `rest` is what belongs to none."""
        spent = dict.fromkeys(PHASES, 0.0)
        denoiser = self.denoiser

        def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                begun = time.process_time()
                try:
                    return function(*args, **kwargs)
                finally:
                    spent[name] += time.process_time() - begun

            return call

        object.__setattr__(self.source, "rows", timed("rows", self.source.rows))
        denoiser.forward = timed("forward", denoiser.forward)
        self.accelerator.backward = timed("backward", self.accelerator.backward)
        self.optimizer.step = timed("optimizer", self.optimizer.step)
        denoiser.train()
        self._step(0)
        spent.update(dict.fromkeys(PHASES, 0.0))
        begun = time.process_time()
        for step in range(1, steps + 1):
            self._step(step)
        total = time.process_time() - begun
        shares = {name: seconds / total for name, seconds in spent.items()}
        return shares | {"rest": 1 - sum(shares.values()), "seconds_a_step": total / steps}


def profile_step(recipe: Recipe, steps: int) -> dict[str, float]:
    """The shares of a step of the recipe's training, in this process."""
    from difftuning_control.inputs import prepare_inputs, resolution_of
    from difftuning_control.trainer import build_objective, load_base, make_accelerator

    accelerator = make_accelerator(recipe)
    family: Family = load_base(recipe).to(accelerator.device)
    objective = build_objective(recipe, family.training_process(resolution_of(family, recipe.data)))
    inputs: TrainingInputs = prepare_inputs(recipe, family, objective, accelerator)
    return ProfiledLoop(recipe, family, objective, inputs, accelerator, "").measure(steps)
