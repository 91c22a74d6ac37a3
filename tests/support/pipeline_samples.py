"""Tiny stock pipelines of every kind that there is a drop-in for, and how they are called."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from difftuning_control.families.tunable import make_tunable
from difftuning_control.pipelines import (
    DiffTuningControlNetPipeline,
    DiffTuningDiTPipeline,
    DiffTuningFluxControlNetPipeline,
    DiffTuningFluxPipeline,
    DiffTuningPipeline,
    DiffTuningSD3ControlNetPipeline,
    DiffTuningSD3Pipeline,
    DiffTuningXLControlNetPipeline,
    DiffTuningXLPipeline,
)
from support.tiny_models import tiny_dit, tiny_flux, tiny_sd3
from support.tiny_sd import tiny_pipeline, tiny_xl_pipeline

OURS = {
    "sd": DiffTuningPipeline,
    "sd-control": DiffTuningControlNetPipeline,
    "xl": DiffTuningXLPipeline,
    "xl-control": DiffTuningXLControlNetPipeline,
    "sd3": DiffTuningSD3Pipeline,
    "sd3-control": DiffTuningSD3ControlNetPipeline,
    "flux": DiffTuningFluxPipeline,
    "flux-control": DiffTuningFluxControlNetPipeline,
    "dit": DiffTuningDiTPipeline,
}
FILES = {
    "sd": "difftuning_sd",
    "sd-control": "difftuning_sd_controlnet",
    "xl": "difftuning_sdxl",
    "xl-control": "difftuning_sdxl_controlnet",
    "sd3": "difftuning_sd3",
    "sd3-control": "difftuning_sd3_controlnet",
    "flux": "difftuning_flux",
    "flux-control": "difftuning_flux_controlnet",
    "dit": "difftuning_dit",
}
EVERY = list(OURS)
UNETS = [kind for kind in EVERY if kind.startswith(("sd-", "xl")) or kind == "sd"]
TRANSFORMERS = [kind for kind in EVERY if kind not in UNETS]
MAKERS = {"sd": tiny_pipeline, "xl": tiny_xl_pipeline, "sd3": tiny_sd3, "flux": tiny_flux, "dit": tiny_dit}
CONTROLLED: dict[str, Any] = {
    "sd": StableDiffusionControlNetPipeline,
    "xl": StableDiffusionXLControlNetPipeline,
    "sd3": StableDiffusion3ControlNetPipeline,
    "flux": FluxControlNetPipeline,
}
MORE: dict[str, dict[str, Any]] = {"sd": {"requires_safety_checker": False}, "xl": {"add_watermarker": False}}
SIDE, STEPS = 16, 4


def plain(kind: str) -> str:
    """The kind without control."""
    return kind.removesuffix("-control")


def denoiser_of(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def controlnet(pipe: Any, seed: int = 5) -> Any:
    """A ControlNet for a tiny pipeline that already adds something."""
    torch.manual_seed(seed)
    config = dict(denoiser_of(pipe).config)  # into which `from_transformer` writes what it is given
    if hasattr(pipe, "unet"):
        found: Any = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8))
        zeros = [*found.controlnet_down_blocks, found.controlnet_mid_block, found.controlnet_cond_embedding.conv_out]
    elif type(pipe.transformer).__name__.startswith("SD3"):
        found = SD3ControlNetModel.from_transformer(pipe.transformer, num_layers=1, num_extra_conditioning_channels=0)
        zeros = [*found.controlnet_blocks, found.pos_embed_input.proj]
    else:
        heads = {"attention_head_dim": 8, "num_attention_heads": 4}
        found = FluxControlNetModel.from_transformer(pipe.transformer, num_layers=1, num_single_layers=1, **heads)
        zeros = [*found.controlnet_blocks, *found.controlnet_single_blocks, found.controlnet_x_embedder]
    denoiser_of(pipe).register_to_config(**{n: v for n, v in config.items() if n.startswith("num_")})
    for block in zeros:
        torch.nn.init.normal_(block.weight, std=0.3)
    return found


def stock(kind: str, seed: int = 0, nets: int = 1) -> Any:
    """A stock pipeline, quiet, and as it is when loaded: nothing is dropped by chance."""
    pipe: Any = MAKERS[plain(kind)](seed)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    if kind.endswith("control"):
        made = [controlnet(pipe, 5 + i) for i in range(nets)]
        one = made[0] if nets == 1 else made
        pipe = CONTROLLED[plain(kind)](**pipe.components, controlnet=one, **MORE.get(plain(kind), {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drop_in(kind: str, pipe: Any = None, **settings: Any) -> Any:
    """Ours around a stock pipeline."""
    found = OURS[kind].from_pipe(stock(kind) if pipe is None else pipe, **settings)
    found.set_progress_bar_config(disable=True)
    return found


def source_unet(kind: str, seed: int = 9) -> Any:
    return denoiser_of(stock(plain(kind), seed))


def source_of(kind: str, seed: int = 9) -> dict[str, Any]:
    """A pretrained denoiser under the name that ours takes it by."""
    return {"source_unet" if kind in UNETS else "source_transformer": source_unet(kind, seed)}


def condition(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), np.uint8))


def arguments(kind: str, count: int = 1, nets: int = 1, **given: Any) -> dict[str, Any]:
    """Of a call that draws `count` pictures, each from a generator of its own."""
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    if kind == "dit":
        found: dict[str, Any] = {"class_labels": [1, 3, 0, 2][:count]}
    else:
        prompts = ["red 1", "a blue square", "red", "dog"][:count]
        found = {"prompt": prompts, "height": SIDE, "width": SIDE}
    found |= {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "np", "generator": generators}
    if kind in TRANSFORMERS and kind != "dit":
        found["max_sequence_length"] = 16
    if plain(kind) == "flux":
        found["true_cfg_scale"] = 3.0
    if kind.endswith("control"):
        conditions = [[condition(7 * n + i) for i in range(count)] for n in range(nets)]
        image: Any = conditions[0] if nets == 1 else conditions
        if nets > 1 and kind in UNETS:
            one = count == 1 or kind == "xl-control"  # whose stock class takes one condition for all of a batch
            image = [c[0] for c in conditions] if one else [list(row) for row in zip(*conditions)]
        found["image" if kind in UNETS else "control_image"] = image
        if nets > 1 and kind in TRANSFORMERS:
            found["controlnet_conditioning_scale"] = [1.0] * nets
    return found | given


def draw(pipe: Any, kind: str, **given: Any) -> np.ndarray:
    if kind == "sd3-control":
        torch.manual_seed(0)  # by which the stock class draws a condition's latents
    return pipe(**arguments(kind, **given)).images


def add_adapter(module: Any, name: str, seed: int, targets: list[str] | None = None, **config: Any) -> None:
    """An adapter on a denoiser that changes what it predicts."""
    settings: Any = {"r": 2, "lora_alpha": 3, "target_modules": targets or ["to_q", "to_v", "to_out.0"], **config}
    make_tunable(module)
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
        [] if registry is None else list(registry.hooks),
        "forward" in vars(module),
        module.forward.__func__ if hasattr(module.forward, "__func__") else module.forward,
        [(n, p.requires_grad, p.detach().clone()) for n, p in module.named_parameters()],
    ]


def same_traces(one: list[Any], other: list[Any]) -> bool:
    pairs = zip(one[-1], other[-1], strict=True)
    return one[:-1] == other[:-1] and all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in pairs)
