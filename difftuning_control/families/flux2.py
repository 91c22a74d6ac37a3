"""FLUX.2, klein (base and distilled) and dev: flow matching, three stacked layers of a language model as embeddings.

Latents are squares of four of the autoencoder's, normalised by the statistics of its batch norm. klein-base has
ordinary guidance; the distilled klein has none; dev is distilled from guidance and told its scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from difftuning_control.families.fit import Fit
from difftuning_control.families.flux import TRAINING_GUIDANCE
from difftuning_control.families.transformer import FlowTransformer, LatentTransformer
from difftuning_control.objective.noise import NoiseProcess

STEPS = 50  # that the pipelines draw with unless told otherwise: μ of their shift depends on it


class SquareLatents(LatentTransformer):
    """A transformer on squares of four of the autoencoder's latents, normalised by the statistics of its batch norm."""

    base_density = "logit_normal"
    patch = 2

    @property
    def vae_scale_factor(self) -> int:
        return self.patch * self.pipe.vae_scale_factor

    @property
    def resolution_step(self) -> int:
        return self.vae_scale_factor

    @property
    def latent_channels(self) -> int:
        return self.patch**2 * self.pipe.vae.config.latent_channels

    @cached_property
    def latent_shift(self) -> Tensor:
        """On the CPU, where the rows of every step are scaled: those who read ahead would wait for the GPU."""
        return self.by_channel(self.pipe.vae.bn.running_mean.cpu())

    @cached_property
    def latent_factor(self) -> Tensor:
        vae = self.pipe.vae
        return 1 / torch.sqrt(self.by_channel(vae.bn.running_var.cpu()) + vae.config.batch_norm_eps)

    def by_channel(self, statistics: Tensor) -> Tensor:
        """The autoencoder's numbers, one a channel of a token, as (C, 1, 1)."""
        return statistics.view(-1, 1, 1)


class Flux2Klein(SquareLatents):
    """A `Flux2KleinPipeline`. Conditioning: `prompt_embeds` (B, L, 3 D)."""

    name = "flux2_klein"
    fit = Fit(batch_size=3)
    prompts_at_once = 4
    text_length: ClassVar[int] = 512
    chat: ClassVar[dict[str, Any]] = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}

    def __init__(self, pipe: Any):
        super().__init__(pipe)
        self.lora_targets = self.lora_targets_by(pipe.transformer.config)

    @classmethod
    def lora_targets_by(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        singles = (f"single_transformer_blocks.{i}.attn.to_out" for i in range(config["num_single_layers"]))
        return (*FlowTransformer.lora_targets, "to_qkv_mlp_proj", *singles)

    def _check_variant(self) -> None:
        self.need("transformer", "vae", "text_encoder", "tokenizer")
        self.check_channels(self.pipe.transformer.config.in_channels)

    @property
    def native_resolution(self) -> int:
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    def told(self, process: NoiseProcess) -> NoiseProcess:
        return replace(process, timesteps=process.sigmas)

    def shift_of(self, resolution: int) -> float:
        return compute_empirical_mu(self.shift_tokens(resolution), STEPS)

    def drawn_latents(self, drawn: Tensor, resolution: int) -> Tensor:
        """The pipeline gives the autoencoder's own."""
        return self.scale_latents(pixel_unshuffle(drawn, self.patch))

    # --- prompts ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _ = self.pipe.encode_prompt(list(prompts), self.device, max_sequence_length=self.text_length)
        return {"prompt_embeds": embeds}

    def prompt_tokens(self, prompt: str) -> tuple[int, int]:
        """Those of the chat around it too."""
        message = [{"role": "user", "content": prompt}]
        return super().prompt_tokens(self.pipe.tokenizer.apply_chat_template(message, **self.chat))[0], self.text_length

    def prompt_arguments(self, prompts: list[str]) -> dict[str, Any]:
        return super().prompt_arguments(prompts) | {"max_sequence_length": self.text_length}

    def guidance_arguments(self, scale: float, rows: int) -> dict[str, Any]:
        """None for the distilled one, which would leave it aside."""
        return {"guidance_scale": 1.0 if self.pipe.config.is_distilled else scale}

    # --- the model --------------------------------------------------------------------------------------------------

    def denoiser_inputs(
        self, noisy_model_input: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> dict[str, Any]:
        embeds = conditioning["prompt_embeds"]
        height, width = noisy_model_input.shape[2:]
        return {
            "hidden_states": noisy_model_input.flatten(2).transpose(1, 2),
            "timestep": timesteps,
            "guidance": None,
            "encoder_hidden_states": embeds,
            "txt_ids": ids(1, 1, embeds.shape[1], embeds.device),
            "img_ids": ids(height, width, 1, embeds.device),
        }

    def denoiser_output(self, output: Any, noisy_model_input: Tensor) -> Tensor:
        return output.transpose(1, 2).reshape(noisy_model_input.shape)


class Flux2(Flux2Klein):
    """A `Flux2Pipeline`. Conditioning may also hold `guidance` (B,), the scale that the model is told; the guidance of
    `sample` is this scale too. Prompts follow the pipeline's system message."""

    name = "flux2"

    def prompt_tokens(self, prompt: str) -> tuple[int, int]:
        """Those of the system message too."""
        said = {"system": self.pipe.system_message, "user": prompt}
        chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said.items()]
        chat_ids = self.pipe.tokenizer.apply_chat_template([chat], add_generation_prompt=False, tokenize=True)
        rows = chat_ids["input_ids"] if hasattr(chat_ids, "keys") else chat_ids  # a dictionary since transformers 5
        return len(rows[0]), self.text_length

    def embedding_arguments(self, prompts: list[str]) -> dict[str, Any]:
        """Without the empty prompt: guidance is embedded."""
        arguments = super().embedding_arguments(prompts)
        return {name: tensor for name, tensor in arguments.items() if not name.startswith("negative_")}

    def guidance_arguments(self, scale: float, rows: int) -> dict[str, Any]:
        return {"guidance_scale": scale}

    def denoiser_inputs(
        self, noisy_model_input: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> dict[str, Any]:
        guidance = conditioning.get("guidance")
        if guidance is None:
            guidance = torch.full((len(timesteps),), TRAINING_GUIDANCE, device=noisy_model_input.device)
        return super().denoiser_inputs(noisy_model_input, timesteps, conditioning) | {"guidance": guidance}

    def drawn_latents(self, drawn: Tensor, resolution: int) -> Tensor:
        """The pipeline gives the denoiser's, as tokens."""
        side = resolution // self.vae_scale_factor
        return drawn.transpose(1, 2).unflatten(2, (side, side))


def ids(height: int, width: int, length: int, device: torch.device) -> Tensor:
    """The four coordinates of tokens: time (0), row, column and place in a text, (height · width · length, 4)."""
    return torch.cartesian_prod(*(torch.arange(count, device=device) for count in (1, height, width, length)))
