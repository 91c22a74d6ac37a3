"""Pictures and latents: what the autoencoder makes of each other, and the sides in pixels that a model takes."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from difftuning_control.errors import UserError
from difftuning_control.families.components import Components
from difftuning_control.recipe.inputs import pictures_at_once


class LatentSpace(Components):
    """The autoencoder of a model; latents are (B, C, h, w), in the denoiser's scale unless said otherwise."""

    is_video: ClassVar[bool] = False  # whether the autoencoder takes a picture as a video of one frame
    patch: ClassVar[int] = 1  # side of the squares of the autoencoder's latents that are one latent here, as channels

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

    def check_autoencoder(self) -> None:
        """Refuse an autoencoder that gives no latents as the denoiser was trained on.

        Raises:
            UserError: for the small one that only previews pictures.
        """
        if type(self.pipe.vae).__name__ == "AutoencoderTiny":
            raise UserError(
                "the model's vae is an AutoencoderTiny, whose latents have no distribution to train on; give the model "
                "with the autoencoder that it was published with."
            )

    @torch.no_grad()
    def encode_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's posterior, unscaled float32, (B, C, h, w).

        Args:
            pixels: (B, 3, H, W) in [-1, 1]; of large pictures few are encoded at once.

        Raises:
            UserError: as `check_autoencoder`.
        """
        self.check_autoencoder()
        parts = [self.moments_of(part) for part in pixels.split(pictures_at_once(pixels.shape[2:].numel()))]
        means, stds = zip(*parts)
        return torch.cat(means), torch.cat(stds)

    def moments_of(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """What `encode_moments` gives, of pictures that are encoded at once."""
        pixels = pixels.to(self.device, self.dtype)
        posterior = self.pipe.vae.encode(pixels.unsqueeze(2) if self.is_video else pixels).latent_dist
        mean, std = (m[:, :, 0] if self.is_video else m for m in (posterior.mean.float(), posterior.std.float()))
        return pixel_unshuffle(mean, self.patch), pixel_unshuffle(std, self.patch)

    def scale_latents(self, latents: Tensor) -> Tensor:
        """VAE latents to the denoiser's scale."""
        return (latents - like(self.latent_shift, latents)) * like(self.latent_factor, latents)

    @property
    def latent_channels(self) -> int:
        return self.pipe.vae.config.latent_channels

    @property
    def latent_shift(self) -> Any:
        """What is taken from VAE latents before they are scaled: a number, or (C, 1, 1)."""
        return self.pipe.vae.config.get("shift_factor") or 0.0

    @property
    def latent_factor(self) -> Any:
        """What VAE latents are then multiplied by: a number, or (C, 1, 1)."""
        return self.pipe.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) float32 in [-1, 1] of the denoiser's latents; of large ones few are decoded at once."""
        pixels = self.vae_scale_factor**2 * latents.shape[2:].numel()
        return torch.cat([self._pictures_of(part) for part in latents.split(pictures_at_once(pixels))])

    def _pictures_of(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.device, self.dtype)
        latents = latents / like(self.latent_factor, latents) + like(self.latent_shift, latents)
        latents = pixel_shuffle(latents, self.patch)
        pixels = self.pipe.vae.decode(latents.unsqueeze(2) if self.is_video else latents).sample
        return (pixels[:, :, 0] if self.is_video else pixels).float().clamp(-1, 1)


def like(value: Any, latents: Tensor) -> Any:
    """A number as it is; numbers by channel where and as the latents are."""
    return value.to(latents) if isinstance(value, Tensor) else value
