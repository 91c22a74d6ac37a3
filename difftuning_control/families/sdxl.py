"""Stable Diffusion XL: ε- and v-prediction, two CLIP text encoders, a UNet that is told of sizes and crops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import StableDiffusionXLControlNetPipeline
from torch import Tensor

from difftuning_control.errors import UserError
from difftuning_control.families.fit import Fit
from difftuning_control.families.sd import StableDiffusion
from difftuning_control.objective.rows import moved


class StableDiffusionXL(StableDiffusion):
    """A `StableDiffusionXLPipeline`.

    Conditioning: `prompt_embeds` (B, L, D₁ + D₂), `pooled_prompt_embeds` (B, D₂), and perhaps `sizes` (B, 6), see
    `cache.Framing.sizes`; without these the picture counts as whole and as large as it is, as in the stock pipeline.

    References:
        SDXL: Improving Latent Diffusion Models (Podell et al., 2023), https://arxiv.org/abs/2307.01952
    """

    name = "sdxl"
    fit = Fit()
    takes_sizes = True
    text_lora_targets = ()
    control_pipeline_class = StableDiffusionXLControlNetPipeline

    def _check_variant(self) -> None:
        if self.pipe.text_encoder is None and self.pipe.text_encoder_2 is not None:
            raise UserError(
                "the model is an SDXL refiner (it has the second text encoder alone), which only finishes pictures; "
                "give a base model."
            )
        self.need("text_encoder_2", "tokenizer_2")
        super()._check_variant()

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """As the stock pipeline makes them; the empty prompt is what it pushes away from in guidance, which is zeros
        where the model was trained so (`force_zeros_for_empty_prompt`)."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if self.pipe.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([not prompt for prompt in prompts], device=embeds.device)
            embeds, pooled = embeds.clone(), pooled.clone()
            embeds[empty], pooled[empty] = 0, 0
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def prompt_arguments(self, prompts: list[str]) -> dict[str, Any]:
        if self.offload:
            return self.embedding_arguments(prompts)
        return self.encode_prompts(prompts)  # and not the prompts: the pipeline would encode the empty one as text

    def denoiser_inputs(
        self, noisy_model_input: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> dict[str, Any]:
        sizes = conditioning.get("sizes")
        if sizes is None:
            height, width = (side * self.vae_scale_factor for side in noisy_model_input.shape[2:])
            whole = moved(torch.tensor([height, width, 0, 0, height, width]), noisy_model_input)
            sizes = whole.expand(len(noisy_model_input), -1)
        added = {"text_embeds": conditioning["pooled_prompt_embeds"], "time_ids": sizes.float()}
        return super().denoiser_inputs(noisy_model_input, timesteps, conditioning) | {"added_cond_kwargs": added}

    def control_pipeline(self) -> Any:
        return self.control_pipeline_class(
            **self.pipe.components,
            controlnet=self.controlnet,
            force_zeros_for_empty_prompt=self.pipe.config.force_zeros_for_empty_prompt,
            add_watermarker=False,
        )

    # --- an autoencoder that overflows in float16 -------------------------------------------------------------------

    def encode_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        with self._safe_precision():
            return super().encode_moments(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        with self._safe_precision():
            return super().decode(latents)

    @contextmanager
    def _safe_precision(self) -> Iterator[None]:
        """The autoencoder in float32 for the while where it is in float16 and asks for it, as in the stock pipeline; a
        caller's autocast, which would go on computing in float16, is off for the while."""
        vae = self.pipe.vae
        upcast = vae.dtype == torch.float16 and vae.config.force_upcast
        if upcast:
            vae.float()
        try:
            with torch.autocast(vae.device.type, enabled=False) if upcast else nullcontext():
                yield
        finally:
            if upcast:
                vae.half()
