"""What is peculiar to the stock pipelines of the families of 2025 and 2026, for tests that all of them share."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from difftuning_control.families.loading import FAMILIES
from support.drawing import PROMPTS, generators
from support.marks import need_pipeline
from support.tiny_flow import (
    tiny_chroma,
    tiny_flux2,
    tiny_flux2_klein,
    tiny_ideogram4,
    tiny_krea2,
    tiny_qwen_image,
    tiny_qwen_image21,
    tiny_z_image,
)


@dataclass(frozen=True)
class Stock:
    """A family as its stock pipeline shows it.

    Args:
        make: the tiny pipeline.
        pipeline: its class.
        guidance: arguments of a call of so many rows for guidance at a scale of which 1 is none.
        read: of a call of the transformer (args, kwargs, output) noisy latents, timesteps and prediction, as `predict`
            has them.
        write: the transformer's first output for a prediction.
        apart: whether the rows of the empty prompt are a second call; else they follow in the same.
        embedded: whether the model is told the scale instead.
        beside: whether a second transformer has those rows, which is told no prompt.
        alone: whether the stock pipeline gives a row what depends on the other prompts' lengths.
        cuts: whether the stock pipeline takes `max_sequence_length`.
        side: of the picture, in pixels.
        tokens: of a prompt; fewer than usual, which saves time.
    """

    make: Callable[..., Any]
    pipeline: str
    guidance: Callable[[float, int], dict[str, Any]]
    read: Callable[[tuple, dict, Any], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    write: Callable[[torch.Tensor], Any]
    apart: bool
    embedded: bool = False
    beside: bool = False
    alone: bool = False
    cuts: bool = True
    side: int = 16
    tokens: int = 64

    @property
    def limits(self) -> dict[str, int]:
        """How many tokens of a prompt the stock pipeline is told to read."""
        return {"max_sequence_length": self.tokens} if self.cuts else {}


def read_z_image(args, kwargs, out):
    return torch.stack(args[0]).squeeze(2), args[1], -torch.stack(out[0]).squeeze(2)


def write_z_image(prediction):
    return list(-prediction.unsqueeze(2))


def packed(latents):
    """(B, C, h, w) in squares of four as tokens."""
    rows, channels, height, width = latents.shape
    squares = latents.reshape(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(rows, height * width // 4, 4 * channels)


def unpacked(tokens):
    """Of a square picture."""
    rows, count, channels = tokens.shape
    side = int(count**0.5)
    squares = tokens.reshape(rows, side, side, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(rows, channels // 4, 2 * side, 2 * side)


def read_packed(args, kwargs, out):
    return unpacked(kwargs["hidden_states"]), kwargs["timestep"], unpacked(out[0])


def read_squares(args, kwargs, out):
    """FLUX.2's tokens are squares of four already."""
    side = int(kwargs["hidden_states"].shape[1] ** 0.5)
    noisy, found = (t.transpose(1, 2).unflatten(2, (side, side)) for t in (kwargs["hidden_states"], out[0]))
    return noisy, kwargs["timestep"], found


def write_squares(prediction):
    return prediction.flatten(2).transpose(1, 2)


def read_ideogram4(args, kwargs, out):
    """After the text; a token's channels are those of each place in its square in turn."""
    tokens = (kwargs["hidden_states"][:, 64:], -out[0][:, 64:])
    rows, count, width = tokens[0].shape
    side = int(count**0.5)
    shape = (rows, side, side, 4, width // 4)
    noisy, found = (t.reshape(shape).permute(0, 4, 3, 1, 2).reshape(rows, width, side, side) for t in tokens)
    return noisy, kwargs["timestep"], found


def write_ideogram4(prediction):
    rows, channels, height, width = prediction.shape
    places = prediction.reshape(rows, channels // 4, 4, height, width).permute(0, 3, 4, 2, 1)
    tokens = places.reshape(rows, height * width, channels)
    return torch.cat([tokens.new_zeros(rows, 64, channels), -tokens], 1)


def read_end(args, kwargs, out):
    """Single latents; the picture's are the end of what the transformer gives, after the prompt's."""
    tokens = kwargs["hidden_states"]
    side = int(tokens.shape[1] ** 0.5)
    noisy, found = (t.transpose(1, 2).unflatten(2, (side, side)) for t in (tokens, out[0][:, -tokens.shape[1] :]))
    return noisy, kwargs["timestep"], found


def told_scale(w, rows):
    return {"guidance_scale": w}


def told_negative(w, rows):
    return {"true_cfg_scale": w, "negative_prompt": [""] * rows}


STOCK = {
    "z_image": Stock(
        tiny_z_image,
        "ZImagePipeline",
        lambda w, rows: {"guidance_scale": max(w - 1, 0.0)},
        read_z_image,
        write_z_image,
        apart=False,
    ),
    "qwen_image": Stock(
        tiny_qwen_image,
        "QwenImagePipeline",
        told_negative,
        read_packed,
        packed,
        apart=True,
    ),
    "qwen_image21": Stock(
        tiny_qwen_image21,
        "QwenImage21Pipeline",
        told_negative,
        read_end,
        write_squares,
        apart=True,
        alone=True,
        cuts=False,
        side=64,
    ),
    "flux2_klein": Stock(tiny_flux2_klein, "Flux2KleinPipeline", told_scale, read_squares, write_squares, apart=True),
    "flux2": Stock(
        tiny_flux2, "Flux2Pipeline", told_scale, read_squares, write_squares, apart=False, embedded=True, tokens=512
    ),
    "krea2": Stock(
        tiny_krea2,
        "Krea2Pipeline",
        lambda w, rows: {"guidance_scale": max(w - 1, 0.0)},
        read_packed,
        packed,
        apart=True,
    ),
    "chroma": Stock(tiny_chroma, "ChromaPipeline", told_scale, read_packed, packed, apart=True),
    "ideogram4": Stock(
        tiny_ideogram4,
        "Ideogram4Pipeline",
        lambda w, rows: {"guidance_scale": w, "guidance_schedule": None},
        read_ideogram4,
        write_ideogram4,
        apart=False,
        beside=True,
    ),
}


def shorten(monkeypatch) -> None:
    """Have our families encode as many tokens as `Stock` says."""
    for stock in STOCK.values():
        if hasattr(diffusers, stock.pipeline):
            module, name = FAMILIES[stock.pipeline]
            kind = getattr(importlib.import_module(f"difftuning_control.families.{module}"), name)
            monkeypatch.setattr(kind, "text_length", stock.tokens)


def need(name: str) -> None:
    """Skip the test of a family where the installed diffusers does not have it."""
    need_pipeline(STOCK[name].pipeline)


def recorded(stock: Stock, pipe, steps: int, scale: float, prompts=PROMPTS, **settings):
    """What the transformer was given and gave in every call of a real pipeline call, and the pictures on white."""
    groups = [[i] for i in range(len(prompts))] if stock.alone else [[*range(len(prompts))]]
    found = [_recorded(stock, pipe, steps, scale, {i: prompts[i] for i in rows}, settings) for rows in groups]
    calls = [tuple(torch.cat(parts) for parts in zip(*rows)) for rows in zip(*(calls for calls, _ in found))]
    pictures = torch.cat([pictures for _, pictures in found])
    if pictures.shape[1] == 4:
        pictures = pictures[:, :3] * pictures[:, 3:] + 1 - pictures[:, 3:]
    return calls, pictures


def _recorded(stock: Stock, pipe, steps: int, scale: float, prompts: dict[int, str], settings: dict[str, Any]):
    calls = []

    def keep(module, args, kwargs, out):
        calls.append(stock.read(args, kwargs, out))

    handle = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    pictures = pipe(
        prompt=list(prompts.values()),
        height=stock.side,
        width=stock.side,
        num_inference_steps=steps,
        generator=generators(*prompts),
        output_type="pt",
        **stock.limits,
        **stock.guidance(scale, len(prompts)),
        **settings,
    ).images
    handle.remove()
    return calls, pictures
