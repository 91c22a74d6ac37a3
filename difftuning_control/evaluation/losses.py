"""Losses by noise band, on the same rows, noise and timesteps every time, so that two of them can be subtracted.

The training loss jumps with the timesteps that a batch happens to draw; these do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from difftuning_control.evaluation.band_losses import BandLosses
from difftuning_control.families.loss import compute_loss
from difftuning_control.objective.batch import LatentBatch
from difftuning_control.objective.difftuning import DiffTuningObjective
from difftuning_control.objective.noise import BANDS
from difftuning_control.recipe.inputs import pictures_at_once
from difftuning_control.system.seeds import step_seed

if TYPE_CHECKING:
    from difftuning_control.families.family import Family


@dataclass(frozen=True)
class BandValidator:
    """Measures a model on fixed rows.

    Args:
        batch: the rows; noise and levels of row r in band b depend on (seed, b, r) alone, so two batches share them.
        seed: of the noise.
        batch_size: rows at once; of large pictures fewer.
        bands: equally wide bands of u.
        draws: noise levels a row and band, spread evenly over the band; its centre when 1.
    """

    family: Family
    objective: DiffTuningObjective
    batch: LatentBatch
    seed: int = 0
    batch_size: int = 32
    bands: int = BANDS
    draws: int = 1

    @property
    def centres(self) -> list[float]:
        return [(band + 0.5) / self.bands for band in range(self.bands)]

    def measure(self, denoiser: nn.Module) -> BandLosses:
        """The losses of the given denoiser; dropout is off while they are measured."""
        return BandLosses(centres=self.centres, losses=self.rows(denoiser).double().mean(0).tolist())

    @torch.no_grad()
    def rows(self, denoiser: nn.Module) -> Tensor:
        """ℓ of every row in every band, averaged over the draws, (N, bands)."""
        training = denoiser.training
        denoiser.eval()
        losses = torch.stack([self._band(denoiser, band) for band in range(self.bands)], 1)
        denoiser.train(training)
        return losses

    def _band(self, denoiser: nn.Module, band: int) -> Tensor:
        draws = [self._draw(denoiser, band, draw) for draw in range(self.draws)]
        return torch.stack(draws).mean(0)

    def _draw(self, denoiser: nn.Module, band: int, draw: int) -> Tensor:
        grid = self.objective.process.u
        u = (band + (draw + 0.5) / self.draws) / self.bands
        level = int(torch.searchsorted(grid, torch.tensor(u)).clamp(max=len(grid) - 1))
        shape = self.batch.latents.shape[1:]
        place = (band,) if draw == 0 else (band, draw)
        pixels = self.family.vae_scale_factor**2 * shape[1] * shape[2]
        size = min(self.batch_size, pictures_at_once(pixels // 2))  # rows as when a bank is drawn, with guidance
        parts = []
        for start in range(0, len(self.batch), size):
            rows = self.batch.rows(slice(start, start + size))
            seeds = [step_seed(self.seed, *place, start + r) for r in range(len(rows))]
            noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
            rows = rows.to(self.family.device, self.family.dtype)
            levels = torch.full((len(rows),), level, device=rows.latents.device)
            losses = compute_loss(self.family, denoiser, self.objective, rows, noise.to(rows.latents), levels)
            parts.append(losses.cpu())
        return torch.cat(parts)
