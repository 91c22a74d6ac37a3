"""What is timed on: synthetic pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def pictures(folder: Path, count: int, side: int, edges: bool = False, seed: int = 0) -> Path:
    """A folder of `count` PNGs of coloured discs with captions; with `edges` a condition each, in `edges/`, which the
    metadata name as `datasets` expects it."""
    if (folder / "metadata.jsonl").exists():
        return folder
    generator = np.random.default_rng(seed)
    (folder / "edges").mkdir(parents=True, exist_ok=True) if edges else folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:side, :side] / side
    rows = []
    for number in range(count):
        (cx, cy), radius = generator.uniform(0.3, 0.7, 2), generator.uniform(0.1, 0.3)
        distance = np.hypot(x - cx, y - cy) - radius
        inside = distance[..., None] < 0
        pixels = np.where(inside, generator.integers(0, 256, 3), generator.integers(0, 256, 3)).astype(np.uint8)
        name = f"{number:05d}.png"
        Image.fromarray(pixels).save(folder / name)
        row = {"file_name": name, "text": f"disc {number}"}
        if edges:
            Image.fromarray(np.where(abs(distance) < 1.5 / side, 255, 0).astype(np.uint8)).save(folder / "edges" / name)
            row["conditioning_image_file_name"] = f"edges/{name}"
        rows.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder
