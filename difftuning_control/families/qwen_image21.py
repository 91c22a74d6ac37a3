"""Qwen-Image 2.1: flow matching, Qwen3-VL as text encoder, prompt and picture in one sequence whose text is causal.

Its autoencoder has a fourth channel, how opaque a pixel is; pictures are opaque here. In a batch the stock pipeline
places every picture after the longest prompt. Here a picture comes after its own, as where it is drawn alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from difftuning_control.errors import UserError
from difftuning_control.families.few_steps import Configs, FewSteps
from difftuning_control.families.fit import Fit
from difftuning_control.families.masked import padded, ragged
from difftuning_control.families.prompts import refuse_longer
from difftuning_control.families.qwen_image import QwenImage

SLOT = 4  # latents of the picture that one place of the mask stands for
STEPS = 40  # that the pipeline draws in unless told otherwise


class QwenImage21(QwenImage):
    """A `QwenImage21Pipeline`, for text to image. Conditioning: `prompt_embeds` and `prompt_attention_mask`."""

    name = "qwen_image21"
    fit = Fit(batch_size=3)
    cuts_prompts = False
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    call_settings: ClassVar[dict[str, Any]] = {"use_kv_cache": False}  # an adapter may act by the noise level
    controlnet_class = None  # diffusers has none
    control_pipeline_class = None

    def _check_variant(self) -> None:
        self.need("transformer", "vae", "text_encoder", "processor")
        if (patch := self.pipe.transformer.config.patch_size) != 1:
            raise UserError(f"the transformer's patch_size is {patch}; expected 1, as of Qwen-Image 2.1.")
        self.check_channels(self.pipe.transformer.config.in_channels)

    # --- latents ----------------------------------------------------------------------------------------------------

    @property
    def native_resolution(self) -> int:
        return 1024  # that the pipeline draws at unless told otherwise

    def shift_tokens(self, resolution: int) -> int:
        return (resolution // self.vae_scale_factor) ** 2

    def moments_of(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Of pictures that are opaque everywhere."""
        more = self.pipe.vae.config.in_channels - pixels.shape[1]
        return super().moments_of(pad(pixels, (0, 0, 0, 0, 0, more), value=1.0))

    def _pictures_of(self, latents: Tensor) -> Tensor:
        """On white, where a picture is not opaque."""
        pixels = super()._pictures_of(latents)
        colours, opaque = pixels[:, :3], (pixels[:, 3:4] + 1) / 2
        return colours if pixels.shape[1] == 3 else colours * opaque + 1 - opaque

    # --- prompts ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        self.check_prompts(prompts)
        embeds, mask, _ = self.pipe.encode_prompt([*prompts], device=self.device)
        return padded(list(embeds) if mask is None else ragged(embeds, mask), self.text_length)

    def prompt_tokens(self, prompt: str) -> tuple[int, int]:
        """Those of the chat around it too, but for the system's."""
        chat = self.pipe.prompt_template_t2i.format(prompt or " ")  # as the pipeline writes an empty one
        before = f"<|im_start|>system\n{self.pipe.sys_prompt}<|im_end|>\n"
        tokens = self.pipe.processor.tokenizer(chat.removeprefix(before), truncation=False, verbose=False).input_ids
        return len(tokens), self.text_length

    def check_prompts(self, prompts: list[str]) -> None:
        picture = self.pipe.processor.image_token
        if any(picture in prompt for prompt in prompts):
            raise UserError(f"a prompt has {picture} in it, which stands for a picture to edit; leave it out.")
        refuse_longer(self, prompts)

    def prompt_arguments(self, prompts: list[str]) -> dict[str, Any]:
        return (self._embedded(prompts, "") if self.offload else {"prompt": [*prompts]}) | self.call_settings

    # --- the model --------------------------------------------------------------------------------------------------

    def predict(
        self, denoiser: nn.Module, noisy_model_input: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> Tensor:
        """A forward a row: as many whatever the prompts, so that processes stay in step."""
        rows = range(len(noisy_model_input))
        told = [{name: tensor[i : i + 1] for name, tensor in conditioning.items()} for i in rows]
        parts = zip(noisy_model_input.split(1), timesteps.split(1), told)
        return torch.cat([super(QwenImage21, self).predict(denoiser, *part) for part in parts])

    def denoiser_inputs(
        self, noisy_model_input: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Of one row."""
        height, width = noisy_model_input.shape[2:]
        (embeds,) = ragged(conditioning["prompt_embeds"], conditioning["prompt_attention_mask"])
        text, picture = embeds.new_zeros(len(embeds)), embeds.new_ones(height * width // SLOT)
        return {
            "hidden_states": noisy_model_input.flatten(2).transpose(1, 2),
            "timestep": timesteps,
            "encoder_hidden_states": embeds[None],
            "img_shapes": [[(1, height, width)]],
            "img_mask": torch.cat([text, picture]).bool()[None],
        }

    def denoiser_output(self, output: Any, noisy_model_input: Tensor) -> Tensor:
        """The picture's part of the sequence, which is its end."""
        size = noisy_model_input.shape[2:]
        return output[:, -size.numel() :].transpose(1, 2).unflatten(2, size)

    def unused_parameters(self, module: Any) -> tuple[str, ...]:
        return ()

    # --- sampling ---------------------------------------------------------------------------------------------------

    @classmethod
    def few_steps_by(cls, configs: Configs) -> FewSteps:
        """Its guidance is distilled; a model of few steps lists them."""
        if sigmas := configs.index.get("sample_sigmas"):
            return FewSteps(len(sigmas), 1.0, "sample_sigmas of its pipeline")
        return super().few_steps_by(configs) or FewSteps(STEPS, 1.0, "its pipeline's own settings")

    def step_arguments(self, steps: int) -> dict[str, Any]:
        """As many as asked for, where the pipeline would take those that it lists."""
        listed = self.pipe.config.sample_sigmas
        own = {} if listed is None or len(listed) == steps else {"sigmas": np.linspace(1, 1 / steps, steps)}
        return super().step_arguments(steps) | own

    def sample(self, prompts: list[str], generators: list[torch.Generator], **settings: Any) -> Tensor:
        """In a call for each length of the prompts."""
        lengths = [self.prompt_tokens(prompt)[0] for prompt in prompts]
        groups = [[i for i, its in enumerate(lengths) if its == length] for length in dict.fromkeys(lengths)]
        drawn = [
            super(QwenImage21, self).sample([prompts[i] for i in rows], [generators[i] for i in rows], **settings)
            for rows in groups
        ]
        order = torch.tensor([i for rows in groups for i in rows]).argsort()
        return torch.cat(drawn)[order.to(self.device)]

    def drawn_latents(self, drawn: Tensor, resolution: int) -> Tensor:
        side = resolution // self.vae_scale_factor
        return drawn.transpose(1, 2).unflatten(2, (side, side))
