"""FreeU in a pretrained UNet as in the tuned one.

References:
    FreeU: Free Lunch in Diffusion U-Net (Si et al., 2024), https://arxiv.org/abs/2309.11497
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

FREEU = ("s1", "s2", "b1", "b2")  # attributes of up blocks, where `enable_freeu` leaves its factors


@contextmanager
def freeu_alike(denoiser: nn.Module, source: nn.Module) -> Iterator[None]:
    """While open, a pretrained UNet has the tuned one's FreeU factors, or none, so that both branches are alike."""
    pairs = list(zip(getattr(denoiser, "up_blocks", ()), getattr(source, "up_blocks", ())))
    kept = [{name: getattr(its, name, None) for name in FREEU} for _, its in pairs]
    try:
        for ours, its in pairs:
            for name in FREEU:
                setattr(its, name, getattr(ours, name, None))
        yield
    finally:
        for (_, its), before in zip(pairs, kept):
            for name, value in before.items():
                setattr(its, name, value)
