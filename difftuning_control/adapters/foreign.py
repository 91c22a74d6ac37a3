"""LoRA files of other tools, kohya's sd-scripts and ComfyUI among them, read under diffusers' names.

A key is a prefix, a layer's name in one of the forms below, and the part of the LoRA:

    lora_unet_, lora_transformer_     diffusers' or the published name, with _ for .
    diffusion_model.                  the published name
    lora_te_, lora_te1_, …            a text encoder's name, with _ for .
    text_encoders.clip_l.transformer. a text encoder's name

Of a published layer that is several of diffusers', each gets its rows of `up`, and of the rank what these rows use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from difftuning_control.adapters.native_names import (
    Published,
    encoder_layer,
    encoder_names,
    known_layers,
    plain_layers,
)
from difftuning_control.errors import UserError

PARTS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".alpha": "alpha",
}


PREFIXES = ("lora_unet_", "lora_transformer_", "lora_te", "diffusion_model.", "text_encoders.")


def is_foreign(keys: Iterable[str]) -> bool:
    """Whether a file has another tool's names."""
    return all(key.startswith(PREFIXES) for key in keys)


def read_foreign(tensors: dict[str, Tensor], pipe: Any, component: str) -> dict[str, Tensor] | None:
    """A LoRA under diffusers' names, `unet.<module>.lora_A.weight`, with its scales made part of B.

    Args:
        tensors: of the file, under another tool's names.
        pipe: the pipeline that it is for.
        component: the denoiser's name in it.

    Returns:
        None for a file of another form, or with layers that this model has not; diffusers may know it.
    """
    parts = _parts(tensors)
    names = dict(_names(pipe, component)) if parts is not None else {}
    if parts is None or not parts.keys() <= names.keys():
        return None
    pairs: dict[str, Tensor] = {}
    for key, its in parts.items():
        prefix, published = names[key]
        if not {"down", "up"} <= its.keys():
            return None
        down, up = its["down"].float(), its["up"].float()
        scale = float(its["alpha"]) / len(down) if "alpha" in its else 1.0
        sizes = plain_layers(getattr(pipe, prefix))
        rows = [sizes[name].weight.shape[0] for name in published.modules]
        if len(rows) > 1 and sum(rows) != len(up):
            return None
        for name, a, b in _split(published, rows, down, up * scale):
            pairs[f"{prefix}.{name}.lora_A.weight"], pairs[f"{prefix}.{name}.lora_B.weight"] = a, b
    return pairs


def _parts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]] | None:
    """The tensors of each layer; None where some are no plain LoRA's."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        end = next((end for end in PARTS if key.endswith(end)), None)
        if end is None:
            return None
        layers.setdefault(key.removesuffix(end), {})[PARTS[end]] = tensor
    return layers


def _names(pipe: Any, component: str) -> Iterator[tuple[str, tuple[str, Published]]]:
    """Every name that a layer of the pipeline may have in a file; which module it is in, and which layers it is."""
    denoiser = getattr(pipe, component)
    wanted = list(plain_layers(denoiser))
    try:
        published = known_layers(denoiser)
    except UserError:  # a model that no other tool knows
        published = []
    for name in wanted:
        own = Published(name, (name,))
        for prefix in ("lora_unet", "lora_transformer"):
            yield f"{prefix}_{name.replace('.', '_')}", (component, own)
    for layer in published:
        yield f"lora_unet_{layer.name.replace('.', '_')}", (component, layer)
        yield f"diffusion_model.{layer.name}", (component, layer)
    for part, (kohya, comfyui) in encoder_names(pipe).items():
        encoder = getattr(pipe, part, None)
        for name in plain_layers(encoder) if encoder is not None else ():
            theirs, own = encoder_layer(encoder, name), Published(name, (name,))
            yield f"{kohya}_{theirs.replace('.', '_')}", (part, own)
            yield f"text_encoders.{comfyui}.transformer.{theirs}", (part, own)


def _split(published: Published, rows: list[int], down: Tensor, up: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A and B of each of diffusers' layers; none for one whose rows of B are all zero, beside others."""
    if published.is_swapped:
        up = torch.cat(up.chunk(2)[::-1])
    if len(published.modules) == 1:
        yield published.modules[0], down, up
        return
    for name, b in zip(published.modules, up.split(rows)):
        used = b.flatten(1).any(0) if b.ndim == 2 else torch.ones(b.shape[1], dtype=torch.bool)
        if bool(used.any()):
            yield name, down[used].contiguous(), b[:, used].contiguous()
