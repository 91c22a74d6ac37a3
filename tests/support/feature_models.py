"""Tiny feature models for the metrics, made from seeds."""

from __future__ import annotations

from pathlib import Path

import torch

from support.tiny_tokenizers import tiny_tokenizer


def save_tiny_dinov2(folder: Path) -> Path:
    """A Dinov2 of some thousand weights with its picture processor: 28×28 pictures, 16 dimensions."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, mlp_ratio=2)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def save_tiny_clip(folder: Path) -> Path:
    """A CLIP of some thousand weights with its tokenizer and picture processor: 28×28 pictures, 6 dimensions."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**sizes, **marks, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    torch.manual_seed(0)
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).save_pretrained(folder)
    cut = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    CLIPProcessor(cut, tokenizer).save_pretrained(folder)
    return folder
