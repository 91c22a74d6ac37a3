"""Krea 2, base and distilled: flow matching, twelve stacked layers of Qwen3-VL, Qwen-Image's autoencoder and packing.

References:
    Qwen-Image Technical Report (Wu et al., 2025), https://arxiv.org/abs/2508.02324 (the autoencoder)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from difftuning_control.errors import UserError
from difftuning_control.families.fit import Fit
from difftuning_control.families.packed import image_ids, pack
from difftuning_control.families.qwen_image import QwenImage

DISTILLED_SHIFT = 1.15  # μ of the pipeline for a distilled model, at all sizes
END = 5  # tokens after the padded prompt


class Krea2(QwenImage):
    """A `Krea2Pipeline`. Conditioning: `prompt_embeds` (B, L, layers, D) and `prompt_attention_mask` (B, L) bool, whose
    padding is in the middle: after it comes the template's end."""

    name = "krea2"
    fit = Fit(batch_size=3)
    distilled_steps = 8
    controlnet_class = None  # diffusers has none
    control_pipeline_class = None

    def __init__(self, pipe: Any):
        super().__init__(pipe)
        self.lora_targets = self.lora_targets_by(pipe.transformer.config)

    @classmethod
    def lora_targets_by(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        parts = ("to_q", "to_k", "to_v", "to_out.0")  # of the blocks alone: the fusion of layers has other rows
        return tuple(f"transformer_blocks.{i}.attn.{part}" for i in range(config["num_layers"]) for part in parts)

    def _check_variant(self) -> None:
        self.need("transformer", "vae", "text_encoder", "tokenizer")
        if self.pipe.patch_size != 2:
            raise UserError(f"the pipeline's patch_size is {self.pipe.patch_size}; expected 2, as of Krea 2.")
        self.check_channels(self.pipe.transformer.config.in_channels // 4)

    @property
    def native_resolution(self) -> int:
        return 1024  # that the pipeline draws at unless told otherwise

    def shift_of(self, resolution: int) -> float:
        return DISTILLED_SHIFT if self.pipe.config.is_distilled else super().shift_of(resolution)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, mask = self.pipe.encode_prompt(list(prompts), self.device, max_sequence_length=self.text_length)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def prompt_tokens(self, prompt: str) -> tuple[int, int]:
        tokens = self.pipe.tokenizer(self.pipe.prompt_template_encode_prefix + prompt, truncation=False, verbose=False)
        return len(tokens.input_ids) - self.pipe.prompt_template_encode_start_idx + END, self.text_length

    def guidance_arguments(self, scale: float, rows: int) -> dict[str, Any]:
        """The pipeline's scale is one less: c + s (c − u)."""
        negative = self._embedded([""] * rows, "negative_") if self.offload and scale > 1 else {}
        return {"guidance_scale": max(scale - 1, 0.0)} | negative

    def _embedded(self, prompts: list[str], role: str) -> dict[str, Tensor]:
        rows = self.embedding_arguments(prompts)
        return {
            f"{role}prompt_embeds": rows["prompt_embeds"],
            f"{role}prompt_embeds_mask": rows["prompt_attention_mask"],
        }

    def denoiser_inputs(
        self, noisy_model_input: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> dict[str, Any]:
        embeds = conditioning["prompt_embeds"]
        height, width = noisy_model_input.shape[2:]
        places = image_ids(height, width, embeds.device).float()
        return {
            "hidden_states": pack(noisy_model_input),
            "timestep": timesteps,
            "encoder_hidden_states": embeds,
            "encoder_attention_mask": conditioning["prompt_attention_mask"],
            "position_ids": torch.cat([places.new_zeros(embeds.shape[1], 3), places]),
        }

    def unused_parameters(self, module: Any) -> tuple[str, ...]:
        return ()
