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
from diffusers import SanaControlNetModel, SanaControlNetPipeline, SanaPipeline
from torch import Tensor

from difftuning_control.errors import UserError
from difftuning_control.families.control import compare_configs
from difftuning_control.families.fit import Fit
from difftuning_control.families.masked import MaskedTransformer
from difftuning_control.objective.noise import NoiseProcess

SIDES = 32  # of whose multiples the pipeline takes sides only, whatever the autoencoder
COPIED_BLOCKS = 7  # that a new ControlNet copies, as many as the class has by default


class Sana(MaskedTransformer):
    """A `SanaPipeline`; prompts follow the long instruction that it has by default."""

    name = "sana"
    fit = Fit({"lora": 1e-4, "full": 1e-5, "controlnet": 1e-4, "controlnet_lora": 1e-4})
    prompts_at_once = 8
    base_density = "logit_normal"
    controlnet_class = SanaControlNetModel
    control_pipeline_class = SanaControlNetPipeline
    controlnet_whole = ("input_block", "controlnet_blocks")
    instructions: ClassVar[dict[str, Any]] = {
        "complex_human_instruction": inspect.signature(SanaPipeline.__call__)
        .parameters["complex_human_instruction"]
        .default
    }

    def told(self, process: NoiseProcess) -> NoiseProcess:
        return replace(process, timesteps=process.timesteps * self.pipe.transformer.config.timestep_scale)

    def _check_variant(self) -> None:
        super()._check_variant()
        if self.pipe.transformer.config.guidance_embeds:
            raise UserError("the model is a Sana that was distilled to few steps (Sprint); give a plain one.")

    @property
    def resolution_step(self) -> int:
        return math.lcm(SIDES, super().resolution_step)

    def moments_of(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """This autoencoder has no spread."""
        latents = self.pipe.vae.encode(pixels.to(self.device, self.dtype)).latent.float()
        return latents, torch.zeros_like(latents)

    def prompt_tokens(self, prompt: str) -> tuple[int, int]:
        """Of the instruction's tokens the last one is encoded with them."""
        tokens, most = super().prompt_tokens(prompt)
        return tokens, most - 1

    # --- control ----------------------------------------------------------------------------------------------------

    def residuals(self, controlnet: Any, control: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"controlnet_block_samples": controlnet(**inputs, controlnet_cond=control)[0]}

    def need_controlnet(self) -> None:
        """Refuse a Sana that diffusers' ControlNet and its pipeline are not for.

        Raises:
            UserError: naming the setting that they do not know.
        """
        super().need_controlnet()
        config = self.denoiser.config
        for key, usual in (("qk_norm", None), ("timestep_scale", 1.0)):
            if config[key] != usual:
                raise UserError(
                    f"the model's {key} is {config[key]} (as of Sana 1.5 or Sprint), which diffusers' "
                    "SanaControlNetModel does not know; give a Sana 1.0, or train a LoRA or all weights instead."
                )

    def _new_controlnet(self) -> Any:
        """The first blocks of the transformer, as many as `COPIED_BLOCKS`; the last takes no residual."""
        own = {"num_layers": min(COPIED_BLOCKS, self.denoiser.config.num_layers - 1)}
        copied = ("patch_embed", "time_embed", "caption_projection", "caption_norm", "transformer_blocks")
        return self.copied_controlnet(own, copied)

    def check_controlnet(self, controlnet: Any, name: str) -> None:
        widths = ("num_attention_heads", "attention_head_dim", "caption_channels")
        compare_configs(self.denoiser, controlnet, name, ("in_channels", "patch_size", *widths))
        most, its = self.denoiser.config.num_layers - 1, controlnet.config.num_layers
        if its > most:
            raise UserError(
                f"the ControlNet {name} does not fit this model: it has {its} blocks, and the model takes what {most} "
                "give; give one that was made for this model, or start from the denoiser."
            )
