"""What is timed on: a model with random weights of Stable Diffusion 1.5's size, and synthetic pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from difftuning_control.families.loading import embedded_model


def sd15_sized(folder: Path) -> Path:
    """A pipeline with random weights of Stable Diffusion 1.5's shapes, made once: UNet 860 M weights, CLIP-L 123 M, VAE
    84 M, 4 GB in float32. The tokenizer is the embedded model's, whose 77 positions cost what CLIP's cost."""
    if (folder / "model_index.json").exists():
        return folder

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model() / "tokenizer")
    tokenizer.model_max_length = 77
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    pipe: Any = StableDiffusionPipeline(
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(partial)
    partial.replace(folder)
    return folder


def pictures(folder: Path, count: int, side: int, edges: bool = False, seed: int = 0) -> Path:
    """A folder of `count` PNGs of coloured discs with captions; with `edges` a condition each, in `edges/`, which the
    metadata name as `datasets` expects it."""
    if (folder / "metadata.jsonl").exists():
        return folder
    generator = np.random.default_rng(seed)
    (folder / "edges").mkdir(parents=True, exist_ok=True) if edges else folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:side, :side] / side
    rows = []
    for number in range(count):
        (cx, cy), radius = generator.uniform(0.3, 0.7, 2), generator.uniform(0.1, 0.3)
        distance = np.hypot(x - cx, y - cy) - radius
        inside = distance[..., None] < 0
        pixels = np.where(inside, generator.integers(0, 256, 3), generator.integers(0, 256, 3)).astype(np.uint8)
        name = f"{number:05d}.png"
        Image.fromarray(pixels).save(folder / name)
        row = {"file_name": name, "text": f"disc {number}"}
        if edges:
            Image.fromarray(np.where(abs(distance) < 1.5 / side, 255, 0).astype(np.uint8)).save(folder / "edges" / name)
            row["conditioning_image_file_name"] = f"edges/{name}"
        rows.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder
