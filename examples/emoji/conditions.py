"""Conditions that a picture's own pixels give, functions for `control.annotator`.

Each takes (H, W, 3) uint8 RGB and gives (H, W) or (H, W, 3) uint8; `conditions:silhouette` names one where this folder
is on the Python path.
"""

from __future__ import annotations

import numpy as np

WHITE = 240  # from here on in every channel a pixel is ground
BLOCKS = 8  # a side


def silhouette(picture: np.ndarray) -> np.ndarray:
    """White where something is drawn on the white ground."""
    return np.where(picture.min(-1) < WHITE, 255, 0).astype(np.uint8)


def colours(picture: np.ndarray) -> np.ndarray:
    """The mean colour of each of 8 × 8 blocks."""
    height, width, _ = picture.shape
    high, wide = height // BLOCKS, width // BLOCKS
    blocks = picture[: high * BLOCKS, : wide * BLOCKS].reshape(BLOCKS, high, BLOCKS, wide, 3)
    means = np.broadcast_to(blocks.mean((1, 3), keepdims=True), blocks.shape)
    condition = picture.copy()
    condition[: high * BLOCKS, : wide * BLOCKS] = means.reshape(high * BLOCKS, wide * BLOCKS, 3).round()
    return condition


def negative(picture: np.ndarray) -> np.ndarray:
    """255 less the picture, so that the right answer is known in every pixel."""
    return 255 - picture
