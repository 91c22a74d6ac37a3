"""Tiny stock pipelines of every kind that there is a drop-in for, and how they are called."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from conftest import tiny_pipeline, tiny_xl_pipeline
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from difftuning_control.pipelines import (
    DiffTuningControlNetPipeline,
    DiffTuningPipeline,
    DiffTuningXLControlNetPipeline,
    DiffTuningXLPipeline,
)

OURS = {
    "sd": DiffTuningPipeline,
    "sd-control": DiffTuningControlNetPipeline,
    "xl": DiffTuningXLPipeline,
    "xl-control": DiffTuningXLControlNetPipeline,
}
FILES = {
    "sd": "difftuning_sd",
    "sd-control": "difftuning_sd_controlnet",
    "xl": "difftuning_sdxl",
    "xl-control": "difftuning_sdxl_controlnet",
}
SIDE, STEPS = 16, 4


def controlnet(pipe: Any, seed: int = 5) -> ControlNetModel:
    """A ControlNet for a tiny pipeline that already adds something."""
    torch.manual_seed(seed)
    found = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8))
    for block in [*found.controlnet_down_blocks, found.controlnet_mid_block, found.controlnet_cond_embedding.conv_out]:
        torch.nn.init.normal_(block.weight, std=0.3)
    return found


def stock(kind: str, seed: int = 0, nets: int = 1) -> Any:
    """A stock pipeline, quiet."""
    pipe: Any = (tiny_xl_pipeline if kind.startswith("xl") else tiny_pipeline)(seed)
    if kind.endswith("control"):
        made = [controlnet(pipe, 5 + i) for i in range(nets)]
        one = made[0] if nets == 1 else made
        if kind == "xl-control":
            pipe = StableDiffusionXLControlNetPipeline(**pipe.components, controlnet=one, add_watermarker=False)
        else:
            pipe = StableDiffusionControlNetPipeline(**pipe.components, controlnet=one, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drop_in(kind: str, pipe: Any = None, **settings: Any) -> Any:
    """Ours around a stock pipeline."""
    found = OURS[kind].from_pipe(stock(kind) if pipe is None else pipe, **settings)
    found.set_progress_bar_config(disable=True)
    return found


def source_unet(kind: str, seed: int = 9) -> UNet2DConditionModel:
    return (tiny_xl_pipeline if kind.startswith("xl") else tiny_pipeline)(seed).unet


def condition(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), np.uint8))


def arguments(kind: str, count: int = 1, nets: int = 1, **given: Any) -> dict[str, Any]:
    """Of a call that draws `count` pictures, each from a generator of its own."""
    prompts = ["red 1", "a blue square", "red", "dog"][:count]
    found: dict[str, Any] = {
        "prompt": prompts, "height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "guidance_scale": 3.0,
        "output_type": "np", "generator": [torch.Generator().manual_seed(i) for i in range(count)],
    }  # fmt: skip
    if kind.endswith("control"):
        conditions = [[condition(7 * n + i) for i in range(count)] for n in range(nets)]
        found["image"] = conditions[0] if nets == 1 else conditions
        if nets > 1:
            one = count == 1 or kind == "xl-control"  # whose stock class takes one condition for all of a batch
            found["image"] = [c[0] for c in conditions] if one else [list(row) for row in zip(*conditions)]
    return found | given


def draw(pipe: Any, kind: str, **given: Any) -> np.ndarray:
    return pipe(**arguments(kind, **given)).images


def add_adapter(module: Any, name: str, seed: int, targets: list[str] | None = None, **config: Any) -> None:
    """An adapter on a denoiser that changes what it predicts."""
    settings: Any = {"r": 2, "lora_alpha": 3, "target_modules": targets or ["to_q", "to_v", "to_out.0"], **config}
    module.add_adapter(LoraConfig(**settings), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in module.named_parameters():
        if f"lora_B.{name}" in key or f"lora_A.{name}" in key:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)


def adapter_file(module: Any, name: str) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(module, adapter_name=name)


def traces(module: Any) -> list[Any]:
    """All that a call could leave behind in a module."""
    layers = [m for m in module.modules() if hasattr(m, "lora_A")]
    registry = getattr(module, "_diffusers_hook", None)
    return [
        [(m._active_adapter, m.disable_adapters, dict(m.scaling)) for m in layers],
        registry is None or list(registry.hooks),
        "forward" in vars(module),
        module.forward.__func__ if hasattr(module.forward, "__func__") else module.forward,
        [(n, p.requires_grad, p.detach().clone()) for n, p in module.named_parameters()],
    ]


def same_traces(one: list[Any], other: list[Any]) -> bool:
    pairs = zip(one[-1], other[-1], strict=True)
    return one[:-1] == other[:-1] and all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in pairs)
