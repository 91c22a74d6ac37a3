"""Pictures of a report: rows of the same prompts, each picture a small PNG inside the page."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from difftuning_control.errors import UserError
from difftuning_control.evaluation.pilot_figures import PilotPictures
from difftuning_control.system.text import harmless

LARGEST = 320  # side of a picture in the report, in pixels
COLUMNS = 8  # pictures in a row


def picture_blocks(pictures: PilotPictures | None, folder: Path) -> list[dict[str, Any]]:
    """Blocks of at most COLUMNS prompts, with the rows of each as data URIs."""
    if pictures is None or not pictures.rows:
        return []
    prompts = pictures.prompts
    rows = [{"name": row.name, "uris": [data_uri(folder, f) for f in row.files]} for row in pictures.rows]
    return [
        {"prompts": prompts[i : i + COLUMNS], "rows": [r | {"uris": r["uris"][i : i + COLUMNS]} for r in rows]}
        for i in range(0, len(prompts), COLUMNS)
    ]


def data_uri(folder: Path, file: str, largest: int = LARGEST) -> str:
    path = folder / file
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"the picture {harmless(file)} of the pilot lies outside its folder {folder}; move it there.")
    try:
        with Image.open(path) as picture:
            picture.load()
            content = path.read_bytes()
            if picture.format != "PNG" or max(picture.size) > largest:
                small = picture.convert("RGB")
                small.thumbnail((largest, largest), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                small.save(buffer, "PNG", optimize=True)
                content = buffer.getvalue()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        raise UserError(
            f"the picture {harmless(str(path))} of the pilot is missing or damaged; put it back, or start "
            "afresh with --overwrite."
        ) from None
    return "data:image/png;base64," + base64.b64encode(content).decode()
