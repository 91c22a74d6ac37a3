"""Latents packed 2×2 into the tokens of a transformer that is told σ as its time, as FLUX.1, Qwen-Image and Chroma."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from difftuning_control.families.transformer import LatentTransformer
from difftuning_control.objective.noise import NoiseProcess


class PackedTransformer(LatentTransformer):
    """A transformer that is given and gives tokens (B, h/2 · w/2, 4 C); so does its pipeline where it gives latents."""

    @property
    def native_resolution(self) -> int:
        return self.pipe.default_sample_size * self.vae_scale_factor

    @property
    def resolution_step(self) -> int:
        return 2 * self.vae_scale_factor

    def told(self, process: NoiseProcess) -> NoiseProcess:
        return replace(process, timesteps=process.sigmas)

    def denoiser_output(self, output: Any, noisy_model_input: Tensor) -> Tensor:
        return unpack(output, *noisy_model_input.shape[2:])

    def drawn_latents(self, drawn: Tensor, resolution: int) -> Tensor:
        side = resolution // self.vae_scale_factor
        return unpack(drawn, side, side)


def pack(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) as tokens (B, h/2 · w/2, 4 C)."""
    return latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, h/2 · w/2, 4 C) as latents (B, C, h, w)."""
    grid = tokens.unflatten(1, (height // 2, width // 2)).unflatten(3, (-1, 2, 2))
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def image_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Row and column of each token of latents of this size, (h/2 · w/2, 3) long; the first of the three is 0. They are
    made on the device: a copy to it would wait until it has nothing left to do."""
    sides = (torch.arange(side // 2, device=device) for side in (height, width))
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
