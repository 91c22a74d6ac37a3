"""LoRA files as other tools write them, of random values, and what they change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from difftuning_control.adapters.attached import layers_of
from difftuning_control.adapters.kinds import ADAPTER
from difftuning_control.adapters.native_names import plain_layers

KOHYA, PEFT = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")
NAMED = ("lora_A.default.weight", "lora_B.default.weight")
OLDER = ("lora.down.weight", "lora.up.weight")
# what stands before a layer's name, whether it has _ for ., and what its parts are called
SPELLINGS = {
    "kohya": ("lora_unet_", True, KOHYA),
    "kohya-peft": ("lora_unet_", True, PEFT),
    "lycoris": ("lycoris_", True, KOHYA),
    "onetrainer": ("lora_transformer_", True, KOHYA),
    "comfyui": ("diffusion_model.", False, PEFT),
    "comfyui-kohya": ("diffusion_model.", False, KOHYA),
    "ldm": ("model.diffusion_model.", False, PEFT),
    "peft": ("base_model.model.", False, PEFT),
    "peft-inside": ("base_model.model.{}.", False, PEFT),
    "named": ("{}.", False, NAMED),
    "kohya-parts": ("{}.", False, KOHYA),
    "older": ("{}.", False, OLDER),
    "bare": ("", False, PEFT),
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")
Layers = dict[str, tuple[Tensor, Tensor]]


def random_lora(module: Any, ends: tuple[str, ...] = ATTENTION, rank: int = 2) -> Layers:
    """A and B of layers, by name; every second one has twice the rank."""
    generator, found = torch.Generator().manual_seed(0), Layers()
    for i, (name, layer) in enumerate((n, x) for n, x in plain_layers(module).items() if n.endswith(ends)):
        r, (out, *into) = rank * (1 + i % 2), layer.weight.shape
        ones = (1,) * (len(into) - 1)
        a, b = torch.randn(r, *into, generator=generator), torch.randn(out, r, *ones, generator=generator)
        found[name] = (a, b)
    return found


def spelled(lora: Layers, spelling: str, component: str, alpha: float | None = None) -> dict[str, Tensor]:
    before, flat, (down, up) = SPELLINGS[spelling]
    tensors = {}
    for name, (a, b) in lora.items():
        key = before.format(component) + (name.replace(".", "_") if flat else name)
        tensors |= {f"{key}.{down}": a, f"{key}.{up}": b}
        tensors |= {} if alpha is None else {f"{key}.alpha": torch.tensor(alpha)}
    return tensors


def expected(lora: Layers, alpha: float | None = None) -> dict[str, Tensor]:
    """What each layer's weight changes by."""
    scales = {name: 1.0 if alpha is None else alpha / len(a) for name, (a, _) in lora.items()}
    products = {name: b.flatten(1) @ a.flatten(1) for name, (a, b) in lora.items()}
    return {name: scales[name] * product for name, product in products.items()}


def updates(module: Any) -> dict[str, Tensor]:
    """What an adapter adds to each layer's weight, by name."""
    mine = set(layers_of(module, ADAPTER))
    found = {n: m.get_delta_weight(ADAPTER).detach().flatten(1) for n, m in module.named_modules() if m in mine}
    return found


def written(tensors: dict[str, Tensor], folder: Path, metadata: dict[str, str] | None = None) -> Path:
    path = folder / "lora.safetensors"
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path, metadata)
    return path
