"""Folders of pictures with captions, and changes to their metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


def write_pictures(folder: Path, count: int = 8, side: int = 16, seed: int = 0) -> Path:
    """A folder of coloured squares with `metadata.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        pixels = np.full((side, side, 3), 255, np.uint8)
        pixels[4:-4, 4:-4] = rng.integers(0, 255, 3)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"red {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def rewrite_metadata(folder: Path, change: Callable[[list[dict]], object]) -> None:
    path = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("\n".join(json.dumps(row) for row in rows))


def captioned_by_text_files(folder: Path) -> None:
    (folder / "metadata.jsonl").unlink()
    for i in range(8):
        (folder / f"{i}.txt").write_text("red")
