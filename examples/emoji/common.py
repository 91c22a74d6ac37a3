"""What the scripts of this folder share: data, sharing work, exact resume, and the lite0 features."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from difftuning_control.errors import UserError
from difftuning_control.evaluation.features import Lite0 as PackagedLite0


def load_base(work: Path, held_out: bool = False) -> tuple[torch.Tensor, list[dict]]:
    """The base pictures, uint8 (N, 3, 64, 64), and their records; those of the held-out names only on request."""
    images = np.load(work / "base.npz")["images"]
    records = json.loads((work / "base.json").read_text())
    keep = [i for i, record in enumerate(records) if record["held_out"] == held_out]
    return torch.from_numpy(images[keep]).permute(0, 3, 1, 2).contiguous(), [records[i] for i in keep]


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 → float in [-1, 1]."""
    return images.float() / 127.5 - 1


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Mean ± standard deviation, which has no sign; of one value the value, of none nothing."""
    if not values:
        return ""
    around = f" ± {form.replace('+', '').format(stdev(values))}" if len(values) > 1 else ""
    return f"{form.format(mean(values))}{around}"


def work_through(open_jobs: Callable[[], Sequence[Any]], train: Callable[[Any], object]) -> None:
    """Train what is not trained; a job that another process is at is left to it.

    Args:
        open_jobs: what can be trained now; more may follow from what was.
        train: one of these, which a UserError says another process is at.
    """
    while jobs := open_jobs():
        for job in jobs:
            try:
                train(job)
                print(*job, flush=True)
                break
            except UserError as error:
                if "in use by another run" not in str(error):
                    raise
        else:
            time.sleep(10)  # all that is left is being trained, or waits for it


class Log:
    """One JSON line a report, on screen and in a file."""

    def __init__(self, path: Path):
        self.path, self.start = path, time.time()

    def __call__(self, **row) -> None:
        row = {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}
        row["seconds"] = round(time.time() - self.start, 1)
        line = json.dumps(row)
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def save_state(path: Path, **state) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_state(path: Path) -> dict | None:
    return torch.load(path, weights_only=True) if path.exists() else None


def step_generator(seed: int, step: int) -> torch.Generator:
    """Randomness that depends on the step alone, so that a resumed run repeats an undisturbed one."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class Lite0(PackagedLite0):
    """The package's lite0 with the maps of its first blocks; pictures here are in [-1, 1]."""

    def shallow(self, images: torch.Tensor, blocks: int = 5) -> list[torch.Tensor]:
        """Channel-normalised maps of the first blocks (strides 2 to 8) of images (B, 3, H, W)."""
        x, maps = self.stem((images + 1) / 2), []
        for block in self.net._blocks[:blocks]:
            x = block(x)
            maps.append(F.normalize(x, dim=1, eps=1e-4))
        return [maps[0], maps[2], maps[4]]

    @torch.no_grad()
    def features(self, images: torch.Tensor, batch: int = 32) -> torch.Tensor:
        """Pooled features (N, 1280), each of length 1."""
        return torch.cat([F.normalize(self((part + 1) / 2), dim=1) for part in images.split(batch)])
