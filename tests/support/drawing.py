"""Prompts, generators and tolerances for comparing a family with its stock pipeline."""

from __future__ import annotations

import torch

PROMPTS = ["red 1", "a blue square"]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
SIDES = {"pixart": 16, "sana": 32, "lumina2": 64}


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def exact(pipe) -> dict[str, bool]:
    """What keeps the stock pipeline from drawing at a size that it likes better."""
    return {} if type(pipe).__name__ == "Lumina2Pipeline" else {"use_resolution_binning": False}
