"""The weights of a masked loss: what multiplies the squared error at each place of a sample's latents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mask_weights(masks: Tensor, size: tuple[int, int], outside: float = 0.0) -> Tensor:
    """w̃ for ℓ = mean over the places of w̃ · (prediction − target)², (B, 1, h, w) float32.

        w = outside + (1 − outside) · m,   w̃ = max(w) · w / mean(w)

    m is the mean of the mask over the pixels of a place. So ℓ is the mean of the squared error with the weights w,
    times their maximum: a subject counts alike whatever share s of the picture it is, but for what is left to the
    rest, outside · (1 − s) of s + outside · (1 − s), and a mask that fills no place whole, or is black, counts less.
    A mask that is white everywhere gives w̃ = 1, the loss without a mask.

    Args:
        masks: 1 where the picture is learnt, 0 where not, (B, 1, H, W) in [0, 1].
        size: height and width of the latents, h and w.
        outside: w where the mask is 0, in [0, 1].

    Raises:
        ValueError: for masks of another shape or range, and for an `outside` that is out of its own.
    """
    if masks.ndim != 4 or masks.shape[1] != 1:
        raise ValueError(f"masks are {tuple(masks.shape)}; expected (B, 1, H, W).")
    if masks.numel() and not (float(masks.min()) >= 0 and float(masks.max()) <= 1):
        raise ValueError(f"masks have values from {masks.min():g} to {masks.max():g}; expected 0 to 1.")
    if not 0 <= outside <= 1:
        raise ValueError(f"outside is {outside}; expected 0 to 1.")
    weights = outside + (1 - outside) * F.adaptive_avg_pool2d(masks.float(), size)
    means, most = weights.mean((2, 3), keepdim=True), weights.amax((2, 3), keepdim=True)
    return torch.where(means > 0, most * weights / means, weights)
