"""LoRA files of other tools, kohya's sd-scripts and ComfyUI among them, read under diffusers' names.

A key is perhaps some prefixes, a layer's name, by diffusers or as published, with . or _, and the part of the LoRA:

    lora_unet_, lora_transformer_, lycoris_     kohya, LyCORIS
    diffusion_model., model.diffusion_model.    ComfyUI
    base_model.model., transformer., unet.      peft, diffusers
    lora_te_, lora_te1_, …                      a text encoder's, kohya
    text_encoders.clip_l.transformer.           a text encoder's, ComfyUI

Of a published layer that is several of diffusers', each gets its rows of `up`, and of the rank what these rows use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from difftuning_control.adapters.lora_keys import OtherFormError, parts_of
from difftuning_control.adapters.native_names import (
    Published,
    encoder_layer,
    encoder_names,
    known_layers,
    plain_layers,
)
from difftuning_control.errors import UserError

BEFORE = ("lora_unet_", "lora_transformer_", "lycoris_", "base_model_model_", "diffusion_model_", "model_", "_")
"""What tools put before a denoiser's layer, with _ for ., beside the denoiser's own name."""


def read_foreign(tensors: dict[str, Tensor], pipe: Any, component: str) -> dict[str, Tensor]:
    """A LoRA under diffusers' names, `unet.<module>.lora_A.weight`, float32, with its scales made part of B.

    Args:
        tensors: of the file, under another tool's names.
        pipe: the pipeline that it is for.
        component: the denoiser's name in it.

    Raises:
        OtherFormError: if it is no plain LoRA, or not of this model.
    """
    parts, names = parts_of(tensors), _Names(pipe, component)
    layers = {prefix: plain_layers(getattr(pipe, prefix)) for prefix in names.modules}
    pairs: dict[str, Tensor] = {}
    for key, its in parts.items():
        prefix, published = names.find(key)
        down, up = its["down"].float(), its["up"].float()
        if "mid" in its:
            down = torch.einsum("rshw,si->rihw", its["mid"].float(), down.flatten(1))
        scale = float(its["alpha"]) / len(down) if "alpha" in its else 1.0
        rows = [_rows(layers[prefix][name]) for name in published.modules]
        if len(rows) > 1 and sum(rows) != len(up):
            raise OtherFormError(
                f"does not fit this model: it was made for {key} of {len(up)} rows, here it has {sum(rows)}"
            )
        for name, a, b in _split(published, rows, down, up * scale):
            a, b = _shaped(a, b, layers[prefix][name])
            place = f"{prefix}.{name}"
            if f"{place}.lora_A.weight" in pairs:
                raise OtherFormError(f"has more than one LoRA for {place}; give a file with one")
            pairs[f"{place}.lora_A.weight"], pairs[f"{place}.lora_B.weight"] = a.contiguous(), b.contiguous()
    if not pairs:
        raise OtherFormError("adds nothing, since every B in it is zero; give one that has trained")
    return pairs


def _rows(layer: Any) -> int:
    """Of its weight; that of a quantised one is packed."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.weight.shape[0]


def _shaped(a: Tensor, b: Tensor, layer: Any) -> tuple[Tensor, Tensor]:
    """A and B of a 1×1 convolution as a linear layer has them, or the other way round, as the layer here is."""
    if isinstance(layer, nn.Linear):
        is_small = a.shape[2:].numel() == b.shape[2:].numel() == 1
        return (a.flatten(1), b.flatten(1)) if is_small else (a, b)
    return tuple(t if t.ndim == 4 else t[:, :, None, None] for t in (a, b))  # type: ignore[return-value]


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


# --- names ----------------------------------------------------------------------------------------------------------


class _Names:
    """Every name, with _ for ., that a layer of a pipeline may have in a file."""

    def __init__(self, pipe: Any, component: str):
        self.component, denoiser = component, getattr(pipe, component)
        self.denoiser = {_flat(name): Published(name, (name,)) for name in plain_layers(denoiser)}
        for name in plain_layers(denoiser):  # as attention processors had them
            processor = name.replace(".to_out.0", ".to_out").replace(".to_", ".processor.to_")
            self.denoiser.setdefault(_flat(processor), Published(name, (name,)))
        try:
            published = known_layers(denoiser)
        except UserError:  # a model that no other tool knows
            published = []
        for layer in published:
            self.denoiser.setdefault(_flat(layer.name), layer)
        self.encoders = dict(_encoder_layers(pipe))
        self.modules = dict.fromkeys([component, *(part for part, _ in self.encoders.values())])

    def find(self, key: str) -> tuple[str, Published]:
        """Which module of the pipeline a layer is in, and which layers it is.

        Raises:
            OtherFormError: if it is none.
        """
        name = _flat(key)
        while name:
            if name in self.denoiser:
                return self.component, self.denoiser[name]
            if name in self.encoders:
                return self.encoders[name]
            before = (p for p in (*BEFORE, f"{self.component}_") if name.startswith(p))
            name = name.removeprefix(next(before, name))
        raise OtherFormError(f"does not fit this model: it has weights for {key}, which is no layer")


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _encoder_layers(pipe: Any) -> Iterator[tuple[str, tuple[str, Published]]]:
    """A text encoder's layers by their names in files; which encoder it is, and which layer."""
    named = encoder_names(pipe)
    for i, part in enumerate(("text_encoder", "text_encoder_2", "text_encoder_3"), 1):
        encoder, tools = getattr(pipe, part, None), named.get(part)
        if encoder is None:
            continue
        prefixes = [part]
        if tools is not None:
            prefixes += [tools[0], f"text_encoders_{tools[1]}_transformer"]
            prefixes += {("lora_te", 1): ["lora_te1"], ("lora_te3", 2): ["lora_te2"]}.get((tools[0], i), [])
        for name in plain_layers(encoder):
            theirs, own = encoder_layer(encoder, name), Published(name, (name,))
            for spelled in {theirs, name, *(_older_projections(n) for n in (theirs, name))}:
                yield from ((_flat(f"{prefix}_{spelled}"), (part, own)) for prefix in prefixes)


def _older_projections(name: str) -> str:
    """A projection of CLIP's attention as diffusers called it before peft: `to_q`."""
    head, _, last = name.rpartition(".")
    return f"{head}.to_{last.removesuffix('_proj')}" if head.endswith("self_attn") else name
