"""Transformers on VAE latents with one text encoder and a mask over its tokens, as that of PixArt."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from difftuning_control.families.transformer import LatentTransformer


class MaskedTransformer(LatentTransformer):
    """Conditioning: `prompt_embeds` (B, L, D) and `prompt_attention_mask` (B, L), 1 where there is a token.

    The empty prompt is what guidance pushes away from: where the pipeline puts instructions before a prompt, it has
    none.
    """

    text_length: ClassVar[int] = 300  # tokens that the pipeline encodes unless told otherwise
    instructions: ClassVar[dict[str, Any]] = {}  # further arguments of the pipeline's `encode_prompt`
    call_settings: ClassVar[dict[str, Any]] = {"use_resolution_binning": False}  # of the pipeline: draw at this size

    def _check_variant(self) -> None:
        self.need("transformer", "vae", "text_encoder", "tokenizer")
        self.check_channels(self.pipe.transformer.config.in_channels)

    @property
    def vae_scale_factor(self) -> int:
        return self.pipe.vae_scale_factor

    @property
    def resolution_step(self) -> int:
        return self.vae_scale_factor * self.pipe.transformer.config.patch_size

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, mask, negative, negative_mask = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=not all(prompts),
            device=self.device,
            max_sequence_length=self.text_length,
            **self.instructions,
        )
        if negative is not None:
            empty = torch.tensor([not prompt for prompt in prompts], device=embeds.device)
            embeds = torch.where(empty[:, None, None], negative, embeds)
            mask = torch.where(empty[:, None], negative_mask, mask)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def prompt_tokens(self, prompt: str) -> tuple[int, int]:
        return len(self.pipe.tokenizer(prompt, truncation=False, verbose=False).input_ids), self.text_length

    def prompt_arguments(self, prompts: list[str]) -> dict[str, Any]:
        """Embeddings, since the pipeline would put its instructions before the empty prompt too."""
        if self.offload:
            arguments = self.embedding_arguments(prompts) | {"negative_prompt": None}
        else:
            arguments = self.encode_prompts(prompts)
        return arguments | self.call_settings | {"max_sequence_length": self.text_length}

    def denoiser_inputs(
        self, noisy_model_input: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> dict[str, Any]:
        return {
            "hidden_states": noisy_model_input,
            "timestep": timesteps,
            "encoder_hidden_states": conditioning["prompt_embeds"],
            "encoder_attention_mask": conditioning["prompt_attention_mask"],
        }


def padded(rows: list[Tensor], length: int) -> dict[str, Tensor]:
    """Embeddings (L_i, D) of prompts as `prompt_embeds` (B, length, D), zeros at their ends, and the mask of these."""
    mask = torch.tensor([[i < len(row) for i in range(length)] for row in rows], device=rows[0].device)
    embeds = torch.stack([pad(row, (0, 0, 0, length - len(row))) for row in rows])
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask.long()}


def ragged(embeds: Tensor, mask: Tensor) -> list[Tensor]:
    """The inverse."""
    return [row[:length] for row, length in zip(embeds, mask.sum(1).tolist())]
