"""One batch of training rows; which rows come from the knowledge bank is data, not position."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from difftuning_control.objective.rows import check_roles


@dataclass
class LatentBatch:
    """Rows ready for the denoiser.

    Args:
        latents: scaled latents, (B, C, h, w).
        conditioning: what the family's `predict` takes beside latents and timesteps, each (B, …): what it makes of
            prompts, `control` for a ControlNet, and `sizes` where it takes them.
        is_retention: True for rows from the bank, (B,) bool.
        ids: a name for every row, used in error messages.
        loss_weights: what multiplies the squared error at each place, (B, 1, h, w); 1 everywhere when None.
    """

    latents: Tensor
    conditioning: dict[str, Tensor]
    is_retention: Tensor
    ids: list[str] = field(default_factory=list)
    loss_weights: Tensor | None = None

    def __post_init__(self) -> None:
        for name, part in ({"latents": self.latents} | self.conditioning).items():
            if part.ndim == 0:
                raise ValueError(f"{name} is a single number; expected a tensor whose first dimension is the rows.")
        check_roles(self.is_retention)
        rows = len(self.latents)
        sizes = {name: len(t) for name, t in self.conditioning.items()} | {"is_retention": len(self.is_retention)}
        if self.loss_weights is not None:
            sizes["loss_weights"] = len(self.loss_weights)
        wrong = {name: n for name, n in sizes.items() if n != rows}
        if wrong:
            raise ValueError(f"latents have {rows} rows, but {wrong}; every part of a batch needs the same rows.")
        if len(self.ids) not in (0, rows):
            raise ValueError(f"there are {len(self.ids)} ids for {rows} rows; give one a row, or none.")

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> LatentBatch:
        """On a device; from memory that is pinned a GPU copies while nobody waits."""
        later = torch.device(device).type == "cuda"
        conditioning = {
            k: v.to(device, dtype if v.is_floating_point() else v.dtype, non_blocking=later)
            for k, v in self.conditioning.items()
        }
        latents = self.latents.to(device, dtype, non_blocking=later)
        roles, weights = self.is_retention.to(device, non_blocking=later), self.loss_weights
        weights = weights.to(device, non_blocking=later) if weights is not None else None
        return LatentBatch(latents, conditioning, roles, self.ids, weights)

    def rows(self, chosen: Tensor | slice) -> LatentBatch:
        """The chosen rows, by index, mask or slice."""
        numbers = torch.arange(len(self), device=self.latents.device)[chosen].tolist()
        conditioning = {k: v[chosen] for k, v in self.conditioning.items()}
        ids = [self.ids[i] for i in numbers] if self.ids else []
        weights = self.loss_weights[chosen] if self.loss_weights is not None else None
        return LatentBatch(self.latents[chosen], conditioning, self.is_retention[chosen], ids, weights)
