"""Chroma: FLUX.1's packing and blocks without its pooled prompt, T5 with a mask, and ordinary guidance.

The mask is of a prompt's tokens and of one token of padding after them. The model adds it to the logits of attention as
the number that it is: 1 where there is a token, 0 elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from difftuning_control.families.fit import Fit
from difftuning_control.families.masked import MaskedTransformer
from difftuning_control.families.packed import PackedTransformer, image_ids, pack
from difftuning_control.families.transformer import FlowTransformer


class Chroma(PackedTransformer, MaskedTransformer):
    """A `ChromaPipeline`. Conditioning: `prompt_embeds` and `prompt_attention_mask` (B, L), a number as the model takes
    it."""

    name = "chroma"
    fit = Fit(batch_size=3)
    base_density = "logit_normal"
    text_length = 512
    lora_targets = FlowTransformer.lora_targets

    def _check_variant(self) -> None:
        self.need("transformer", "vae", "text_encoder", "tokenizer")
        self.check_channels(self.pipe.transformer.config.in_channels // 4)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _, mask, *_ = self.pipe.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.text_length
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def checkpoint_activations(self) -> None:
        """As in all families; diffusers 0.42 would leave the mask out of the single blocks."""
        transformer, masks = self.denoiser, [None]

        def keep_mask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            masks[0] = kwargs["attention_mask"]

        def again(block: Any, *args: Any) -> Any:
            if len(args) == 3:  # of a single block; it may come wrapped, as a T-LoRA's
                args = (*args, masks[0])  # kept with the other arguments until the backward pass
            return checkpoint(block, *args, use_reentrant=False)

        transformer.register_forward_pre_hook(keep_mask, with_kwargs=True)
        transformer.enable_gradient_checkpointing(again)

    def prompt_arguments(self, prompts: list[str]) -> dict[str, Any]:
        told = self.embedding_arguments(prompts) if self.offload else {"prompt": list(prompts)}
        return told | {"max_sequence_length": self.text_length}

    def denoiser_inputs(
        self, noisy_model_input: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> dict[str, Any]:
        embeds, mask = conditioning["prompt_embeds"], conditioning["prompt_attention_mask"]
        tokens, (height, width) = pack(noisy_model_input), noisy_model_input.shape[2:]
        return {
            "hidden_states": tokens,
            "timestep": timesteps,
            "encoder_hidden_states": embeds,
            "txt_ids": torch.zeros(embeds.shape[1], 3, device=embeds.device, dtype=embeds.dtype),
            "img_ids": image_ids(height, width, embeds.device).to(embeds),
            "attention_mask": torch.cat([mask, mask.new_ones(tokens.shape[:2])], 1),
        }
