"""Latent moments and prompt embeddings on disk, so that no training step runs the VAE or the text encoder.

Each file is keyed by everything it depends on: the pictures' bytes, the encoder's weights and the way the pictures are
cut. What is stored of a picture is the mean and the standard deviation of its VAE posterior; drawing
mean + std · noise afresh at every step gives the same distribution as encoding it afresh.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from difftuning_control.data import Example, ImageData, fit_square
from difftuning_control.fingerprint import digest_of, read_tensors, write_tensors

if TYPE_CHECKING:
    from difftuning_control.families.sd import StableDiffusion

SHARD = 256
Advance = Callable[[int], object]


@dataclass(frozen=True)
class Framing:
    """How pictures become squares.

    Args:
        resolution: side in pixels.
        flip: also keep the mirror image; training draws one of the two.
        crops: how many positions of the square to keep where a picture is not square: 1 is the centre, more are drawn.
        seed: of these positions.
    """

    resolution: int
    flip: bool = False
    crops: int = 1
    seed: int = 0

    @property
    def views(self) -> int:
        return self.crops * (2 if self.flip else 1)

    def pixels(self, example: Example) -> Tensor:
        """All views of a picture, (views, 3, resolution, resolution) in [-1, 1]; mirror images come last."""
        image = example.load()
        rng = np.random.default_rng([self.seed, int(example.digest[:8], 16)])
        places = [(0.5, 0.5)] if self.crops == 1 else [tuple(rng.random(2)) for _ in range(self.crops)]
        views = torch.from_numpy(np.stack([fit_square(image, self.resolution, place) for place in places]))
        return torch.cat([views, views.flip(3)]) if self.flip else views


@dataclass(frozen=True)
class LatentMoments:
    """Means and standard deviations of the VAE's posteriors, (N, views, C, h, w) float32, unscaled."""

    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def views(self) -> int:
        return self.mean.shape[1]

    def draw(self, rows: Tensor, views: Tensor, noise: Tensor) -> Tensor:
        """mean + std · noise of the given rows and views, (B, C, h, w)."""
        return self.mean[rows, views] + self.std[rows, views] * noise


def cached_moments(
    family: StableDiffusion, data: ImageData, framing: Framing, folder: Path, advance: Advance, batch_size: int = 16
) -> LatentMoments:
    """The moments of every picture, from the cache where it has them. `advance(n)` is told of n pictures done."""
    views = replace(framing, seed=framing.seed if framing.crops > 1 else 0)  # the seed only places crops
    shards = []
    for start in range(0, len(data), SHARD):
        examples = data.examples[start : start + SHARD]
        key = digest_of([[e.digest for e in examples], family.fingerprints["vae"], str(family.dtype), vars(views)])
        path = folder / f"moments-{key}.safetensors"
        tensors = read_tensors(path)
        if tensors is None:
            tensors = _encode(family, examples, framing, advance, batch_size)
            write_tensors(path, tensors)
        else:
            advance(len(examples))
        shards.append(tensors)
    return LatentMoments(torch.cat([s["mean"] for s in shards]), torch.cat([s["std"] for s in shards]))


def _encode(
    family: StableDiffusion, examples: list[Example], framing: Framing, advance: Advance, batch_size: int
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


@dataclass(frozen=True)
class PromptEmbeddings:
    """The conditioning of a list of prompts, each different one stored once; entry "" is always there."""

    index: dict[str, int]
    tensors: dict[str, Tensor]

    def rows(self, prompts: list[str]) -> dict[str, Tensor]:
        """What the family's `predict` takes for these prompts, each tensor (B, …)."""
        numbers = torch.tensor([self.index[p] for p in prompts])
        return {name: tensor[numbers] for name, tensor in self.tensors.items()}


def cached_embeddings(
    family: StableDiffusion, prompts: list[str], folder: Path, advance: Advance, batch_size: int = 32
) -> PromptEmbeddings:
    """Embeddings of the different prompts and of the empty one, from the cache where it has them."""
    unique = ["", *dict.fromkeys(p for p in prompts if p)]
    identity = [family.fingerprints["text_encoder"], family.fingerprints["tokenizer"], str(family.dtype)]
    path = folder / f"prompts-{digest_of([unique, *identity])}.safetensors"
    tensors = read_tensors(path)
    if tensors is None:
        parts = []
        for start in range(0, len(unique), batch_size):
            chunk = unique[start : start + batch_size]
            parts.append({k: v.cpu() for k, v in family.encode_prompts(chunk).items()})
            advance(len(chunk))
        tensors = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        write_tensors(path, tensors)
    else:
        advance(len(unique))
    return PromptEmbeddings({p: i for i, p in enumerate(unique)}, tensors)
