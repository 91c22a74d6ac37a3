"""LoRA in the key names of other tools. In each of them the layer is W + (alpha / r) · up · down.

    kohya     lora_unet_<module, _ for .>.lora_down.weight (r, in, …), .lora_up.weight (out, r, …), .alpha ()
    comfyui   diffusion_model.<published module>.lora_down.weight, …

`native_names` has the published modules. kohya's sd-scripts trains SDXL and the transformers on the published code, so
there its names are those; on other UNets they are diffusers'. Where several of diffusers' layers are one published
layer, their LoRAs become one whose rank is the sum: the downs below each other, the ups in blocks along the diagonal.

References:
    https://github.com/kohya-ss/sd-scripts (networks/lora.py, lora_flux.py, lora_sd3.py, lora_lumina.py),
    https://github.com/comfyanonymous/ComfyUI (comfy/lora.py)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from difftuning_control.adapters.ldm_names import OUTSIDE
from difftuning_control.adapters.native_names import (
    Published,
    encoder_layer,
    encoder_names,
    plain_layers,
    published_layers,
)
from difftuning_control.errors import UserError

KOHYA = {
    "FluxTransformer2DModel": ("final_layer",),
    "ChromaTransformer2DModel": ("final_layer",),
    "SD3Transformer2DModel": (),
    "Lumina2Transformer2DModel": ("x_embedder", "t_embedder", "cap_embedder"),
}
"""The transformers that sd-scripts knows, and which of their published layers it leaves out."""


@dataclass(frozen=True)
class LoRALayer:
    """One module's update (alpha / r) · up · down.

    Args:
        module: diffusers' name of it.
        down: (r, in) or (r, in, kh, kw).
        up: (out, r) or (out, r, 1, 1).
    """

    module: str
    down: Tensor
    up: Tensor
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / len(self.down)


def lora_layers(model: Any, adapter: str) -> list[LoRALayer]:
    """The layers of an adapter that peft has injected into a model; alpha is such that alpha / r is peft's own scale.

    Raises:
        UserError: if it is no plain LoRA.
    """
    layers: list[LoRALayer] = []
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, LoraLayer) or getattr(module, "use_dora", {}).get(adapter, False):
            raise UserError(f"{name} has an adapter that is no plain LoRA; export it with --format diffusers.")
        down, up, scale = module.lora_A[adapter], module.lora_B[adapter], float(module.scaling[adapter])
        if down.bias is not None or up.bias is not None:
            raise UserError(f"the LoRA on {name} has a bias; export it with --format diffusers.")
        layers.append(LoRALayer(name, down.weight.detach(), up.weight.detach(), scale * module.r[adapter]))
    return layers


def kohya_tensors(layers: Sequence[LoRALayer], denoiser: Any) -> dict[str, Tensor]:
    """The layers of a denoiser's LoRA under the names of kohya's sd-scripts.

    Raises:
        UserError: for models that sd-scripts does not know, and layers that it would leave out.
    """
    if "down_block_types" in denoiser.config:
        return _kohya_unet(layers, denoiser)
    name = type(unwrap_module(denoiser)).__name__
    if name not in KOHYA:
        raise UserError(
            f"sd-scripts has no {name} (it has UNets, {', '.join(KOHYA)}); export with --format comfyui or diffusers."
        )
    published = _published(layers, denoiser)
    _refuse_left_out([theirs for theirs in published if theirs.startswith(KOHYA[name])] if KOHYA[name] else [])
    return _tensors({f"lora_unet_{theirs.replace('.', '_')}": layer for theirs, layer in published.items()})


def _kohya_unet(layers: Sequence[LoRALayer], unet: Any) -> dict[str, Tensor]:
    _refuse_left_out([layer.module for layer in layers if layer.module in OUTSIDE])
    named = {layer.module: layer for layer in layers}
    published_layers(unet, list(named))  # refuses blocks that LDM has not
    if unet.config.addition_embed_type == "text_time":
        named = _published(layers, unet)
    return _tensors({f"lora_unet_{name.replace('.', '_')}": layer for name, layer in named.items()})


def _refuse_left_out(outside: list[str]) -> None:
    if outside:
        raise UserError(
            f"sd-scripts would leave out the LoRA on {', '.join(outside)}, which lie in no block; export it with "
            "--format comfyui or diffusers."
        )


def comfyui_tensors(layers: Sequence[LoRALayer], denoiser: Any) -> dict[str, Tensor]:
    """The layers of a denoiser's LoRA under ComfyUI's own names.

    Raises:
        UserError: for models whose names are not known.
    """
    return _tensors({f"diffusion_model.{name}": layer for name, layer in _published(layers, denoiser).items()})


def encoder_tensors(layers: Mapping[str, Sequence[LoRALayer]], pipe: Any, kohya: bool) -> dict[str, Tensor]:
    """The layers of text encoders' LoRAs, by diffusers' names of the encoders.

    Raises:
        UserError: for text encoders that the tools do not know.
    """
    names, tensors = encoder_names(pipe), dict[str, LoRALayer]()
    for component, its in layers.items():
        if its and component not in names:
            raise UserError(f"other tools have no name for the {component} of a {type(pipe).__name__}; use diffusers.")
        for layer in its:
            prefix, module = names[component]
            name = encoder_layer(getattr(pipe, component), layer.module)
            key = f"{prefix}_{name.replace('.', '_')}" if kohya else f"text_encoders.{module}.transformer.{name}"
            tensors[key] = layer
    return _tensors(tensors)


# --- published layers -----------------------------------------------------------------------------------------------


def _published(layers: Sequence[LoRALayer], denoiser: Any) -> dict[str, LoRALayer]:
    """One LoRA for each published layer, by its name."""
    given, sizes = {layer.module: layer for layer in layers}, plain_layers(denoiser)
    return {p.name: _joined(p, given, sizes) for p in published_layers(denoiser, list(given))}


def _joined(published: Published, given: Mapping[str, LoRALayer], sizes: Mapping[str, Any]) -> LoRALayer:
    its = [given[name] for name in published.modules if name in given]
    if len(published.modules) == 1:
        (layer,) = its
        up = torch.cat(layer.up.chunk(2)[::-1]) if published.is_swapped else layer.up
        return LoRALayer(published.name, layer.down, up, layer.alpha)
    rank = sum(len(layer.down) for layer in its)
    scales = {layer.scale for layer in its}
    scale = scales.pop() if len(scales) == 1 else 1.0  # different ones become part of the ups
    rows = [sizes[name].weight.shape[0] for name in published.modules]
    up = its[0].up.new_zeros(sum(rows), rank)
    row = column = 0
    for name, size in zip(published.modules, rows):
        if name in given:
            layer = given[name]
            factor = 1.0 if layer.scale == scale else layer.scale / scale
            up[row : row + size, column : column + len(layer.down)] = layer.up * factor
            column += len(layer.down)
        row += size
    return LoRALayer(published.name, torch.cat([layer.down for layer in its]), up, scale * rank)


def _tensors(layers: Mapping[str, LoRALayer]) -> dict[str, Tensor]:
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_down.weight"] = layer.down
        tensors[f"{name}.lora_up.weight"] = layer.up
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha)
    return tensors
