"""What LDM, the code that Stable Diffusion was published in, calls each layer of a UNet.

It counts its blocks through: `input_blocks.4.1` is the attention of the fourth block of the encoder. The names follow
from the UNet's configuration, so they are right for any depth.
"""

from __future__ import annotations

from typing import Any

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
"""What lies in no block of LDM's."""


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
