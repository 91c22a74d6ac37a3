"""Lumina-Image 2.0: flow matching with time reversed, Gemma as text encoder.

It is told 1 − σ, 0 for noise and 1 for a picture, and predicts latents − noise.

References:
    Lumina-Image 2.0: A Unified and Efficient Image Generative Framework (Qin et al., 2025),
    https://arxiv.org/abs/2503.21758
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from difftuning_control.families.fit import Fit
from difftuning_control.families.masked import MaskedTransformer
from difftuning_control.objective.noise import NoiseProcess


class Lumina2(MaskedTransformer):
    """A `Lumina2Pipeline`; prompts follow its system prompt."""

    name = "lumina2"
    fit = Fit(batch_size=3)
    prompts_at_once = 8
    base_density = "logit_normal"
    text_length = 256
    call_settings: ClassVar[dict[str, Any]] = {}

    def told(self, process: NoiseProcess) -> NoiseProcess:
        return replace(process, timesteps=1 - process.sigmas)

    def shift_tokens(self, resolution: int) -> int:
        """The number of latent channels, which is what the pipeline counts."""
        return self.pipe.transformer.config.in_channels

    def prompt_tokens(self, prompt: str) -> tuple[int, int]:
        """Those of the system prompt too."""
        return super().prompt_tokens(f"{self.pipe.system_prompt} <Prompt Start> {prompt}")

    def denoiser_output(self, output: Any, noisy_model_input: Tensor) -> Tensor:
        """noise − latents, as every other model of flow matching."""
        return -output
