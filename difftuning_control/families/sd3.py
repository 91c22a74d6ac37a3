"""Stable Diffusion 3 and 3.5: flow matching with a timestep shift, two CLIP text encoders, and T5 or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
from torch import Tensor, nn

from difftuning_control.errors import UserError
from difftuning_control.families.control import compare_configs
from difftuning_control.families.transformer import FlowTransformer


class StableDiffusion3(FlowTransformer):
    """A `StableDiffusion3Pipeline`; without T5 its share of `prompt_embeds` is zeros, as the stock pipeline has it."""

    name = "sd3"
    controlnet_class = SD3ControlNetModel
    control_pipeline_class = StableDiffusion3ControlNetPipeline
    controlnet_whole = ("pos_embed_input", "controlnet_blocks")

    def _check_variant(self) -> None:
        self.need("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        self.check_channels(self.pipe.transformer.config.in_channels)

    @property
    def resolution_step(self) -> int:
        return self.vae_scale_factor * self.pipe.transformer.config.patch_size

    def check_resolution(self, side: int, name: str) -> None:
        super().check_resolution(side, name)
        most = self.pipe.transformer.config.pos_embed_max_size * self.resolution_step
        if side > most:
            raise UserError(f"{name} is {side}; this model has positions for at most {most} pixels.")

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.t5_length,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def denoiser_inputs(
        self, noisy_model_input: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> dict[str, Any]:
        return {
            "hidden_states": noisy_model_input,
            "timestep": timesteps,
            "encoder_hidden_states": conditioning["prompt_embeds"],
            "pooled_projections": conditioning["pooled_prompt_embeds"],
        }

    def unused_parameters(self, module: Any) -> tuple[str, ...]:
        """Of the last block: in the denoiser the prompt's queries, in a ControlNet all that its stream comes from."""
        last = f"transformer_blocks.{module.config.num_layers - 1}."
        queries = (f"{last}attn.add_q_proj", f"{last}attn.norm_added_q")
        if module is self.denoiser:
            return queries
        return (*queries, f"{last}attn.to_add_out", f"{last}ff_context")

    # --- control ----------------------------------------------------------------------------------------------------

    def residuals(self, controlnet: Any, control: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        if controlnet.config.force_zeros_for_pooled_projection:
            inputs = inputs | {"pooled_projections": torch.zeros_like(inputs["pooled_projections"])}
        return {"block_controlnet_hidden_states": controlnet(**inputs, controlnet_cond=control)[0]}

    def control_shift(self) -> Any:
        """None for the ControlNets that are told no pooled prompt either: that is how the stock pipeline tells them."""
        return 0.0 if self.controlnet.config.force_zeros_for_pooled_projection else super().control_shift()

    def _new_controlnet(self) -> Any:
        """Half of the transformer's blocks."""
        layers = -(-self.denoiser.config.num_layers // 2)
        own = {"num_layers": layers, "extra_conditioning_channels": 0, "force_zeros_for_pooled_projection": False}
        copied = ("pos_embed", "time_text_embed", "context_embedder", "transformer_blocks")
        controlnet = self.copied_controlnet(own, copied)
        nn.init.zeros_(controlnet.pos_embed_input.proj.weight)
        nn.init.zeros_(controlnet.pos_embed_input.proj.bias)
        return controlnet

    def check_controlnet(self, controlnet: Any, name: str) -> None:
        compare_configs(
            self.denoiser, controlnet, name, ("in_channels", "patch_size", "num_attention_heads", "attention_head_dim")
        )
        its = controlnet.config
        if its.joint_attention_dim is None or its.get("use_pos_embed") is False:
            raise UserError(
                f"the ControlNet {name} borrows the transformer's position embedding (as those for SD 3.5 large do), "
                "which is not supported; start from the denoiser."
            )
        if its.extra_conditioning_channels:
            raise UserError(
                f"the ControlNet {name} takes {its.extra_conditioning_channels} channels beside the condition's (a "
                "mask); give one that takes pictures."
            )

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """The stock pipeline draws a condition's latents from PyTorch's global random numbers; here they are the mean,
        so that a row does not depend on its neighbours."""
        encode = self.pipe.vae.encode

        def encode_mean(pictures: Tensor) -> Any:
            encoded = encode(pictures)
            encoded.latent_dist.sample = encoded.latent_dist.mode
            return encoded

        self.pipe.vae.encode = encode_mean
        try:
            with super()._drawing():
                yield
        finally:
            del self.pipe.vae.encode
