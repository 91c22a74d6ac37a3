"""Stable Diffusion 1.x and 2.x: ε- and v-prediction, one CLIP text encoder, a UNet on VAE latents."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from torch import Tensor, nn

from difftuning_control.errors import UserError
from difftuning_control.families.control import compare_configs
from difftuning_control.families.family import Family
from difftuning_control.families.few_steps import Configs, FewSteps
from difftuning_control.families.fit import Fit
from difftuning_control.objective.rows import moved

TOLD_GUIDANCE = 8.0  # of UNets that are told it: in the middle of what latent consistency models were distilled at
EMBEDDING_CHANNELS = (16, 32, 96, 256)  # of the layers that bring a condition down to the latents' size


class EncodedUNet(nn.Module):
    """A UNet that is given tokens and encodes them in the same forward, so that the text encoder trains.

    forward: the UNet's keyword arguments, with `prompt_ids` (B, L) long in place of the embeddings; gives a tuple with
    the prediction, as the UNet does.
    """

    def __init__(self, unet: Any, text_encoder: Any):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, prompt_ids: Tensor, **inputs: Any) -> tuple[Tensor]:
        return self.unet(**inputs, encoder_hidden_states=self.text_encoder(prompt_ids)[0].to(inputs["sample"].dtype))


class StableDiffusion(Family):
    """A `StableDiffusionPipeline`. Conditioning: `prompt_embeds` (B, L, D), or `prompt_ids` (B, L) to encode."""

    name = "sd"
    component = "unet"
    fit = Fit(gradient_checkpointing=("full", "controlnet"))
    text_lora_targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "out_proj")
    controlnet_class = ControlNetModel
    control_pipeline_class: ClassVar[Any] = StableDiffusionControlNetPipeline
    controlnet_whole = ("controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block")

    def _check_variant(self) -> None:
        self.need("unet", "vae", "text_encoder", "tokenizer")
        takes, given = self.pipe.unet.config.in_channels, self.pipe.vae.config.latent_channels
        if takes != given:
            kind = {9: "an inpainting model", 8: "a model that edits pictures", 5: "a depth model", 7: "an upscaler"}
            raise UserError(
                f"the UNet takes {takes} channels ({kind.get(takes, 'a special variant')}), the autoencoder gives "
                f"{given}; give a plain text-to-image model."
            )

    @property
    def model(self) -> Any:
        return EncodedUNet(self.denoiser, self.pipe.text_encoder) if self.encodes_in_step else super().model

    @property
    def resolution_step(self) -> int:
        levels = len(self.pipe.unet.config.block_out_channels) - 1
        return math.lcm(8, self.vae_scale_factor * 2**levels)  # the pipeline itself asks for multiples of 8

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (B, L, D), as the stock pipeline makes them."""
        embeds, _ = self.pipe.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}

    def tokenize(self, prompts: list[str]) -> dict[str, Tensor]:
        tokenizer = self.pipe.tokenizer
        settings = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
        return {"prompt_ids": tokenizer(prompts, return_tensors="pt", **settings).input_ids}

    def denoiser_inputs(
        self, noisy_model_input: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> dict[str, Any]:
        inputs = {"sample": noisy_model_input, "timestep": timesteps, **self._told_guidance(noisy_model_input)}
        if "prompt_ids" in conditioning:
            return inputs | {"prompt_ids": conditioning["prompt_ids"]}
        return inputs | {"encoder_hidden_states": conditioning["prompt_embeds"]}

    def _told_guidance(self, noisy_model_input: Tensor) -> dict[str, Any]:
        """The embedded guidance of a UNet that is told it, by the stock pipeline's convention scale − 1."""
        width = self.pipe.unet.config.time_cond_proj_dim
        if width is None:
            return {}
        scales = torch.full((len(noisy_model_input),), TOLD_GUIDANCE - 1)
        embedded = self.pipe.get_guidance_scale_embedding(scales, embedding_dim=width)
        return {"timestep_cond": moved(embedded.to(noisy_model_input.dtype), noisy_model_input)}

    @classmethod
    def few_steps_by(cls, configs: Configs) -> FewSteps | None:
        """Of SD-Turbo and SDXL-Turbo, and what was distilled like them, an Euler scheduler with trailing timesteps and
        ordinary noise is the sign."""
        if configs.denoiser.get("time_cond_proj_dim") is not None:
            return FewSteps(cls.distilled_steps, TOLD_GUIDANCE, "its UNet, which is told the guidance")
        found, its = super().few_steps_by(configs), configs.scheduler
        is_euler = configs.scheduler_class in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
        ordinary = its.get("prediction_type", "epsilon") == "epsilon" and not its.get("rescale_betas_zero_snr", False)
        if found is None and is_euler and ordinary and its.get("timestep_spacing") == "trailing":
            known_by = f"its scheduler, {configs.scheduler_class} with trailing timesteps"
            return FewSteps(cls.distilled_steps, 1.0, known_by)
        return found

    # --- control ----------------------------------------------------------------------------------------------------

    def residuals(self, controlnet: Any, control: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        told = {name: value for name, value in inputs.items() if name != "timestep_cond"}  # which the UNet alone takes
        down, mid = controlnet(**told, controlnet_cond=control)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    def control_pipeline(self) -> Any:
        return self.control_pipeline_class(
            **self.pipe.components, controlnet=self.controlnet, requires_safety_checker=False
        )

    def _new_controlnet(self) -> Any:
        """Its condition embedding, drawn at random, brings pictures down by the autoencoder's factor."""
        halvings = int(math.log2(self.vae_scale_factor))
        channels = [EMBEDDING_CHANNELS[min(i, 3)] for i in range(halvings)] + [EMBEDDING_CHANNELS[-1]]
        return self.controlnet_class.from_unet(self.pipe.unet, conditioning_embedding_out_channels=tuple(channels))

    def check_controlnet(self, controlnet: Any, name: str) -> None:
        check_controlnet(self.pipe.unet, self.vae_scale_factor, controlnet, name)


def check_controlnet(unet: Any, vae_scale_factor: int, controlnet: Any, name: str) -> None:
    """Refuse a ControlNet that was made for another UNet or autoencoder.

    Raises:
        UserError: with the two numbers that differ.
    """
    its = controlnet.config
    keys = ("cross_attention_dim", "block_out_channels", "layers_per_block")  # small ones have fewer attention layers
    added = ("addition_embed_type", "projection_class_embeddings_input_dim")
    compare_configs(unet, controlnet, name, ("in_channels", *keys, *added))
    if its.conditioning_channels != 3:
        raise UserError(
            f"the ControlNet {name} takes conditions of {its.conditioning_channels} channels, and pictures have 3; "
            "give one that takes pictures."
        )
    factor = 2 ** (len(its.conditioning_embedding_out_channels) - 1)
    if factor != vae_scale_factor:
        raise UserError(
            f"the ControlNet {name} does not fit this model: it brings conditions down by {factor}, the "
            f"autoencoder pictures by {vae_scale_factor}; give one whose "
            "conditioning_embedding_out_channels match."
        )
