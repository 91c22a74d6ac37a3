"""Latent moments on disk, so that no training step runs the VAE.

Each file is keyed by everything it depends on: the pictures' bytes, the encoder's weights and the way the pictures are
cut. What is stored of a picture is the mean and the standard deviation of its VAE posterior; drawing
mean + std · noise afresh at every step gives the same distribution as encoding it afresh. A step
reads the rows that it needs from disk (see `rows`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from difftuning_control.data.examples import Example, ImageData
from difftuning_control.data.framing import Framing
from difftuning_control.system.digests import digest_of
from difftuning_control.system.processes import ALONE, Share, files_together
from difftuning_control.system.rows import Rows

if TYPE_CHECKING:
    from difftuning_control.data.bank import KnowledgeBank
    from difftuning_control.families.family import Family

SHARD = 256
Advance = Callable[[int], object]


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


class Part(NamedTuple):
    """Rows before their conditioning is looked up: latents (N, C, h, w) in the denoiser's scale, their prompts, the
    sizes (N, 6) of `Framing.sizes` where the family takes them and they are not the plain ones, and the weights of the
    squared error (N, 1, h, w) where they have masks."""

    latents: Tensor | Rows
    prompts: list[str]
    sizes: Tensor | None = None
    loss_weights: Tensor | None = None


def part_of(bank: KnowledgeBank, prompts: list[str]) -> Part:
    """A bank's items under the given prompts."""
    return Part(bank.latents, prompts, bank.sizes)
