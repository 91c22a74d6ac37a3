"""Latent moments and prompt embeddings on disk, so that no training step runs the VAE or a text encoder.

Each file is keyed by everything it depends on: the pictures' bytes, the encoder's weights and the way the pictures are
cut. What is stored of a picture is the mean and the standard deviation of its VAE posterior; drawing
mean + std · noise afresh at every step gives the same distribution as encoding it afresh. Latents and embeddings stay
on disk: a step reads the rows that it needs (see `rows`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from difftuning_control.data import Example, ImageData
from difftuning_control.families.prompts import PromptEmbeddings
from difftuning_control.images import frame, placed
from difftuning_control.system.digests import digest_of
from difftuning_control.system.processes import ALONE, Share, files_together
from difftuning_control.system.rows import Rows

if TYPE_CHECKING:
    from difftuning_control.families.family import Family

SHARD = 256
Advance = Callable[[int], object]


@dataclass(frozen=True)
class Framing:
    """How pictures become squares, or the frames of a bucket.

    Args:
        resolution: side in pixels.
        flip: also keep the mirror image; training draws one of the two.
        crops: how many positions of the square to keep where a picture is not square: 1 is the centre, more are drawn.
        seed: of these positions.
        shape: height and width of the frame where it is no square.
    """

    resolution: int
    flip: bool = False
    crops: int = 1
    seed: int = 0
    shape: tuple[int, int] | None = None

    @property
    def height(self) -> int:
        return self.shape[0] if self.shape is not None else self.resolution

    @property
    def width(self) -> int:
        return self.shape[1] if self.shape is not None else self.resolution

    @property
    def views(self) -> int:
        return self.crops * (2 if self.flip else 1)

    def settled(self) -> Framing:
        """The same framing, equal to every other that gives the same views."""
        return replace(self, seed=self.seed if self.crops > 1 else 0)  # the seed only places crops

    @property
    def identity(self) -> dict[str, Any]:
        """What the views depend on, for the keys of caches; a square's is what it was before there were others."""
        return {k: v for k, v in vars(self.settled()).items() if k != "shape" or v is not None}

    def places(self, example: Example) -> list[tuple[float, float]]:
        """Where the frame lies in what is left over, for each crop."""
        if self.crops == 1:
            return [(0.5, 0.5)]
        rng = np.random.default_rng([self.seed, int(example.digest[:8], 16)])
        return [(float(x), float(y)) for x, y in rng.random((self.crops, 2))]

    def sizes(self, example: Example) -> Tensor:
        """What was done to each view, (views, 6) long: the picture's own height and width, the crop's top and left once
        it was resized, and the frame's height and width; a mirror image's left is counted in the mirrored picture.

        References:
            SDXL: Improving Latent Diffusion Models (Podell et al., 2023), https://arxiv.org/abs/2307.01952
        """
        width, height = example.size
        rows = []
        for mirrored in (False, True) if self.flip else (False,):
            for place in self.places(example):
                (resized, _), left, top = placed(example.size, self.height, self.width, place)
                rows.append(
                    [height, width, top, resized - self.width - left if mirrored else left, self.height, self.width]
                )
        return torch.tensor(rows)

    def arrange(self, example: Example, framed: Callable[[tuple[float, float]], np.ndarray]) -> np.ndarray:
        """All views, (views, height, width, 3) uint8, of what `framed` gives for each place of the frame;
        mirror images come last."""
        views = np.stack([framed(place) for place in self.places(example)])
        return np.concatenate([views, views[:, :, ::-1]]) if self.flip else views

    def pictures(self, example: Example) -> np.ndarray:
        """All views of a picture, (views, height, width, 3) uint8."""
        image = example.load()
        return self.arrange(example, lambda place: frame(image, self.height, self.width, place))

    def pixels(self, example: Example) -> Tensor:
        """All views of a picture, (views, 3, height, width) in [-1, 1]."""
        views = np.ascontiguousarray(self.pictures(example).transpose(0, 3, 1, 2), dtype=np.float32)
        return torch.from_numpy(views / 127.5 - 1)


@dataclass(frozen=True)
class LatentMoments:
    """Means and standard deviations of the VAE's posteriors, (N, views, C, h, w) float32, unscaled."""

    mean: Tensor | Rows
    std: Tensor | Rows

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def views(self) -> int:
        return self.mean.shape[1]

    def draw(self, rows: Tensor, views: Tensor, noise: Tensor) -> Tensor:
        """mean + std · noise of the given rows and views, (B, C, h, w)."""
        return self.mean[rows, views] + self.std[rows, views] * noise

    def first_views(self, scale: Callable[[Tensor], Tensor]) -> Tensor | Rows:
        """The scaled means of each picture's first view, (N, C, h, w)."""
        return scale(self.mean[:, 0]) if isinstance(self.mean, Tensor) else self.mean.first_of_each(scale)


def cached_moments(
    family: Family,
    data: ImageData,
    framing: Framing,
    folder: Path,
    advance: Advance,
    batch_size: int = 16,
    share: Share = ALONE,
) -> LatentMoments:
    """The moments of every picture, from the cache where it has them. `advance(n)` is told of n pictures done."""
    parts = [data.examples[start : start + SHARD] for start in range(0, len(data), SHARD)]
    identity = [family.fingerprints["vae"], str(family.dtype), framing.identity]
    keys = [digest_of([[e.digest for e in part], *identity]) for part in parts]
    files = files_together(
        [folder / f"moments-{key}.safetensors" for key in keys],
        lambda i: _encode(family, parts[i], framing, advance, batch_size),
        share,
        lambda i: advance(len(parts[i])),
        lead=2,
    )
    return LatentMoments(files.rows("mean"), files.rows("std"))


def _encode(
    family: Family, examples: list[Example], framing: Framing, advance: Advance, batch_size: int
) -> dict[str, Tensor]:
    means, stds = [], []
    size = max(1, batch_size // framing.views)
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        mean, std = family.encode_moments(torch.cat([framing.pixels(e) for e in part]))
        means.append(mean.cpu().unflatten(0, (len(part), framing.views)))
        stds.append(std.cpu().unflatten(0, (len(part), framing.views)))
        advance(len(part))
    return {"mean": torch.cat(means), "std": torch.cat(stds)}


def cached_embeddings(
    family: Family,
    prompts: list[str],
    folder: Path,
    advance: Advance,
    batch_size: int = 32,
    share: Share = ALONE,
) -> PromptEmbeddings:
    """Embeddings of the different prompts and of the empty one, from the cache where it has them.

    Tokens instead, and no cache, where the family encodes them in the step.
    """
    unique = ["", *dict.fromkeys(p for p in prompts if p)]
    if family.encodes_in_step:
        advance(len(unique))
        return PromptEmbeddings({p: i for i, p in enumerate(unique)}, family.tokenize(unique))
    parts = [unique[start : start + SHARD] for start in range(0, len(unique), SHARD)]
    keys = [digest_of([part, family.conditioning_fingerprint]) for part in parts]
    files = files_together(
        [folder / f"prompts-{key}.safetensors" for key in keys],
        lambda i: _encode_prompts(family, parts[i], advance, batch_size),
        share,
        lambda i: advance(len(parts[i])),
    )
    tensors = {name: files.rows(name) for name in files.names}
    embeddings = PromptEmbeddings({p: i for i, p in enumerate(unique)}, tensors)
    family.remember(embeddings)
    return embeddings


def _encode_prompts(family: Family, prompts: list[str], advance: Advance, batch_size: int) -> dict[str, Tensor]:
    parts = []
    with family.encoding():
        for start in range(0, len(prompts), batch_size):
            chunk = prompts[start : start + batch_size]
            parts.append({k: v.cpu() for k, v in family.encode_prompts(chunk).items()})
            advance(len(chunk))
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
