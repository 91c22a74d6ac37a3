"""Prompt embeddings of a set of prompts, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from difftuning_control.system.rows import Rows


@dataclass(frozen=True)
class PromptEmbeddings:
    """The conditioning of a list of prompts, each different one stored once; entry "" is always there."""

    index: dict[str, int]
    tensors: Mapping[str, Tensor | Rows]

    def rows(self, prompts: list[str]) -> dict[str, Tensor]:
        """What the family's `predict` takes for these prompts, each tensor (B, …)."""
        numbers = torch.tensor([self.index[p] for p in prompts])
        return {name: tensor[numbers] for name, tensor in self.tensors.items()}
