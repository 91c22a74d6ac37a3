"""PixArt-α and PixArt-Σ: ε-prediction with a learned variance beside it, T5 with a mask.

diffusers has no methods for adapters on it, so `load_adapter` puts them there.

References:
    PixArt-α: Fast Training of Diffusion Transformer (Chen et al., 2023), https://arxiv.org/abs/2310.00426
    PixArt-Σ: Weak-to-Strong Training of Diffusion Transformer (Chen et al., 2024), https://arxiv.org/abs/2403.04692
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difftuning_control.errors import UserError
from difftuning_control.families.fit import Fit
from difftuning_control.families.masked import MaskedTransformer
from difftuning_control.families.tunable import make_tunable
from difftuning_control.objective.rows import moved


class PixArtSigma(MaskedTransformer):
    """A `PixArtSigmaPipeline`. Prompts are not cleaned of addresses and the like, see `clean_caption` there."""

    name = "pixart_sigma"
    fit = Fit({"lora": 1e-4, "full": 2e-5})
    call_settings = MaskedTransformer.call_settings | {"clean_caption": False}
    told_size = False  # whether the model is told resolution and aspect ratio

    def __init__(self, pipe: Any):
        super().__init__(pipe)
        make_tunable(pipe.transformer)

    def _check_variant(self) -> None:
        super()._check_variant()
        given, gives = self.pipe.vae.config.latent_channels, self.pipe.transformer.out_channels
        if gives not in (given, 2 * given):
            raise UserError(
                f"the transformer gives {gives} channels; expected {given}, or {2 * given} with the variance."
            )

    @property
    def learned_variance(self) -> bool:
        return self.pipe.transformer.out_channels == 2 * self.pipe.transformer.config.in_channels

    def denoiser_inputs(
        self, noisy_model_input: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> dict[str, Any]:
        rows, _, height, width = noisy_model_input.shape
        size: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if self.told_size:
            sides = torch.tensor([[height, width]], dtype=noisy_model_input.dtype) * self.vae_scale_factor
            size["resolution"] = moved(sides, noisy_model_input).expand(rows, -1)
            size["aspect_ratio"] = noisy_model_input.new_full((rows, 1), height / width)
        inputs = super().denoiser_inputs(noisy_model_input, timesteps, conditioning)
        return inputs | {"added_cond_kwargs": size}


class PixArtAlpha(PixArtSigma):
    """A `PixArtAlphaPipeline`; at 1024 pixels the model is told the size."""

    name = "pixart_alpha"
    text_length = 120

    def __init__(self, pipe: Any):
        super().__init__(pipe)
        self.told_size = pipe.transformer.config.sample_size == 128
