"""The forgetting budget: how much the loss on the bank may rise in each noise band, kept by dual ascent.

    minimise  E_target[ψ ℓ]   subject to   ℓ_bank(b) ≤ (1 + ε_b) ℓ⁰_bank(b)   in every band b of u

Instead of one λ that is found by trial and error, each band has a multiplier μ_b that weighs its bank rows and follows
the constraint's violation, measured on the bank losses that the training step computes anyway:

    log μ_b ← log μ_b + η · (ℓ_bank(b) / ℓ⁰_bank(b) − 1 − ε_b)

ℓ⁰, the pretrained model's loss, is measured once, as a curve over u; both sides of the ratio are running means.

References:
    Constrained Optimization and Lagrange Multiplier Methods (Bertsekas, 1982), chapter 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difftuning_control.objective.noise import BANDS

RATE, MEMORY = 0.2, 0.95
LOWEST, HIGHEST = 1e-4, 1e3


class ForgettingBudget:
    """One multiplier a noise band.

    Args:
        allowed: ε of each band, (bands,), at least 0: 0.02 lets the bank's loss rise by 2 %.
        base_u, base_losses: ℓ⁰ on the bank at points of u, linear in between.
        start: μ of every band before the first step.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(self, allowed: Sequence[float], base_u: Sequence[float], base_losses: Sequence[float], start: float):
        if not allowed or not all(0 <= e < float("inf") for e in allowed):
            raise ValueError(f"the forgetting budget is {list(allowed)}; expected numbers of at least 0.")
        if len(base_u) != len(base_losses) or not all(loss > 0 for loss in base_losses):
            raise ValueError("the base's losses must be above 0, one for each u.")
        if not LOWEST <= start <= HIGHEST:
            raise ValueError(f"the multipliers' start is {start}; expected {LOWEST} to {HIGHEST}.")
        self.allowed = np.array(allowed, dtype=np.float64)
        self.base_u, self.base_losses = np.array(base_u), np.array(base_losses)
        self.multipliers = np.full(len(allowed), float(start))
        self._found, self._expected = np.zeros(len(allowed)), np.zeros(len(allowed))

    def bands_of(self, u: Tensor) -> np.ndarray:
        """The band of each u in [0, 1], (B,)."""
        return np.minimum((u.double().cpu().numpy() * len(self.allowed)).astype(int), len(self.allowed) - 1)

    def weights(self, u: Tensor) -> Tensor:
        """μ of each row's band, (B,) float32."""
        return torch.from_numpy(self.multipliers[self.bands_of(u)]).float().to(u.device)

    @property
    def rise(self) -> np.ndarray:
        """The bank loss's running rise over the base, by band; NaN where no row was seen yet."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self._expected > 0, self._found / self._expected - 1, np.nan)

    def update(self, losses: Tensor, u: Tensor, from_teacher: bool = False) -> None:
        """One step of dual ascent from the bank rows' losses ℓ (B,) at u (B,), of all processes.

        Args:
            from_teacher: the losses are distances to the pretrained model's prediction, which are 0 where nothing is
                forgotten: what the loss itself rises by on samples of that model.
        """
        bands = self.bands_of(u)
        expected = np.interp(u.double().cpu().numpy(), self.base_u, self.base_losses)
        measured = losses.double().cpu().numpy() + (expected if from_teacher else 0)
        for running, values in ((self._found, measured), (self._expected, expected)):
            running *= MEMORY
            running += np.bincount(bands, values, len(self.allowed))
        violation = np.nan_to_num(self.rise - self.allowed).clip(-1, 1)
        self.multipliers = (self.multipliers * np.exp(RATE * violation)).clip(LOWEST, HIGHEST)

    def state_dict(self) -> dict[str, Any]:
        return {
            "multipliers": self.multipliers.tolist(),
            "found": self._found.tolist(),
            "expected": self._expected.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.multipliers = np.array(state["multipliers"])
        self._found, self._expected = np.array(state["found"]), np.array(state["expected"])


def spread_budget(value: float | Sequence[float]) -> list[float]:
    """One number for all bands, or one a band, as a list of BANDS numbers.

    Raises:
        ValueError: for another number of bands, or a value below 0.
    """
    values = [float(value)] * BANDS if isinstance(value, (int, float)) else [float(v) for v in value]
    if len(values) != BANDS or not all(0 <= v < float("inf") for v in values):
        raise ValueError(f"the forgetting budget is {value}; expected one number of at least 0, or {BANDS} of them.")
    return values
