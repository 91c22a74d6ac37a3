"""FLUX.1: flow matching, T5 and a pooled CLIP text encoder, latents packed 2×2, timesteps in 0 to 1.

`dev` is distilled from guidance and told its scale; `schnell` is not.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline
from torch import Tensor

from difftuning_control.errors import UserError
from difftuning_control.families.control import compare_configs
from difftuning_control.families.few_steps import Configs, FewSteps
from difftuning_control.families.fit import Fit
from difftuning_control.families.packed import PackedTransformer, image_ids, pack
from difftuning_control.families.transformer import FlowTransformer

TRAINING_GUIDANCE = 1.0  # where what was distilled is nearest to the conditional prediction that the loss asks for
COPIED_BLOCKS = 4  # that a new ControlNet copies, as in diffusers' own training script


class Flux(PackedTransformer, FlowTransformer):
    """A `FluxPipeline`. Conditioning may also hold `guidance` (B,), the scale that a `dev` model is told; so is the
    guidance of `sample`, which `schnell` leaves aside."""

    name = "flux"
    fit = Fit(batch_size=3)
    t5_length = 512
    t5 = "2"
    controlnet_class = FluxControlNetModel
    control_pipeline_class = FluxControlNetPipeline
    controlnet_whole = ("controlnet_x_embedder", "controlnet_blocks", "controlnet_single_blocks")

    def _check_variant(self) -> None:
        self.need("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        self.check_channels(self.pipe.transformer.config.in_channels // 4)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompts, None, device=self.device, max_sequence_length=self.t5_length
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def embedding_arguments(self, prompts: list[str]) -> dict[str, Any]:
        """Without the empty prompt: guidance is embedded."""
        arguments = super().embedding_arguments(prompts)
        return {name: tensor for name, tensor in arguments.items() if not name.startswith("negative_")}

    def denoiser_inputs(
        self, noisy_model_input: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> dict[str, Any]:
        embeds = conditioning["prompt_embeds"]
        rows, _, height, width = noisy_model_input.shape
        guidance = conditioning.get("guidance")
        if guidance is None:
            guidance = torch.full((rows,), TRAINING_GUIDANCE, device=noisy_model_input.device)
        return {
            "hidden_states": pack(noisy_model_input),
            "timestep": timesteps,
            "guidance": guidance if self.pipe.transformer.config.guidance_embeds else None,
            "pooled_projections": conditioning["pooled_prompt_embeds"],
            "encoder_hidden_states": embeds,
            "txt_ids": torch.zeros(embeds.shape[1], 3, device=embeds.device, dtype=embeds.dtype),
            "img_ids": image_ids(height, width, embeds.device).to(embeds),
        }

    @classmethod
    def few_steps_by(cls, configs: Configs) -> FewSteps | None:
        """Of schnell, which is not told its guidance and draws at the same levels at all sizes."""
        told = configs.denoiser.get("guidance_embeds", True)
        shifted = configs.scheduler.get("use_dynamic_shifting", True)
        if not told and not shifted:
            return FewSteps(cls.distilled_steps, 1.0, "its transformer, which is not told the guidance")
        return super().few_steps_by(configs)

    def unused_parameters(self, module: Any) -> tuple[str, ...]:
        """In a ControlNet without single blocks all that leads to the prompt's stream after the last double block."""
        if module is self.denoiser or module.config.num_single_layers:
            return ()
        last = f"transformer_blocks.{module.config.num_layers - 1}."
        return tuple(f"{last}{n}" for n in ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "ff_context"))

    # --- control ----------------------------------------------------------------------------------------------------

    def encode_control(self, control: Tensor) -> Tensor:
        return pack(super().encode_control(control))

    def residuals(self, controlnet: Any, control: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        guidance = inputs["guidance"] if controlnet.config.guidance_embeds else None
        blocks, single = controlnet(**inputs | {"guidance": guidance}, controlnet_cond=control)
        return {"controlnet_block_samples": blocks, "controlnet_single_block_samples": single}

    def _new_controlnet(self) -> Any:
        """The first blocks of the transformer, as many as `COPIED_BLOCKS`."""
        own = {"num_layers": min(COPIED_BLOCKS, self.denoiser.config.num_layers), "num_single_layers": 0}
        copied = ("pos_embed", "time_text_embed", "context_embedder", "x_embedder", "transformer_blocks")
        return self.copied_controlnet(own, copied)

    def check_controlnet(self, controlnet: Any, name: str) -> None:
        widths = ("num_attention_heads", "attention_head_dim", "joint_attention_dim", "pooled_projection_dim")
        compare_configs(self.denoiser, controlnet, name, ("in_channels", *widths))
        if controlnet.union:
            raise UserError(
                f"the ControlNet {name} is one for several kinds of conditions (num_mode "
                f"{controlnet.config.num_mode}); give one for a single kind."
            )
        if controlnet.input_hint_block is not None:
            raise UserError(
                f"the ControlNet {name} reads conditions as pictures, by a hint block of its own, which is not "
                "supported; give one that reads latents, or start from the denoiser."
            )
