"""Sana: flow matching on latents of an autoencoder that takes pictures down by 32, Gemma as text encoder.

References:
    SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers (Xie et al., 2024),
    https://arxiv.org/abs/2410.10629
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import SanaPipeline
from torch import Tensor

from difftuning_control.errors import UserError
from difftuning_control.families.masked import MaskedTransformer

SIDES = 32  # of whose multiples the pipeline takes sides only, whatever the autoencoder


class Sana(MaskedTransformer):
    """A `SanaPipeline`; prompts follow the long instruction that it has by default."""

    name = "sana"
    base_density = "logit_normal"
    instructions: ClassVar[dict[str, Any]] = {
        "complex_human_instruction": inspect.signature(SanaPipeline.__call__)
        .parameters["complex_human_instruction"]
        .default
    }

    def __init__(self, pipe: Any):
        super().__init__(pipe)
        scale = pipe.transformer.config.timestep_scale
        self.process = replace(self.process, timesteps=self.process.timesteps * scale)

    def _check_variant(self) -> None:
        super()._check_variant()
        if self.pipe.transformer.config.guidance_embeds:
            raise UserError("the model is a Sana that was distilled to few steps (Sprint); give a plain one.")

    @property
    def resolution_step(self) -> int:
        return math.lcm(SIDES, super().resolution_step)

    @torch.no_grad()
    def encode_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """This autoencoder has no spread."""
        latents = self.pipe.vae.encode(pixels.to(self.device, self.dtype)).latent.float()
        return latents, torch.zeros_like(latents)

    def prompt_tokens(self, prompt: str) -> tuple[int, int]:
        """Of the instruction's tokens the last one is encoded with them."""
        tokens, most = super().prompt_tokens(prompt)
        return tokens, most - 1
