"""Losses by noise band, on the same rows, noise and timesteps every time, so that two of them can be subtracted.

The training loss jumps with the timesteps that a batch happens to draw; these do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from difftuning_control.batch import LatentBatch
from difftuning_control.batches import step_seed
from difftuning_control.objective import DiffTuningObjective, per_sample_loss

if TYPE_CHECKING:
    from difftuning_control.families.sd import StableDiffusion

BANDS = 5


def compute_loss(
    family: StableDiffusion,
    denoiser: nn.Module,
    objective: DiffTuningObjective,
    batch: LatentBatch,
    noise: Tensor,
    levels: Tensor,
) -> Tensor:
    """ℓ of every row, (B,): noise → model → squared error. Training, validation and analysis all come through here."""
    noised = objective.add_noise(batch.latents, noise, levels)
    model_pred = family.predict(denoiser, noised.noisy_model_input, noised.timesteps, batch.conditioning)
    return per_sample_loss(model_pred, noised.target)


@dataclass(frozen=True)
class BandLosses:
    """Mean ℓ over the rows in each of the equally wide bands of u, from nearly clean to pure noise."""

    centres: list[float]
    losses: list[float]

    @property
    def mean(self) -> float:
        return sum(self.losses) / len(self.losses)

    def to_dict(self) -> dict[str, list[float]]:
        return {"u": self.centres, "loss": self.losses}


@dataclass(frozen=True)
class BandValidator:
    """Measures a model on fixed rows.

    Args:
        batch: the rows; noise and level of row r in band b depend on (seed, b, r) alone.
        seed: of the noise.
    """

    family: StableDiffusion
    objective: DiffTuningObjective
    batch: LatentBatch
    seed: int = 0
    batch_size: int = 32

    @torch.no_grad()
    def measure(self, denoiser: nn.Module) -> BandLosses:
        """The losses of the given denoiser; dropout is off while they are measured."""
        training = denoiser.training
        denoiser.eval()
        centres = [(band + 0.5) / BANDS for band in range(BANDS)]
        losses = [self._band(denoiser, band, centre) for band, centre in enumerate(centres)]
        denoiser.train(training)
        return BandLosses(centres, losses)

    def _band(self, denoiser: nn.Module, band: int, centre: float) -> float:
        level = int(
            torch.searchsorted(self.objective.process.u, torch.tensor(centre)).clamp(
                max=len(self.objective.process) - 1
            )
        )
        shape = self.batch.latents.shape[1:]
        found = []
        for start in range(0, len(self.batch), self.batch_size):
            rows = self.batch.rows(slice(start, start + self.batch_size))
            seeds = [step_seed(self.seed, band, start + r) for r in range(len(rows))]
            noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
            rows = rows.to(self.family.device, self.family.dtype)
            levels = torch.full((len(rows),), level, device=rows.latents.device)
            found.append(
                compute_loss(self.family, denoiser, self.objective, rows, noise.to(rows.latents), levels).cpu()
            )  # fmt: skip
        return float(torch.cat(found).double().mean())
