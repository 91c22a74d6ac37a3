"""Models with random weights of the sizes of Stable Diffusion 1.5, Stable Diffusion XL and FLUX.1, made once.

Their tokenizers are the embedded model's, whose 77 positions cost what CLIP's cost. `small` is a tenth of the width, to
try a benchmark out.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from difftuning_control.families.loading import embedded_model

SMALL = "-small"  # after the folder's name of a model of a tenth of the width
FLUX_UNITS, T5_LAYERS = 19, 24  # of FLUX.1


def sd15_sized(folder: Path, small: bool = False) -> Path:
    """UNet 860 M weights, CLIP-L 123 M, VAE 84 M, 4 GB in float32."""
    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    tokenizer, width = _tokenizer(), 64 if small else 768
    unet = UNet2DConditionModel(
        sample_size=8 if small else 64,
        cross_attention_dim=width,
        **({"block_out_channels": (32, 64, 128, 128)} if small else {}),
    )
    pipe: Any = StableDiffusionPipeline(
        unet=unet,
        vae=vae(4, 0.18215, small),
        text_encoder=CLIPTextModel(_clip(tokenizer, width, 12, 12, small)),
        tokenizer=tokenizer,
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return saved(pipe, folder)


def sdxl_sized(folder: Path, small: bool = False) -> Path:
    """UNet 2.6 B weights, CLIP-L 123 M, OpenCLIP bigG 695 M, VAE 84 M, 7 GB in half precision."""
    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    tokenizer, (one, two) = _tokenizer(), (64, 128) if small else (768, 1280)
    channels = (32, 64, 128) if small else (320, 640, 1280)
    with made_in(torch.float32 if small else torch.bfloat16):
        unet = UNet2DConditionModel(
            sample_size=16 if small else 128,
            block_out_channels=channels,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 1) if small else (1, 2, 10),
            attention_head_dim=(1, 2, 4) if small else (5, 10, 20),
            cross_attention_dim=one + two,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=two + 6 * 256,
        )
        second = CLIPTextModelWithProjection(_clip(tokenizer, two, 32, 20, small))
    pipe: Any = StableDiffusionXLPipeline(
        unet=unet,
        vae=vae(4, 0.13025, small),
        text_encoder=CLIPTextModel(_clip(tokenizer, one, 12, 12, small)),
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=_scheduler(),
    )
    return saved(pipe, folder)


def flux_sized(folder: Path, units: int, small: bool = False, text_layers: int = 1) -> Path:
    """FLUX.1 with so many units of a double and two single blocks, of which it has 19, and a T5 of so many layers, of
    which it has 24: prompts are encoded once, and take no part in a step."""
    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    tokenizer, heads = _tokenizer(), 4 if small else 24
    pooled, joint = (64, 64) if small else (768, 4096)
    with made_in(torch.float32 if small else torch.bfloat16):
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=units,
            num_single_layers=2 * units,
            num_attention_heads=heads,
            attention_head_dim=16 if small else 128,
            joint_attention_dim=joint,
            pooled_projection_dim=pooled,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6) if small else (16, 56, 56),
        )
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=joint,
                d_kv=64,
                d_ff=5 * joint // 2,
                num_layers=text_layers,
                num_heads=joint // 64,
                feed_forward_proj="gated-gelu",
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    pipe: Any = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae(16, 0.3611, small, shift_factor=0.1159),
        text_encoder=CLIPTextModel(_clip(tokenizer, pooled, 12, 12, small)),
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=tokenizer,
    )
    return saved(pipe, folder)


# --- parts ------------------------------------------------------------------------------------------------------------


def _tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model() / "tokenizer")
    tokenizer.model_max_length = 77
    return tokenizer


def _clip(tokenizer: Any, width: int, layers: int, heads: int, small: bool) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer) if small else 49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=1 if small else layers,
        num_attention_heads=2 if small else heads,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def vae(channels: int, scale: float, small: bool, **more: float) -> AutoencoderKL:
    """An autoencoder of Stable Diffusion's shape, 84 M weights."""
    return AutoencoderKL(
        block_out_channels=(32, 32, 32, 32) if small else (128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1 if small else 2,
        latent_channels=channels,
        sample_size=512,
        scaling_factor=scale,
        **more,
    )


def _scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


@contextmanager
def made_in(dtype: torch.dtype) -> Iterator[None]:
    """While open, modules are made in a precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def saved(pipe: Any, folder: Path) -> Path:
    """The folder of a pipeline, which is there once it is whole."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(partial)
    partial.replace(folder)
    return folder
