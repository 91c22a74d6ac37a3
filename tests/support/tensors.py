"""Tensors by name: read into memory, and compared bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor


def in_memory(embeddings) -> dict[str, torch.Tensor]:
    """All rows of prompt embeddings."""
    return {name: rows[:] for name, rows in embeddings.tensors.items()}


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> set[str]:
    assert found.keys() == expected.keys()
    return {name for name in found if not torch.equal(found[name], expected[name])}
