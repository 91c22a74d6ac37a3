"""The per-row loss of a batch: noise is added, the model predicts, the prediction is compared with its target."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from difftuning_control.objective.batch import LatentBatch
from difftuning_control.objective.difftuning import DiffTuningObjective, NoisedBatch

if TYPE_CHECKING:
    from difftuning_control.families.family import Family


def compute_loss(
    family: Family,
    denoiser: nn.Module,
    objective: DiffTuningObjective,
    batch: LatentBatch,
    noise: Tensor,
    levels: Tensor,
    retarget: Callable[[NoisedBatch], NoisedBatch] | None = None,
) -> Tensor:
    """ℓ of every row, (B,): noise → model → squared error. Training, validation and analysis all come through here.

    Args:
        retarget: gives rows another target than what they were made of.
    """
    noised = objective.add_noise(batch.latents, noise, levels)
    if retarget is not None:
        noised = retarget(noised)
    model_output = family.predict(denoiser, noised.noisy_model_input, noised.timesteps, batch.conditioning)
    return objective.losses(model_output, batch.latents, noised, batch.loss_weights)
