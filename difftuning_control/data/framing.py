"""The framing of a picture: resolution, crop and mirroring, and the sizes that SDXL is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from difftuning_control.data.examples import Example
from difftuning_control.data.images import READING, frame, placed

if TYPE_CHECKING:
    from difftuning_control.recipe.inputs import DataConfig


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

    @classmethod
    def of(cls, config: DataConfig, resolution: int) -> Framing:
        """How the pictures to tune on become squares, by the recipe."""
        return cls(resolution, config.flip, config.crops)

    @property
    def middle(self) -> Framing:
        """The square in the middle alone, as pictures are measured and shown."""
        return Framing(self.resolution)

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
        """What the views depend on, for the keys of caches."""
        own = {k: v for k, v in vars(self.settled()).items() if k != "shape" or v is not None}
        return own | {"reading": READING}

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
