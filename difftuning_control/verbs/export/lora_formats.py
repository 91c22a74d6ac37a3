"""LoRA in the key names of other tools. In each of them the layer is W + (alpha / r) · up · down.

    kohya     lora_unet_<diffusers' module, _ for .>.lora_down.weight (r, in, …), .lora_up.weight (out, r, …), .alpha ()
    comfyui   diffusion_model.<LDM's module>.lora_down.weight, …

LDM is the code that Stable Diffusion was published in, whose UNet counts its blocks through: `input_blocks.4.1` is the
attention of the fourth block of the encoder. The names follow from the UNet's configuration, so they are right for any
depth. kohya's sd-scripts trains SDXL on LDM's UNet, so there its names are `lora_unet_<LDM's module, _ for .>`.

References:
    https://github.com/kohya-ss/sd-scripts (networks/lora.py), https://github.com/comfyanonymous/ComfyUI (comfy/lora.py)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from difftuning_control.errors import UserError

BLOCKS = {
    "DownBlock2D": False,
    "CrossAttnDownBlock2D": True,
    "UpBlock2D": False,
    "CrossAttnUpBlock2D": True,
    "UNetMidBlock2DCrossAttn": True,
}
"""The blocks that LDM has too, and whether they attend."""

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
}
"""What lies in no block; sd-scripts trains and reads only what lies in one."""


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


def lora_layers(unet: Any, adapter: str) -> list[LoRALayer]:
    """The layers of an adapter that peft has injected into a UNet; alpha is such that alpha / r is peft's own scale.

    Raises:
        UserError: if it is no plain LoRA.
    """
    found: list[LoRALayer] = []
    for name, module in unet.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, LoraLayer) or getattr(module, "use_dora", {}).get(adapter, False):
            raise UserError(f"{name} has an adapter that is no plain LoRA; export it with --format diffusers.")
        down, up, scale = module.lora_A[adapter], module.lora_B[adapter], float(module.scaling[adapter])
        if down.bias is not None or up.bias is not None:
            raise UserError(f"the LoRA on {name} has a bias; export it with --format diffusers.")
        found.append(LoRALayer(name, down.weight.detach(), up.weight.detach(), scale * module.r[adapter]))
    return found


def kohya_tensors(layers: list[LoRALayer], config: Any) -> dict[str, Tensor]:
    """The layers under the names of kohya's sd-scripts.

    Args:
        config: the UNet's.

    Raises:
        UserError: for layers that sd-scripts would leave out.
    """
    _check_unet(config)
    outside = [layer.module for layer in layers if layer.module in OUTSIDE]
    if outside:
        raise UserError(
            f"sd-scripts would leave out the LoRA on {', '.join(outside)}, which lie in no block; export it with "
            "--format comfyui or diffusers."
        )
    is_sdxl = config.addition_embed_type == "text_time"
    names = ldm_names([layer.module for layer in layers], config) if is_sdxl else None
    return _tensors(
        {f"lora_unet_{(names[x.module] if names is not None else x.module).replace('.', '_')}": x for x in layers}
    )


def comfyui_tensors(layers: list[LoRALayer], config: Any) -> dict[str, Tensor]:
    """The layers under ComfyUI's own names.

    Args:
        config: the UNet's.

    Raises:
        UserError: if the UNet has blocks that LDM's has not.
    """
    _check_unet(config)
    names = ldm_names([layer.module for layer in layers], config)
    return _tensors({f"diffusion_model.{names[layer.module]}": layer for layer in layers})


def _check_unet(config: Any) -> None:
    if "down_block_types" not in config:
        raise UserError("kohya's and ComfyUI's names are known for UNets only; export with --format diffusers.")


def _tensors(layers: dict[str, LoRALayer]) -> dict[str, Tensor]:
    found = {}
    for name, layer in layers.items():
        found[f"{name}.lora_down.weight"] = layer.down
        found[f"{name}.lora_up.weight"] = layer.up
        found[f"{name}.alpha"] = torch.tensor(layer.alpha)
    return found


def ldm_names(modules: list[str], config: Any) -> dict[str, str]:
    """LDM's name of each of diffusers' modules.

    Args:
        config: the UNet's.

    Raises:
        UserError: if the UNet has blocks that LDM's has not.
    """
    places = _ldm_places(config)
    return {module: _ldm_name(module, places) for module in modules}


def _ldm_name(module: str, places: dict[str, str]) -> str:
    parts = module.split(".")
    for count in range(len(parts), 0, -1):
        place = places.get(".".join(parts[:count]))
        if place is not None:
            rest = ".".join(parts[count:])
            return ".".join(p for p in (place, RESNET[rest] if "resnets" in parts else rest) if p)
    raise UserError(f"LDM's UNet has no name for {module}; export with --format diffusers.")


def _ldm_places(config: Any) -> dict[str, str]:
    """Where LDM has each resnet, attention and sampler, and what lies in no block.

    An input block is a resnet with its attention, or a downsampler; an output block is a resnet with its attention,
    and the last one of a level has the upsampler too. The first input block is the first convolution.
    """
    down, up = list(config.down_block_types), list(config.up_block_types)
    unknown = [name for name in (*down, config.mid_block_type, *up) if name not in BLOCKS]
    if unknown:
        raise UserError(f"LDM's UNet has no block like {unknown[0]}; export with --format diffusers.")
    layers = config.layers_per_block
    depths = [layers] * len(down) if isinstance(layers, int) else list(layers)
    places, block = dict(OUTSIDE), 1
    for level, (kind, depth) in enumerate(zip(down, depths)):
        for i in range(depth):
            places[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{block}.0"
            if BLOCKS[kind]:
                places[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{block}.1"
            block += 1
        if level < len(down) - 1:
            places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{block}.0.op"
            block += 1
    for name, place in (("resnets.0", 0), ("attentions.0", 1), ("resnets.1", 2)):
        places[f"mid_block.{name}"] = f"middle_block.{place}"
    block = 0
    for level, (kind, depth) in enumerate(zip(up, reversed(depths))):
        for i in range(depth + 1):
            places[f"up_blocks.{level}.resnets.{i}"] = f"output_blocks.{block}.0"
            if BLOCKS[kind]:
                places[f"up_blocks.{level}.attentions.{i}"] = f"output_blocks.{block}.1"
            block += 1
        if level < len(up) - 1:
            sampler = 2 if BLOCKS[kind] else 1
            places[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{block - 1}.{sampler}.conv"
    return places
