"""Variants of a base picture, each with a caption that says what was done to it.

`variants_of` gives `count` pictures of one record: the first is the picture itself; a third of the others are only
shifted, scaled and turned a little (no caption could tell); the rest are any of: recoloured ("blue book" from a red
one), on a coloured ground ("on a yellow background"), small, tilted, mirrored, outlined, pastel, dark. A caption is
kept in three parts, style, manner and body, so that training can leave the style out:

    "dark" + "noto emoji" + "small blue guitar on a yellow background"

A recoloured name that is a name of its own ("green apple") or a held-out one ("blue book") is never made, nor are the
pairs of HELD_PAIRS, on which composition is measured.
"""

from __future__ import annotations

import colorsys
import random
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

# colour word: hue in degrees, saturation, value of an object; and of a ground
COLOURS = {
    "red": (0, 0.80, 0.86),
    "orange": (28, 0.85, 0.96),
    "yellow": (50, 0.75, 0.98),
    "green": (120, 0.62, 0.66),
    "blue": (213, 0.72, 0.86),
    "purple": (275, 0.55, 0.72),
    "pink": (332, 0.42, 0.97),
    "brown": (25, 0.55, 0.50),
    "black": (0, 0.05, 0.20),
    "white": (0, 0.02, 0.95),
    "grey": (0, 0.03, 0.60),
}
GROUNDS = tuple(c for c in COLOURS if c != "white")
MANNERS = ("outlined", "pastel", "dark")
_HELD_PAIRS = (
    "blue banana, green guitar, purple strawberry, red frog, yellow umbrella, pink fish, orange key, blue mushroom, "
    "green trophy, purple cat face, red lemon, yellow butterfly, black banana, pink tomato, blue carrot, green bell, "
    "red sunflower, purple pear, brown rabbit face, orange whale, green hamburger, blue cherries, pink pineapple, "
    "yellow octopus"
)
HELD_PAIRS = tuple(_HELD_PAIRS.split(", "))


@dataclass
class Variant:
    pixels: np.ndarray  # (64, 64, 3) uint8
    style: str
    manner: str
    body: str

    @property
    def parts(self) -> list[str]:
        return [self.style, self.manner, self.body]


def caption(parts: list[str], with_style: bool = True) -> str:
    style, manner, body = parts
    return " ".join(part for part in (manner, f"{style} emoji" if with_style else "", body) if part)


def to_hsv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in degrees, saturation and value of colours (..., 3) in [0, 1]."""
    top, bottom = rgb.max(-1), rgb.min(-1)
    spread = np.maximum(top - bottom, 1e-6)
    r, g, b = np.moveaxis(rgb, -1, 0)
    hue = np.where(top == r, (g - b) / spread % 6, np.where(top == g, (b - r) / spread + 2, (r - g) / spread + 4))
    return 60 * hue, (top - bottom) / np.maximum(top, 1e-6), top


def to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    turn = (np.array([5.0, 3.0, 1.0]) + (hue / 60)[..., None]) % 6
    chroma = (value * saturation)[..., None]
    return value[..., None] - chroma * np.clip(np.minimum(turn, 4 - turn), 0, 1)


def recolour(rgba: np.ndarray, colour: str) -> np.ndarray | None:
    """The picture's main hue exchanged for a colour; None where no hue covers a good part of it."""
    alpha = rgba[..., 3] / 255
    rgb = rgba[..., :3] / 255 / np.maximum(alpha, 1e-3)[..., None]
    hue, saturation, value = to_hsv(np.clip(rgb, 0, 1))
    weight = alpha * ((saturation > 0.2) & (value > 0.15)) * saturation
    counts = np.bincount((hue / 10).astype(int).ravel() % 36, weight.ravel(), 36)
    smooth = sum(np.roll(counts, k) for k in (-1, 0, 1))
    main = 10 * int(smooth.argmax()) + 5
    apart = np.abs((hue - main + 180) % 360 - 180)
    share = np.clip((70 - apart) / 25, 0, 1) * np.clip(saturation / 0.15 - 0.5, 0, 1)
    if (share * alpha).sum() < 0.35 * alpha.sum():
        return None
    chosen = (share > 0.5) & (alpha > 0.5)
    h, s, v = COLOURS[colour]
    contrast = 0.6 if colour in ("black", "white") else 0.9
    new_value = np.clip(v + contrast * (value - np.median(value[chosen])), 0, 1)
    new_saturation = np.clip(s + min(0.6, s) * (saturation - np.median(saturation[chosen])), 0, 1)
    new_hue = (h + 0.2 * ((hue - main + 180) % 360 - 180)) % 360
    changed = to_rgb(new_hue, new_saturation, new_value)
    mixed = (share[..., None] * changed + (1 - share[..., None]) * rgb) * alpha[..., None]
    return np.concatenate([np.clip(255 * mixed, 0, 255).round().astype(np.uint8), rgba[..., 3:]], -1)


def recoloured_name(name: str, colour: str) -> str:
    first, _, rest = name.partition(" ")
    return f"{colour} {rest if first in COLOURS and rest else name}"


def outline(rgba: np.ndarray) -> np.ndarray:
    """A dark line around the shape, for which it is made a little smaller."""
    small = move(rgba, scale=0.92)
    wide = np.asarray(Image.fromarray(small[..., 3]).filter(ImageFilter.MaxFilter(7)).filter(ImageFilter.BoxBlur(1)))
    ink = np.array([30, 24, 40]) / 255
    left = wide.astype(float) * (1 - small[..., 3] / 255)
    colours = small[..., :3] + left[..., None] * ink
    both = np.concatenate([colours, (small[..., 3] + left)[..., None]], -1)
    return np.clip(both, 0, 255).round().astype(np.uint8)


def move(rgba: np.ndarray, scale: float = 1, turn: float = 0, right: float = 0, down: float = 0) -> np.ndarray:
    """Scaled, turned (degrees) and shifted (in pixels of 128) about the middle."""
    if (scale, turn, right, down) == (1, 0, 0, 0):
        return rgba
    middle, angle = rgba.shape[0] / 2, np.deg2rad(turn)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    x0, y0 = middle + right, middle + down
    matrix = (cos, sin, middle - cos * x0 - sin * y0, -sin, cos, middle + sin * x0 - cos * y0)
    picture = Image.frombytes("CMYK", rgba.shape[1::-1], rgba.tobytes())  # RGBA would be premultiplied once more
    if scale < 0.8:  # so that nothing flickers where it becomes much smaller
        picture = picture.filter(ImageFilter.BoxBlur(0.5 * (1 / scale - 1)))
    return np.asarray(picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC))


def on_ground(rgba: np.ndarray, ground: tuple[float, float, float]) -> np.ndarray:
    """The picture at 64 pixels on a ground of one colour (in [0, 1])."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    pixels = rgba[..., :3] + (1 - alpha) * 255 * np.array(ground, np.float32)
    pixels = pixels.reshape(64, 2, 64, 2, 3).mean((1, 3))
    return np.clip(pixels, 0, 255).round().astype(np.uint8)


def ground_colour(colour: str, rng: random.Random) -> tuple[float, float, float]:
    h, s, v = COLOURS[colour]
    s, v = s * rng.uniform(0.6, 1.0), min(1.0, v * rng.uniform(0.9, 1.1))
    return colorsys.hsv_to_rgb((h + rng.uniform(-6, 6)) % 360 / 360, s, v)


def nudge(
    rng: random.Random, scale: tuple[float, float] = (0.86, 1.04), shift: float = 6, turn: float = 6
) -> dict[str, float]:
    """A place that is drawn at random, as `move` takes it."""
    place = {"scale": rng.uniform(*scale), "turn": rng.uniform(-turn, turn)}
    return place | {"right": rng.uniform(-shift, shift), "down": rng.uniform(-shift, shift)}


def composed(rgba: np.ndarray, record: dict, taken: set[str], rng: random.Random) -> Variant:
    """One variant whose caption says what was done; the picture itself, nudged, where nothing could be done."""
    name, place, manner, white = record["name"], nudge(rng) if rng.random() < 0.3 else {}, "", (1.0, 1.0, 1.0)
    ground, before, behind = white, "", ""
    if rng.random() < 0.5:
        colour = rng.choice(list(COLOURS))
        new = recoloured_name(name, colour)
        if new not in taken and new not in HELD_PAIRS and (changed := recolour(rgba, colour)) is not None:
            rgba, name = changed, new
    kind = rng.random()
    if kind < 0.12:
        place, before = nudge(rng, scale=(0.45, 0.6), shift=24, turn=6), "small"
    elif kind < 0.22:
        place, before = {"scale": 0.88, "turn": rng.choice((-1, 1)) * rng.uniform(20, 40)}, "tilted"
    elif kind < 0.32:
        rgba, before = rgba[:, ::-1], "mirrored"
    if rng.random() < 0.25:
        manner = rng.choice(MANNERS)
        rgba = outline(rgba) if manner == "outlined" else rgba
    if rng.random() < 0.4:
        colour = rng.choice([c for c in GROUNDS if c not in name.split()])
        ground, behind = ground_colour(colour, rng), f"on {'an' if colour == 'orange' else 'a'} {colour} background"
    pixels = on_ground(move(np.ascontiguousarray(rgba), **place), ground)
    if manner == "pastel":
        pixels = (127.5 + pixels * 0.5).round().astype(np.uint8)
    elif manner == "dark":
        pixels = (pixels * 0.55).round().astype(np.uint8)
    body = " ".join(part for part in (before, name, behind) if part)
    return Variant(pixels, record["style"], manner, body)


def variants_of(rgba: np.ndarray, record: dict, count: int, taken: set[str], seed: int = 0) -> list[Variant]:
    """The same `count` variants whenever it is asked for one record and seed.

    Args:
        taken: names that no recoloured picture may bear.
    """
    rng = random.Random(zlib.crc32(f"{seed} {record['style']} {record['name']}".encode()))
    white = (1.0, 1.0, 1.0)
    found = [Variant(on_ground(rgba, white), record["style"], "", record["name"])]
    while len(found) < count:
        if len(found) % 3 == 1:
            found.append(Variant(on_ground(move(rgba, **nudge(rng)), white), record["style"], "", record["name"]))
        else:
            found.append(composed(rgba, record, taken, rng))
    return found
