"""What the scripts of this folder share: pictures, sharing work, exact resume, the lite0 features, and drawing.

Whatever of the package's own modules the scripts need to draw pictures is imported here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from difftuning_control.errors import UserError
from difftuning_control.evaluation.drawing import sample_pictures, save_grid
from difftuning_control.evaluation.features import Lite0 as PackagedLite0
from difftuning_control.families.family import Family
from difftuning_control.families.loading import embedded_model, family_of

_PROMPTS = (
    "red heart, pizza, dog face, red apple, cat face, birthday cake, soccer ball, guitar, sunflower, "
    "hot dog, fish, butterfly, banana, christmas tree, trophy, key, balloon, rabbit face, strawberry, "
    "teacup without handle, light bulb, envelope, turtle, mushroom"
)
PROMPTS = tuple(_PROMPTS.split(", "))


def on_white(rgba: np.ndarray) -> np.ndarray:
    """Premultiplied pictures (N, 128, 128, 4) uint8 on a white ground, (N, 64, 64, 3) uint8."""
    n, height, width, _ = rgba.shape
    found = np.empty((n, height // 2, width // 2, 3), np.uint8)
    for i, picture in enumerate(rgba.astype(np.uint16)):
        pixels = picture[..., :3] + (255 - picture[..., 3:])
        found[i] = (pixels.reshape(height // 2, 2, width // 2, 2, 3).sum((1, 3)) + 2) // 4
    return found


def load_rgba(work: Path) -> tuple[np.ndarray, list[dict]]:
    """Every base picture, premultiplied RGBA (N, 128, 128, 4) uint8, and its record."""
    return np.load(work / "base.npz")["images"], json.loads((work / "base.json").read_text())


def load_base(work: Path, held_out: bool = False) -> tuple[torch.Tensor, list[dict]]:
    """The base pictures, uint8 (N, 3, 64, 64), and their records; those of the held-out names only on request."""
    images, records = load_rgba(work)
    keep = [i for i, record in enumerate(records) if record["held_out"] == held_out]
    return torch.from_numpy(on_white(images[keep])).permute(0, 3, 1, 2).contiguous(), [records[i] for i in keep]


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


def kept_and_new(
    earlier: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], side: Callable[[dict[str, Any]], Any]
) -> list[dict[str, Any]]:
    """Rows of an earlier collection and of a new one, which replaces what it has of the same side."""
    replaced = {side(row) for row in new}
    return [*(row for row in earlier if side(row) not in replaced), *new]


class Log:
    """One JSON line a report, on screen and in a file."""

    def __init__(self, path: Path):
        self.path, self.start, self.cpu = path, time.time(), time.process_time()

    def __call__(self, **row) -> None:
        row = {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}
        row["seconds"] = round(time.time() - self.start, 1)
        row["cpu_seconds"] = round(time.process_time() - self.cpu, 1)
        line = json.dumps(row)
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def save_state(path: Path, **state) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def when_ended() -> list[int]:
    """Empty until the process is asked to end (TERM), so that a loop can save first."""
    found: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: found.append(number))
    return found


def load_state(path: Path) -> dict | None:
    return torch.load(path, weights_only=True, map_location="cpu") if path.exists() else None


def step_generator(seed: int, step: int) -> torch.Generator:
    """Randomness that depends on the step alone, so that a resumed run repeats an undisturbed one."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class Lite0(PackagedLite0):
    """The package's lite0 with the maps of its first blocks; pictures here are in [-1, 1]."""

    def maps(self, images: torch.Tensor, blocks: tuple[int, ...] = (0, 2, 4), side: int | None = None) -> list:
        """Channel-normalised maps of some blocks (of 16, strides 2 to 32) of images (B, 3, H, W), resized to `side`."""
        x = (images + 1) / 2
        if side is not None:
            x = F.interpolate(x, size=(side, side), mode="bilinear")
        x, found = self.stem(x), []
        for block in self.net._blocks[: max(blocks) + 1]:
            x = block(x)
            found.append(x)
        return [F.normalize(found[i], dim=1, eps=1e-4) for i in blocks]

    @torch.no_grad()
    def features(self, images: torch.Tensor, batch: int = 32) -> torch.Tensor:
        """Pooled features (N, 1280), each of length 1."""
        return torch.cat([F.normalize(self((part + 1) / 2), dim=1) for part in images.split(batch)])


def digest_of_model() -> str:
    """Of the weights of the embedded model; figures with other weights do not compare."""
    whole = hashlib.sha256()
    for path in sorted(embedded_model().rglob("*.safetensors")):
        whole.update(path.read_bytes())
    return whole.hexdigest()[:12]


def load_model(folder: Path | str) -> Family:
    return family_of(StableDiffusionPipeline.from_pretrained(folder))


@torch.no_grad()
def pass_through(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] after the autoencoder."""
    parts = [vae.decode(vae.encode(part).latent_dist.mean).sample for part in pictures.split(64)]
    return torch.cat(parts).clamp(-1, 1)


def draw(family: Family, prompts: list[str], **settings) -> torch.Tensor:
    """A picture a prompt, (N, 3, 64, 64) in [-1, 1]; the settings are those of `sample_pictures`."""
    drawn = sample_pictures(family, prompts, **{"seed": 0, "resolution": 64, "batch_size": 64} | settings)
    return to_unit(torch.stack([torch.from_numpy(np.array(p)) for p in drawn]).permute(0, 3, 1, 2))


def save_pictures(path: Path, rows: dict[str, torch.Tensor], columns: list[str]) -> None:
    """A labelled grid of pictures (N, 3, 64, 64) in [-1, 1]."""
    arrays = {k: ((v + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy() for k, v in rows.items()}
    save_grid(path, {k: [Image.fromarray(a) for a in v] for k, v in arrays.items()}, columns)


def prompt_grid(family: Family, path: Path, style: str = "noto", guidance: float = 4.0, steps: int = 25) -> None:
    """PROMPTS in two rows with the style's name and two without."""
    settings = {"seed": 0, "steps": steps, "guidance_scale": guidance, "resolution": 64, "batch_size": 24}
    rows = {}
    for label, prompts in (("with style", [f"{style} emoji {p}" for p in PROMPTS]), ("name alone", list(PROMPTS))):
        drawn = sample_pictures(family, prompts, **settings)
        rows[label + " "], rows[label] = drawn[:12], drawn[12:]
    save_grid(path, rows, ["/".join(pair) for pair in zip(PROMPTS[:12], PROMPTS[12:])])


def rank_of_truth(features: torch.Tensor, truth: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Rank (0 is nearest) of each row's true picture among all the true ones, by cosine similarity."""
    similarity = features @ truth.T
    return (similarity > similarity.gather(1, own.view(-1, 1))).sum(1)


def shares(ranks: torch.Tensor) -> dict[str, float]:
    """How often the true picture is the nearest, and among the five nearest."""
    return {"top1": round(float((ranks == 0).float().mean()), 3), "top5": round(float((ranks < 5).float().mean()), 3)}
