"""Stock pipelines of other tasks and families than the drop-ins': tiny, seeded, and how they are called.

`made(name)` gives one; `inputs(name)` what its call takes. Those without a text encoder here are given embeddings.
"""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from support.pipeline_samples import MORE, SIDE, condition, controlnet, stock
from support.tiny_models import tiny_lumina2, tiny_pixart, tiny_sana, tiny_vae

STEPS = 4
BASED: dict[str, tuple[str, str]] = {
    "StableDiffusionImg2ImgPipeline": ("sd", "image"),
    "StableDiffusionInpaintPipeline": ("sd", "mask"),
    "StableDiffusionControlNetImg2ImgPipeline": ("sd", "image control"),
    "StableDiffusionControlNetInpaintPipeline": ("sd", "mask control"),
    "StableDiffusionXLImg2ImgPipeline": ("xl", "image"),
    "StableDiffusionXLInpaintPipeline": ("xl", "mask"),
    "StableDiffusionXLControlNetImg2ImgPipeline": ("xl", "image control"),
    "StableDiffusionXLControlNetInpaintPipeline": ("xl", "mask control"),
    "StableDiffusion3Img2ImgPipeline": ("sd3", "image"),
    "StableDiffusion3InpaintPipeline": ("sd3", "mask"),
    "FluxImg2ImgPipeline": ("flux", "image"),
    "FluxInpaintPipeline": ("flux", "mask"),
    "FluxKontextPipeline": ("flux", "reference"),
}
"""Pipelines of components that there are tiny ones of, and what they take."""

OTHERS = {
    "ZImagePipeline": "",
    "ZImageImg2ImgPipeline": "image",
    "ZImageInpaintPipeline": "mask",
    "QwenImagePipeline": "",
    "QwenImageImg2ImgPipeline": "image",
    "QwenImageInpaintPipeline": "mask",
    "ChromaPipeline": "",
    "ChromaImg2ImgPipeline": "image",
    "Lumina2Pipeline": "",
    "PixArtSigmaPipeline": "",
    "SanaPipeline": "",
}
EVERY = [*BASED, *OTHERS]
LARGER = {"SanaPipeline": 32, "Lumina2Pipeline": 64, "PixArtSigmaPipeline": 16}
TRUE_CFG = ("Flux", "Qwen")


def made(name: str, seed: int = 0) -> Any:
    """A stock pipeline by the name of its class; without it in an older diffusers the test is skipped."""
    if name not in dir(diffusers):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    if name in BASED:
        kind, takes = BASED[name]
        torch.manual_seed(seed)
        base = stock(kind, seed)
        more = {**MORE.get(kind, {})}
        components = dict(base.components)
        if name == "StableDiffusion3InpaintPipeline":
            components |= _of_16_channels(base)
        if "control" in takes:
            components["controlnet"] = controlnet(base)
        pipe = getattr(diffusers, name)(**components, **more)
    else:
        pipe = {"Z": _z_image, "Q": _qwen_image, "C": _chroma}.get(name[0], _stock_of)(name, seed)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _of_16_channels(base: Any) -> dict[str, Any]:
    """The modules of an SD3 that its inpainting pipeline takes."""
    settings = {k: v for k, v in base.vae.config.items() if not k.startswith("_")}
    vae = diffusers.AutoencoderKL(**{**settings, "latent_channels": 16})
    settings = {k: v for k, v in base.transformer.config.items() if not k.startswith("_")}
    transformer = diffusers.SD3Transformer2DModel(**{**settings, "in_channels": 16, "out_channels": 16})
    return {"vae": vae, "transformer": transformer}


def _stock_of(name: str, seed: int) -> Any:
    return {"SanaPipeline": tiny_sana, "Lumina2Pipeline": tiny_lumina2, "PixArtSigmaPipeline": tiny_pixart}[name](seed)


def _spread(module: torch.nn.Module) -> Any:
    """Where a class leaves weights at a constant, or unset."""
    for parameter in module.parameters():
        if parameter.numel() == 1 or not parameter.std() > 0 or "pad_token" in str(parameter.shape):
            parameter.data = torch.randn(parameter.shape) * 0.1
    return module


def _z_image(name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[600, 32, 32],
    )
    for pad in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(pad)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return getattr(diffusers, name)(scheduler, tiny_vae(0.06), None, None, _spread(transformer))


def _qwen_image(name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return getattr(diffusers, name)(scheduler, vae, None, None, transformer)


def _chroma(name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
        approximator_hidden_dim=16,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return getattr(diffusers, name)(scheduler, tiny_vae(0.06), None, None, transformer)


def inputs(name: str, **given: Any) -> dict[str, Any]:
    """What a guided call takes, always the same."""
    takes = BASED[name][1] if name in BASED else OTHERS[name]
    side = LARGER.get(name, SIDE)
    found: dict[str, Any] = {
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(0),
        **_prompts(name),
    }
    if name not in ("StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"):  # as large as the picture
        found |= {"height": side, "width": side}
    if name.startswith(TRUE_CFG):
        found["true_cfg_scale"] = 3.0
    if name.startswith(("StableDiffusion3", "Flux", "Qwen", "Chroma", "Z")):
        found["max_sequence_length"] = 16
    if takes:
        found["image"] = condition(3)
    if takes.split(" ")[0] in ("image", "mask"):
        found["strength"] = 0.8
    if "mask" in takes:
        shape = np.zeros((SIDE, SIDE), np.uint8)
        shape[4:12, 2:10] = 255
        found["mask_image"] = Image.fromarray(shape)
    if "control" in takes:
        found["control_image"] = condition(1)
    if name == "FluxKontextPipeline":
        found |= {"max_area": SIDE * SIDE, "_auto_resize": False}
    if name == "SanaPipeline":
        found |= {"use_resolution_binning": False, "complex_human_instruction": None}
    if name == "PixArtSigmaPipeline":
        found["use_resolution_binning"] = False
    return found | given


def _prompts(name: str) -> dict[str, Any]:
    if not name.startswith(("Z", "Qwen", "Chroma")):
        return {"prompt": ["red 1"], "negative_prompt": ["dog"]}
    generator = torch.Generator().manual_seed(4)
    lengths = (7, 5) if name.startswith("Z") else (6, 6)
    positive, negative = (torch.randn(n, 16, generator=generator) for n in lengths)
    if name.startswith("Z"):
        return {"prompt_embeds": [positive], "negative_prompt_embeds": [negative]}
    masks = ["prompt_embeds_mask", "prompt_attention_mask"][name.startswith("Chroma")]
    mask = torch.ones(1, 6, dtype=torch.bool if name.startswith("Chroma") else torch.long)
    return {
        "prompt_embeds": positive[None],
        "negative_prompt_embeds": negative[None],
        masks: mask,
        f"negative_{masks}": mask,
    }


def component_of(pipe: Any) -> str:
    return "unet" if hasattr(pipe, "unet") else "transformer"
