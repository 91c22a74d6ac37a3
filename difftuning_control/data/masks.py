"""Masks over pictures: how much the error of each pixel counts, and of each place of the latents of each view."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from difftuning_control.data.examples import listed
from difftuning_control.data.images import decode_image, frame, opacity, to_grey
from difftuning_control.errors import UserError
from difftuning_control.objective.masking import mask_weights
from difftuning_control.recipe.masking import ALPHA, Masking

if TYPE_CHECKING:
    from difftuning_control.data.examples import ImageData
    from difftuning_control.data.framing import Framing


LEAST_WHITE = 128  # of a mask's brightest pixel: below it the file has numbers or colours of labels


@dataclass(frozen=True)
class Mask:
    """The mask of one picture.

    Args:
        digest: of its file; `alpha` where it is in the picture's.
        load: gives what each pixel counts, 32-bit floats in [0, 1].
        size: width and height.
        is_whole: whether every pixel is learnt.
    """

    digest: str
    load: Callable[[], Image.Image] = field(compare=False, repr=False)
    size: tuple[int, int]
    is_whole: bool


def check_mask(read: Callable[[], bytes], masking: Masking, max_pixels: int) -> Mask:
    """The mask in a file, or of a picture's transparency, decoded once to be checked.

    Raises:
        UserError: if it cannot be read, or nothing of the picture would be learnt.
    """
    is_alpha = masking.folder is None

    def decoded(content: bytes) -> Image.Image:
        return decode_image(content, max_pixels, opacity if is_alpha else to_grey)

    content = read()
    mask = decoded(content)
    values = np.asarray(mask)
    least, most = int(values.min()), int(values.max())
    if most == 0:
        where = "is transparent everywhere" if is_alpha else "is black everywhere"
        raise UserError(f"{where}, so nothing of the picture would be learnt")
    if most < LEAST_WHITE and not is_alpha:
        raise UserError(f"is {most} of 255 at its brightest, so hardly anything would be learnt; save white as 255")
    digest = ALPHA if is_alpha else hashlib.sha256(content).hexdigest()

    def load() -> Image.Image:
        values = np.asarray(decoded(read()), dtype=np.float32) / 255
        return Image.fromarray(masking.outside + (1 - masking.outside) * values)

    return Mask(digest, load, mask.size, least == 255)


def out_of_sight(names: list[str], weights: Tensor | None, outside: float) -> list[str]:
    """What to say of pictures whose mask lies outside of the frame, in some of their views.

    Args:
        weights: of all views, as `loss_weights` gives them.
        outside: of the masking.
    """
    if weights is None:
        return []
    black = (weights.flatten(2).amax(2) <= outside + 1e-6).any(1).tolist()
    found = [name for name, is_black in zip(names, black) if is_black]
    if not found:
        return []
    return [
        f"note: the frame leaves out all that the masks of {listed(found)} show, in some views at least; data.buckets "
        "frames pictures in their own shape"
    ]


def opaque_of(masking: Masking, whole: int, used: int, source: str) -> list[str]:
    """What to say where pictures are to have masks in their transparency, and some are opaque.

    Args:
        whole: how many of those that are used have nothing that a mask leaves out.

    Raises:
        UserError: if all are opaque.
    """
    if masking.folder is not None or not whole:
        return []
    if whole == used:
        raise UserError(
            f"data.masks is alpha, but no picture of {source} is transparent anywhere; name a folder of masks, or "
            "leave it out."
        )
    return [f"{whole} of {used} pictures of {source} {'is' if whole == 1 else 'are'} opaque, and so learnt whole"]


def _framed(mask: Image.Image, framing: Framing, place: tuple[float, float]) -> np.ndarray:
    return frame(mask, framing.height, framing.width, place, Image.Resampling.BOX)


def loss_weights(data: ImageData, framing: Framing, latents: torch.Size) -> Tensor | None:
    """What multiplies the squared error at each place of the latents of every view, (N, views, 1, h, w) float32, as
    `mask_weights` says; None where the pictures have no masks.

    Args:
        latents: shape of a row's latents, (C, h, w).
    """
    size = (latents[1], latents[2])
    masks = [example.load_mask for example in data.examples]
    if not masks or masks[0] is None:
        return None
    rows = []
    for example, load in zip(data.examples, masks):
        assert load is not None  # all have one, or none
        views = framing.arrange(example, partial(_framed, load(), framing))
        rows.append(mask_weights(torch.from_numpy(np.ascontiguousarray(views)).clamp(0, 1)[:, None], size))
    return torch.stack(rows)
