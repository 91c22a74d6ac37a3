"""Pictures and latents: what the autoencoder makes of each other, and the sides in pixels that a model takes."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from difftuning_control.errors import UserError
from difftuning_control.families.components import Components


class LatentSpace(Components):
    """The autoencoder of a model; latents are (B, C, h, w), in the denoiser's scale unless said otherwise."""

    @property
    def vae_scale_factor(self) -> int:
        """How many pixels a latent is wide."""
        return 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)

    @property
    def native_resolution(self) -> int:
        """Side in pixels of the pictures that the denoiser was made for."""
        return self.denoiser.config.sample_size * self.vae_scale_factor

    @property
    @abstractmethod
    def resolution_step(self) -> int:
        """Sides must be multiples of this many pixels."""

    def check_resolution(self, side: int, name: str) -> None:
        """Refuse a side in pixels that the model cannot take.

        Raises:
            UserError: saying under which name it was given.
        """
        if side % self.resolution_step:
            raise UserError(
                f"{name} is {side}; this model takes multiples of {self.resolution_step} (its own is "
                f"{self.native_resolution})."
            )

    @torch.no_grad()
    def encode_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's posterior, unscaled float32, (B, C, h, w).

        Args:
            pixels: (B, 3, H, W) in [-1, 1].
        """
        posterior = self.pipe.vae.encode(pixels.to(self.device, self.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def scale_latents(self, latents: Tensor) -> Tensor:
        """VAE latents to the denoiser's scale."""
        return (latents - self.latent_shift) * self.pipe.vae.config.scaling_factor

    @property
    def latent_shift(self) -> float:
        """What is taken from VAE latents before they are scaled."""
        return self.pipe.vae.config.get("shift_factor") or 0.0

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) float32 in [-1, 1] of the denoiser's latents."""
        latents = latents.to(self.device, self.dtype) / self.pipe.vae.config.scaling_factor
        return self.pipe.vae.decode(latents + self.latent_shift).sample.float().clamp(-1, 1)
