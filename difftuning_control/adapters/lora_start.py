"""LoRA factors that start away from zero, with their start taken away again: the model starts as the base.

    s · (B S A − B₀ S₀ A₀) x        A, B and perhaps S, a diagonal, train; A₀, S₀ and B₀ are what they start from

The base's weights stay as they are, where PiSSA and its like subtract the start from them: so with the adapter off the
base is itself, bit for bit. Both terms are one product, of [S A; S₀ A₀] and [B, −B₀], and that is what is saved.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FACTOR = "factor"  # S, beside A's weight


class Down(nn.Linear):
    """[S A; S₀ A₀] x, (…, in) to (…, 2 r).

    Args:
        a: (r, in); s: (r,), or None where there is no S.
    """

    start: Tensor
    factor: nn.Parameter | None

    def __init__(self, a: Tensor, s: Tensor | None):
        super().__init__(a.shape[1], len(a), bias=False, device="meta")
        self.weight = nn.Parameter(a)
        self.register_parameter(FACTOR, None if s is None else nn.Parameter(s))
        self.register_buffer("start", self.scaled().detach().clone(), persistent=False)

    def scaled(self) -> Tensor:
        return self.weight if self.factor is None else self.factor[:, None] * self.weight

    def whole(self) -> Tensor:
        return torch.cat([self.scaled(), self.start])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.whole())


class Up(nn.Linear):
    """[B, −B₀] h, (…, 2 r) to (…, out).

    Args:
        b: (out, r).
    """

    start: Tensor

    def __init__(self, b: Tensor):
        super().__init__(b.shape[1], len(b), bias=False, device="meta")
        self.weight = nn.Parameter(b)
        self.register_buffer("start", -b.clone(), persistent=False)

    def whole(self) -> Tensor:
        return torch.cat([self.weight, self.start], 1)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.whole())


def subtract_start(layer: Any, name: str, s: Tensor | None = None) -> None:
    """Make a peft LoRA layer add only what its factors have moved away from where they are now."""
    down, up = layer.lora_A[name].weight.detach().float(), layer.lora_B[name].weight.detach().float()
    layer.lora_A[name] = Down(down, None if s is None else s.to(down))
    layer.lora_B[name] = Up(up)


def factors(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """A and B of a peft LoRA layer as they act, detached; of twice the rank where a start is subtracted."""
    down, up = layer.lora_A[name], layer.lora_B[name]
    if isinstance(down, Down):
        return down.whole().detach(), up.whole().detach()
    return down.weight.detach(), up.weight.detach()
