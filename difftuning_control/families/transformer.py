"""Transformers on VAE latents, with ControlNets that read conditions as latents; and those of Stable Diffusion 3 and
FLUX, which are trained by flow matching.

References:
    Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024),
    https://arxiv.org/abs/2403.03206
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from difftuning_control.errors import UserError
from difftuning_control.families.autoencoder import like
from difftuning_control.families.control import to_tensor
from difftuning_control.families.family import Family
from difftuning_control.families.quantised import need_bitsandbytes, plain_state, quantise_linears
from difftuning_control.system.digests import digest_of

FLOAT8 = torch.float8_e4m3fn


class LatentTransformer(Family):
    """A transformer on VAE latents; its ControlNets read conditions as latents too."""

    component = "transformer"
    control_argument = "control_image"
    condition_range = (-1.0, 1.0)
    encodes_control = True

    @property
    def transformers(self) -> list[Any]:
        """The one that is tuned, and those that the pipeline has beside it."""
        return [self.denoiser]

    def quantise(self, kind: str) -> None:
        """float8 by diffusers' layerwise casting: weights are in `dtype` while their layer computes, and always those
        of norms and of convolutions, whose gradient reads what is stored; the others by `quantised.py`."""
        for transformer in self.transformers:
            if kind == "float8":
                transformer.enable_layerwise_casting(FLOAT8, self.dtype, skip_modules_classes=(nn.Conv2d,))
            else:
                need_bitsandbytes(kind)
                quantise_linears(transformer, kind, self.dtype)

    def mend_adapter(self, path: Path) -> None:
        """Loaded beside weights in 8 bits, a LoRA is rounded to these too; take it from its file again, in `dtype`."""
        rounded = {n: p for n, p in self.denoiser.named_parameters() if ".lora_" in n and p.dtype == FLOAT8}
        saved = load_file(path) if rounded else {}
        for name, parameter in rounded.items():
            key = re.sub(r"\.(lora_[AB])\.\w+\.", r".\1.", f"{self.component}.{name}")
            parameter.data = saved[key].to(parameter.device, self.dtype)

    def check_channels(self, takes: int) -> None:
        """Refuse a transformer that is given more than noisy latents.

        Raises:
            UserError: with the two numbers of channels.
        """
        given = self.latent_channels
        if takes != given:
            raise UserError(
                f"the transformer takes {takes} channels (a variant that fills in or edits pictures), the autoencoder "
                f"gives {given}; give a plain text-to-image model."
            )

    # --- control ----------------------------------------------------------------------------------------------------

    def control_shift(self) -> Any:
        """What is taken from a condition's latents before they are scaled."""
        return self.latent_shift

    @property
    def control_fingerprint(self) -> str:
        """Changes when what `encode_control` gives does."""
        shift = self.control_shift()
        numbers = shift.flatten().tolist() if isinstance(shift, Tensor) else shift
        return digest_of([self.name, self.fingerprints["vae"], str(self.dtype), numbers])

    def encode_control(self, control: Tensor) -> Tensor:
        """Conditions (B, 3, H, W) uint8 as latents (B, C, h, w): the mean of the VAE's posterior, scaled."""
        mean = self.encode_moments(to_tensor(control, self.condition_range))[0].to(self.dtype)
        return (mean - like(self.control_shift(), mean)) * like(self.latent_factor, mean)

    def copied_controlnet(self, own: dict[str, Any], copied: tuple[str, ...]) -> Any:
        """A ControlNet with the transformer's configuration but for `own`, and the weights of its modules `copied`.

        The class's own `from_transformer` writes the ControlNet's settings into the transformer's configuration.
        """
        controlnet = self.controlnet_of_this_size(own)
        for name in copied:
            weights = plain_state(getattr(self.denoiser, name))
            part = getattr(controlnet, name)
            part.load_state_dict({k: weights[k] for k in part.state_dict()})
        return controlnet

    def controlnet_of_this_size(self, own: dict[str, Any]) -> Any:
        """A ControlNet with the transformer's configuration but for `own`, its weights at random."""
        known = inspect.signature(self.controlnet_class.__init__).parameters
        return self.controlnet_class(**{k: v for k, v in self.denoiser.config.items() if k in known} | own)


class FlowTransformer(LatentTransformer):
    """A transformer on VAE latents, trained at noise levels from a logit-normal density.

    Conditioning: `prompt_embeds` (B, L, D) and `pooled_prompt_embeds` (B, D').
    """

    base_density = "logit_normal"
    lora_targets: tuple[str, ...] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    )
    t5_length = 256  # tokens that the pipeline encodes with T5 unless told otherwise
    t5 = "3"  # its number among the text encoders

    def prompt_tokens(self, prompt: str) -> tuple[int, int]:
        """Those of T5, where there is one: it reads on where CLIP stops."""
        tokenizer = getattr(self.pipe, f"tokenizer_{self.t5}", None)
        if tokenizer is None:
            return super().prompt_tokens(prompt)
        return len(tokenizer(prompt, truncation=False, verbose=False).input_ids), self.t5_length

    def prompt_arguments(self, prompts: list[str]) -> dict[str, Any]:
        return super().prompt_arguments(prompts) | {"max_sequence_length": self.t5_length}
