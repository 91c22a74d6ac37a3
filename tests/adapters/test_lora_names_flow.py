"""LoRA of newer families in ComfyUI's names: its own map of a block, and what stock diffusers reads of such a file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.loaders import peft as diffusers_peft
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from difftuning_control.adapters.foreign import read_foreign
from difftuning_control.adapters.kinds import ADAPTER
from difftuning_control.adapters.native_names import known_layers, plain_layers
from difftuning_control.families.loading import family_of
from difftuning_control.verbs.export.lora_formats import comfyui_tensors, lora_layers
from support.flow_families import STOCK, need

BLOCKS: dict[str, dict[str, tuple[int, int]]] = {  # a block's keys and shapes in ComfyUI, at the tiny models' widths
    "z_image": {"layers.0.attention.qkv": (48, 16), "layers.0.attention.out": (16, 16)},
    "flux2_klein": {
        "double_blocks.0.img_attn.qkv": (48, 16),
        "double_blocks.0.img_attn.proj": (16, 16),
        "double_blocks.0.txt_attn.qkv": (48, 16),
        "double_blocks.0.txt_attn.proj": (16, 16),
    },
    "krea2": {
        "blocks.0.attn.wq": (16, 16),
        "blocks.0.attn.wk": (8, 16),
        "blocks.0.attn.wv": (8, 16),
        "blocks.0.attn.wo": (16, 16),
    },
    "chroma": {
        "double_blocks.0.img_attn.qkv": (96, 32),
        "double_blocks.0.img_attn.proj": (32, 32),
        "double_blocks.0.txt_attn.qkv": (96, 32),
        "double_blocks.0.txt_attn.proj": (32, 32),
    },
    "ideogram4": {"layers.0.attention.qkv": (48, 16), "layers.0.attention.o": (16, 16)},
    "qwen_image21": {f"transformer_blocks.0.attn.to_{part}": (16, 16) for part in ("q", "k", "v", "out.0")},
}
NAMED = {  # ComfyUI's other layers, which a LoRA on all layers has too
    "z_image": ("noise_refiner.0.feed_forward.w2", "context_refiner.0.attention.out", "layers.0.adaLN_modulation.0"),
    "flux2_klein": ("single_blocks.1.linear1", "single_blocks.0.linear2", "double_blocks.1.img_mlp.0", "img_in"),
    "krea2": ("blocks.1.mlp.gate", "txtfusion.refiner_blocks.0.attn.wq", "tproj.1", "txtmlp.3", "first", "last.linear"),
    "chroma": ("single_blocks.0.linear1", "single_blocks.0.linear2", "txt_in", "final_layer.linear"),
    "ideogram4": ("layers.1.feed_forward.w3", "layers.0.adaln_modulation", "input_proj", "final_layer.linear"),
    "qwen_image21": ("transformer_blocks.1.img_mlp.gate_up", "transformer_blocks.0.img_mlp.out", "modulation.1"),
}
READ_BY_DIFFUSERS = ("flux2_klein", "krea2", "ideogram4", "qwen_image21")  # of Z-Image it reads no fused layers


def tuned(name: str) -> Any:
    """A pipeline with a LoRA on what we train by default, that changes it much."""
    need(name)
    family = family_of(STOCK[name].make())
    config = LoraConfig(r=3, lora_alpha=3, target_modules=list(family.lora_targets))
    family.denoiser.add_adapter(config, adapter_name=ADAPTER)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in family.denoiser.named_parameters():
        if ".lora_" in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return family.pipe


def effects(transformer: Any) -> dict[str, Tensor]:
    """What the adapter adds to each layer's weights."""
    return {x.module: x.scale * x.up.flatten(1) @ x.down.flatten(1) for x in lora_layers(transformer, ADAPTER)}


@pytest.mark.sample("z_image", "krea2", "ideogram4")
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_has_the_names_and_shapes_that_comfyui_has(name):
    pipe = tuned(name)
    found = comfyui_tensors(lora_layers(pipe.transformer, ADAPTER), pipe.transformer)
    for key, (out, into) in BLOCKS[name].items():
        assert found[f"diffusion_model.{key}.lora_up.weight"].shape[0] == out, key
        assert found[f"diffusion_model.{key}.lora_down.weight"].shape[1] == into, key
    start = f"diffusion_model.{next(iter(BLOCKS[name])).rpartition('.0.')[0]}.0."
    named = {key.split(".lora_")[0].removesuffix(".alpha") for key in found if key.startswith(start)}
    assert named == {f"diffusion_model.{key}" for key in BLOCKS[name]}
    theirs = {layer.name for layer in known_layers(pipe.transformer)}
    assert set(NAMED[name]) <= theirs


@pytest.mark.sample("krea2")
@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "chroma"])
def test_every_layer_has_a_name(name):
    """None is missing in the map, whatever a LoRA is put on; Chroma's distilled guidance layer is never tuned."""
    need(name)
    transformer = STOCK[name].make().transformer
    named = [module for layer in known_layers(transformer) for module in layer.modules]
    assert len(named) == len(set(named))
    assert set(plain_layers(transformer)) == set(named)


@pytest.mark.sample("krea2")
@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_written_is_read_back(name):
    pipe = tuned(name)
    tensors = comfyui_tensors(lora_layers(pipe.transformer, ADAPTER), pipe.transformer)
    found = read_foreign(tensors, pipe, "transformer")
    assert found is not None
    read = {
        key.removesuffix(".lora_A.weight").removeprefix("transformer."): found[key.replace("lora_A", "lora_B")] @ value
        for key, value in found.items()
        if key.endswith("lora_A.weight")
    }
    torch.testing.assert_close(read, effects(pipe.transformer), atol=1e-5, rtol=1e-5)


@pytest.mark.sample("flux2_klein")
@pytest.mark.parametrize("name", READ_BY_DIFFUSERS)
def test_stock_diffusers_reads_the_file_by_a_map_of_its_own(name, tmp_path, monkeypatch):
    """It knows the published names too, with peft's ends: none is unexpected to it, and layers get what they had."""
    pipe = tuned(name)
    tensors = comfyui_tensors(lora_layers(pipe.transformer, ADAPTER), pipe.transformer)
    ends = {"lora_down": "lora_A", "lora_up": "lora_B"}
    renamed = {k.replace(e, ends[e]): t.contiguous() for k, t in tensors.items() for e in ends if e in k}
    assert all(
        float(t) == len(tensors[k.replace("alpha", "lora_down.weight")]) for k, t in tensors.items() if "alpha" in k
    )
    save_file(renamed, tmp_path / "lora.safetensors")
    base, warned = STOCK[name].make(), list[str]()
    monkeypatch.setattr(diffusers_peft.logger, "warning", lambda text, *_: warned.append(text))
    base.load_lora_weights(tmp_path / "lora.safetensors", adapter_name=ADAPTER)
    assert warned == []
    torch.testing.assert_close(effects(base.transformer), effects(pipe.transformer), atol=1e-5, rtol=1e-5)
