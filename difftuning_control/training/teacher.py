"""The teacher of retention: the pretrained model, whose own prediction is the target of retention rows.

    ξ(u) · |ε_θ(x_t, c) − ε_pretrained(x_t, c)|²       instead of       ξ(u) · |ε_θ(x_t, c) − ε|²

For samples of the pretrained model both have the same expected gradient where its prediction is the mean of what it is
trained to predict; the teacher's has less variance, and costs a forward without gradient of the retention rows.

    what trains             who is asked
    an adapter              the same denoiser, the adapter off
    all weights             a copy of the denoiser as it was loaded
    a ControlNet            the denoiser beside the ControlNet that training started from; a new one adds nothing yet

References:
    Learning without Forgetting (Li and Hoiem, 2016), https://arxiv.org/abs/1606.09282
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from difftuning_control.adapters.kinds import ADAPTER
from difftuning_control.families.control import ControlledDenoiser
from difftuning_control.pipelines.guidance import adapters_at, tuner_layers

if TYPE_CHECKING:
    from difftuning_control.families.family import Family
    from difftuning_control.objective.batch import LatentBatch
    from difftuning_control.objective.difftuning import NoisedBatch
    from difftuning_control.recipe.recipe import Recipe


@dataclass(frozen=True)
class Teacher:
    """Predicts as the pretrained model does.

    Args:
        source: the model that is asked; the family's own with its adapters off when None.
        takes_control: whether `source` is told the condition of a ControlNet.
    """

    family: Family
    source: nn.Module | None = None
    takes_control: bool = False

    @classmethod
    def of(cls, recipe: Recipe, family: Family) -> Teacher:
        """The teacher of a run, from the model to which nothing is attached yet."""
        if recipe.method == "lora":
            return cls(family)
        if recipe.method == "full":
            return cls(family, _frozen(family.denoiser))
        if recipe.control.init is None:
            return cls(family, family.denoiser)
        started = _frozen(family.controlnet)
        return cls(family, ControlledDenoiser(family.denoiser, started, family.residuals), takes_control=True)

    def retarget(self, noised: NoisedBatch, batch: LatentBatch, rows: Tensor) -> NoisedBatch:
        """The batch with the pretrained model's prediction as the target of some rows.

        Args:
            rows: their numbers, (n,) long on the device of the batch.
        """
        conditioning = {k: v[rows] for k, v in batch.conditioning.items() if self.takes_control or k != "control"}
        with torch.no_grad(), self.pretrained() as model:
            prediction = self.family.predict(
                model, noised.noisy_model_input[rows], noised.timesteps[rows], conditioning
            )
        channels = batch.latents.shape[1]  # a model that predicts its variance gives that too
        return replace(noised, target=noised.target.index_copy(0, rows, prediction[:, :channels].to(noised.target)))

    @contextmanager
    def pretrained(self) -> Iterator[Any]:
        """While open, the pretrained model, without dropout; what trains is left as it is."""
        model = self.family.model if self.source is None else self.source
        modules = [model, *([self.family.pipe.text_encoder] if self.family.encodes_in_step else [])]
        layers = [layer for module in (self.family.denoiser, *modules[1:]) for layer in tuner_layers(module)]
        training = [m for module in modules for m in module.modules() if m.training]
        with adapters_at(layers if self.source is None else [], [ADAPTER], 0):
            for module in training:
                module.training = False
            try:
                yield model
            finally:
                for module in training:
                    module.training = True


def _frozen(module: nn.Module) -> nn.Module:
    """A copy that does not train, in the same precision on the same device."""
    return copy.deepcopy(module).requires_grad_(False).eval()
