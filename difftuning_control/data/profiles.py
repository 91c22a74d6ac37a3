"""Colour profiles: pictures that were saved in another colour space than sRGB, and their colours in it.

Phones save in Display P3, cameras in Adobe RGB and print shops in a CMYK of their own; read without its profile, such a
picture is duller or shriller than it is shown anywhere. A profile of grey tones changes nothing: what is grey may be a
depth.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

PROFILE = "icc_profile"
SAME = 2  # levels of 255 by which a profile that stands for sRGB may be off


def in_srgb(image: Image.Image) -> Image.Image:
    """A picture with the colours of its profile in sRGB and without the profile; as it is where it has none, where its
    profile is of grey tones or stands for sRGB, and where it does not fit the picture or cannot be read."""
    content = image.info.get(PROFILE)
    if not isinstance(content, bytes):
        return image
    if image.mode in ("P", "PA") or (image.mode == "RGB" and image.has_transparency_data):  # a colour that is clear
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    transform = _transform(content, image.mode) if image.mode in ("RGB", "RGBA", "CMYK") else None
    if transform is None:
        plain = image.copy()
        plain.info = _other_info(image)
        return plain
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    managed = transform.apply(image if image.mode == "CMYK" else image.convert("RGB"))
    if alpha is not None:
        managed.putalpha(alpha)
    managed.info = _other_info(image)
    return managed


def _other_info(image: Image.Image) -> dict[str | tuple[int, int], Any]:
    """What is said of a picture but its profile, which must not be applied twice, nor saved with other colours."""
    return {key: value for key, value in image.info.items() if key != PROFILE}


@lru_cache(16)  # the pictures of a set have few profiles, and a transform is slow to make
def _transform(content: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where that changes nothing, or cannot be done."""
    mode = "CMYK" if mode == "CMYK" else "RGB"
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "CMYK":
        return transform
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3)
    shown = np.asarray(transform.apply(Image.fromarray(colours)))
    return transform if np.abs(shown.astype(int) - colours).max() > SAME else None
