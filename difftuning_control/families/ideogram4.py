"""Ideogram 4: flow matching with time reversed, thirteen stacked layers of Qwen3-VL, FLUX.2's autoencoder.

Text and picture are one sequence, with the text's padding before it. The model is told 1 − σ, 0 for noise and 1 for a
picture, and predicts latents − noise. Guidance is away from a second transformer, `unconditional_transformer`, which is
told no text and stays as it is: what is drawn with guidance is Domain Guidance (https://arxiv.org/abs/2504.01521).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from difftuning_control.families.fit import Fit
from difftuning_control.families.flux2 import SquareLatents
from difftuning_control.families.packed import image_ids
from difftuning_control.families.prompts import refuse_longer
from difftuning_control.objective.noise import NoiseProcess

NOTHING, TEXT, PICTURE = 0, 3, 2  # what a place in the sequence holds, as the transformer is told
PICTURE_PLACES = 65536  # where rows and columns are counted from, so that no text has these numbers
SHIFT_SIDE = 512  # in pixels, where sampling's levels are as many above σ = 1/2 as below


class Ideogram4(SquareLatents):
    """An `Ideogram4Pipeline`. Conditioning: `prompt_embeds` (B, L, 13 D), padded at their beginning, and
    `prompt_attention_mask` (B, L), 1 where there is a token."""

    name = "ideogram4"
    fit = Fit(batch_size=2)
    prompts_at_once = 4
    cuts_prompts = False
    text_length = 512  # a quarter of what the pipeline takes, since each place has 53,248 numbers
    spared = ("text_encoder", "unconditional_transformer")

    def _check_variant(self) -> None:
        self.need("transformer", "unconditional_transformer", "vae", "text_encoder", "tokenizer")
        self.check_channels(self.pipe.transformer.config.in_channels)

    @property
    def modules(self) -> dict[str, Any]:
        return super().modules | {"unconditional_transformer": self.pipe.unconditional_transformer}

    @property
    def transformers(self) -> list[Any]:
        return [self.denoiser, self.pipe.unconditional_transformer]

    @property
    def native_resolution(self) -> int:
        return 1024  # the pipeline draws at 2048 unless told otherwise, with four times the tokens

    def told(self, process: NoiseProcess) -> NoiseProcess:
        return replace(process, timesteps=1 - process.sigmas)

    def training_process(self, resolution: int) -> NoiseProcess:
        """The log-odds of σ rise with the logarithm of the side, as those that the pipeline draws at."""
        return self.told(self._scheduled.shifted(resolution / SHIFT_SIDE))

    # --- latents ----------------------------------------------------------------------------------------------------

    def by_channel(self, statistics: Tensor) -> Tensor:
        """In a token the autoencoder's channels come last, here the places of a square do."""
        return statistics.unflatten(0, (self.patch**2, -1)).T.reshape(-1, 1, 1)

    def drawn_latents(self, drawn: Tensor, resolution: int) -> Tensor:
        side = resolution // self.vae_scale_factor
        return self._latents(drawn, side, side)

    def _tokens(self, latents: Tensor) -> Tensor:
        """Latents (B, C · 4, h, w) as tokens (B, h · w, 4 · C)."""
        return latents.unflatten(1, (-1, self.patch**2)).transpose(1, 2).flatten(3).flatten(1, 2).transpose(1, 2)

    def _latents(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """The inverse."""
        squares = tokens.transpose(1, 2).unflatten(1, (self.patch**2, -1)).transpose(1, 2)
        return squares.flatten(1, 2).unflatten(2, (height, width))

    # --- prompts ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        self.check_prompts(prompts)
        encode = type(self.pipe).encode_prompt  # and not what `_drawing` puts in its place
        embeds, _, _, places = encode(self.pipe, list(prompts), 1, 1, self.text_length, self.device)
        mask = (places[:, : self.text_length] == TEXT).long()
        return {"prompt_embeds": embeds[:, : self.text_length].to(self.dtype), "prompt_attention_mask": mask}

    def prompt_tokens(self, prompt: str) -> tuple[int, int]:
        """Those of the chat around it too."""
        message = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        chat = self.pipe.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return len(self.pipe.tokenizer(chat, add_special_tokens=False, verbose=False).input_ids), self.text_length

    def check_prompts(self, prompts: list[str]) -> None:
        refuse_longer(self, prompts)

    def prompt_arguments(self, prompts: list[str]) -> dict[str, Any]:
        """Always the prompts: the pipeline takes no embeddings, see `_drawing`."""
        return {"prompt": list(prompts), "max_sequence_length": self.text_length}

    def guidance_arguments(self, scale: float, rows: int) -> dict[str, Any]:
        """In the place of a scale for each of 48 steps."""
        return {"guidance_scale": scale, "guidance_schedule": None}

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """With `offload` the second transformer is beside the first for the while, and the pipeline reads embeddings
        where it would encode prompts."""
        with super()._drawing():
            if not self.offload:
                yield
                return
            self.pipe.encode_prompt = self._told
            self.pipe.unconditional_transformer.to(self.device)
            try:
                yield
            finally:
                self.pipe.unconditional_transformer.to("cpu")
                del self.pipe.encode_prompt

    def _told(self, prompt: list[str], grid_h: int, grid_w: int, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """What the pipeline's `encode_prompt` gives."""
        rows = self.embedding_arguments(list(prompt))
        told = sequence(rows["prompt_embeds"].float(), rows["prompt_attention_mask"], grid_h, grid_w)
        return tuple(told.values())

    # --- the model --------------------------------------------------------------------------------------------------

    def denoiser_inputs(
        self, noisy_model_input: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]
    ) -> dict[str, Any]:
        mask = conditioning["prompt_attention_mask"]
        longest = int(mask.sum(1).max())
        embeds = conditioning["prompt_embeds"][:, -longest:].to(noisy_model_input.dtype)
        tokens, (height, width) = self._tokens(noisy_model_input), noisy_model_input.shape[2:]
        return {
            "hidden_states": torch.cat([tokens.new_zeros(len(tokens), longest, tokens.shape[2]), tokens], 1),
            "timestep": timesteps.to(noisy_model_input.dtype),
            **sequence(embeds, mask[:, -longest:], height, width),
        }

    def denoiser_output(self, output: Any, noisy_model_input: Tensor) -> Tensor:
        """noise − latents, as every other model of flow matching."""
        height, width = noisy_model_input.shape[2:]
        return -self._latents(output[:, -height * width :], height, width)


def sequence(embeds: Tensor, mask: Tensor, height: int, width: int) -> dict[str, Tensor]:
    """Text (B, L, D) and its mask, and a picture of so many tokens after it, as the transformer is told them: features,
    places in text, rows and columns, which tokens see each other, and what each holds."""
    places = image_ids(2 * height, 2 * width, mask.device).to(mask) + PICTURE_PLACES
    text, picture = (mask.cumsum(1) - 1) * mask, mask.new_ones(len(mask), len(places))
    return {
        "encoder_hidden_states": torch.cat([embeds, embeds.new_zeros(len(mask), len(places), embeds.shape[2])], 1),
        "position_ids": torch.cat([text[..., None].expand(-1, -1, 3), places.expand(len(mask), -1, -1)], 1),
        "segment_ids": torch.cat([torch.where(mask == 1, 1, -1), picture], 1),
        "indicator": torch.cat([torch.where(mask == 1, TEXT, NOTHING), PICTURE * picture], 1),
    }
