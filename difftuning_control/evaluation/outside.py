"""Pictures outside the new domain: what a tuned model draws for other prompts, beside what the pretrained one drew.

outside_kid   KID of its pictures to the pretrained model's for the same prompts from other noise; the
              pretrained model's own value, a little below 0, where it draws them as before
still_drawn   share of its pictures whose nearest among those is that of the same prompt, by the cosine of features
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from difftuning_control.evaluation.features import Features
from difftuning_control.evaluation.figures import Sampling
from difftuning_control.evaluation.metrics import kid
from difftuning_control.recipe.inputs import MAX_SEED

if TYPE_CHECKING:
    from difftuning_control.families.family import Family


@dataclass(frozen=True)
class Outside:
    """Judges what is drawn for prompts that were not tuned on.

    Args:
        sampling: the prompts, and how they are drawn.
        before: features (N, D) of what the pretrained model draws for them, from noise that no side draws from.
    """

    sampling: Sampling
    features: Features
    before: Tensor

    @classmethod
    def of(
        cls, base: Family, features: Features, sampling: Sampling, advance: Callable[[int], object] = lambda n: None
    ) -> Outside:
        """With the pictures of the pretrained model; `advance` is told how many were drawn."""
        return cls(sampling, features, features(replace(sampling, seeds=[MAX_SEED]).draw(base, advance)))

    def figures(self, pictures: list[Image.Image]) -> dict[str, float]:
        """Figures of pictures, one a prompt in order."""
        found = self.features(pictures)
        return {"outside_kid": kid(self.before, found)[0], "still_drawn": still_drawn(found, self.before)}


def still_drawn(found: Tensor, before: Tensor) -> float:
    """Share of rows of `found` (N, D) whose nearest row of `before` (N, D), by cosine, has the same number."""
    nearest = (normalize(found.double()) @ normalize(before.double()).T).argmax(1)
    return float((nearest == torch.arange(len(found), device=nearest.device)).double().mean())
