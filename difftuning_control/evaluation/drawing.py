"""Sampling with equal seeds on every side, and labelled grids of the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from difftuning_control.data.images import to_images
from difftuning_control.recipe.inputs import pictures_at_once
from difftuning_control.system.seeds import step_seed
from difftuning_control.system.text import harmless

if TYPE_CHECKING:
    from difftuning_control.families.family import Family


def sample_pictures(
    family: Family,
    prompts: Sequence[str],
    *,
    seed: int,
    steps: int,
    guidance_scale: float,
    resolution: int,
    batch_size: int = 16,
    advance: Callable[[int], object] = lambda count: None,
    control: Tensor | None = None,
) -> list[Image.Image]:
    """One picture a prompt; picture i starts from noise that depends on (seed, i) alone, whatever the weights.

    Args:
        batch_size: pictures at once; of large ones fewer.
        control: a condition a prompt for the family's ControlNet, (N, 3, H, W) uint8; drawn without it when None.
    """
    pictures: list[Image.Image] = []
    batch_size = min(batch_size, pictures_at_once(resolution**2))
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        generators = [torch.Generator().manual_seed(step_seed(seed, start + i)) for i in range(len(part))]
        conditions = control[start : start + batch_size] if control is not None else None
        latents = family.sample(
            part, generators, steps=steps, guidance_scale=guidance_scale, resolution=resolution, control=conditions
        )
        pictures += to_images(family.decode(latents))
        advance(len(part))
    return pictures


def save_grid(
    path: Path, rows: Mapping[str, Sequence[Image.Image]], columns: Sequence[str], cell: int | None = None
) -> None:
    """A table of pictures: a labelled row for each side, a caption over each column.

    A caption in a script that no font of the machine has becomes the number of its column.

    Args:
        cell: side of a cell in pixels; the pictures' own size, but at least 96, when None.
    """
    first = next(iter(rows.values()))[0]
    side = cell or cell_side(first.width)
    size = max(11, side // 9)
    columns = [harmless(caption[:MOST]) for caption in columns]
    font = font_for("".join([*rows, *columns]), size)
    columns = [text if can_draw(font, text) else f"#{j}" for j, text in enumerate(columns, 1)]
    left, top, gap = 8 + max(int(font.getlength(label)) for label in rows), 2 * size + 10, GAP
    width, height = left + (side + gap) * len(columns), top + (side + gap) * len(rows)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for j, caption in enumerate(columns):
        for k, line in enumerate(_two_lines(caption, font, side)):
            draw.text((left + j * (side + gap) + side // 2, 4 + k * size), line, "black", font, anchor="mt")
    for i, (label, pictures) in enumerate(rows.items()):
        y = top + i * (side + gap)
        draw.text((4, y + side // 2), label, "black", font, anchor="lm")
        for j, picture in enumerate(pictures):
            filter_ = Image.Resampling.NEAREST if picture.width * 2 <= side else Image.Resampling.LANCZOS
            sheet.paste(picture.resize((side, side), filter_), (left + j * (side + gap), y))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial.png")
    sheet.save(temporary)
    temporary.replace(path)


GAP = 4  # pixels behind and below each cell


def cell_side(width: int) -> int:
    """The side of a grid's cell for pictures of a width."""
    return max(96, min(width, 256))


def grid_cells(sheet: Image.Image, rows: int, columns: int, width: int) -> list[list[Image.Image]]:
    """The pictures of a grid that `save_grid` made, row by row.

    Args:
        width: that the pictures had.

    Raises:
        ValueError: if the grid is too small to have so many.
    """
    side = cell_side(width)
    left, top = sheet.width - (side + GAP) * columns, sheet.height - (side + GAP) * rows
    if left < 0 or top < 0:
        raise ValueError(f"a grid of {sheet.size} pixels has no {rows} × {columns} pictures of {side} pixels")
    corners = [[(left + (side + GAP) * j, top + (side + GAP) * i) for j in range(columns)] for i in range(rows)]
    return [[sheet.crop((x, y, x + side, y + side)) for x, y in row] for row in corners]


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
NO_CHARACTER = "\uffff"  # every font draws it as its sign for what it lacks


def can_draw(font: Font, text: str) -> bool:
    """Whether a font has a glyph for each character of a text."""
    lacks = bytes(font.getmask(NO_CHARACTER))
    return all(c.isspace() or bytes(font.getmask(c)) != lacks for c in dict.fromkeys(text))


def font_for(text: str, size: int) -> Font:
    """Pillow's own font where it has all characters of a text, else the first font of the machine that has them, else
    Pillow's own again."""
    default = ImageFont.load_default(size)
    if can_draw(default, text):
        return default
    from matplotlib.font_manager import fontManager  # a second of start-up, for other scripts only

    known = [f for f in fontManager.ttflist if not f.name.startswith("Last Resort")]  # which has a sign for each script
    for entry in sorted(known, key=lambda f: (f.style != "normal", f.weight != 400, f.fname)):
        try:
            font = ImageFont.truetype(entry.fname, size)
            if can_draw(font, text):
                return font
        except OSError:  # a font of bitmaps, or a damaged one
            continue
    return default


MOST = 1000  # characters of a caption that are looked at


def _two_lines(text: str, font: Font, width: int) -> list[str]:
    """The caption broken into at most two lines of the given width, shortened with an ellipsis."""
    lines, rest = [], " ".join(text.split())
    for number in range(2):
        words = rest.split(" ")
        taken = 0
        while taken < len(words) and font.getlength(" ".join(words[: taken + 1])) <= width:
            taken += 1
        line = " ".join(words[: max(taken, 1)])
        rest = " ".join(words[max(taken, 1) :])
        cut = font.getlength(line) > width or (number == 1 and rest)
        while cut and line and font.getlength(line + "…") > width:
            line = line[:-1]
        lines.append(line + "…" if cut else line)
        if not rest:
            break
    return lines
