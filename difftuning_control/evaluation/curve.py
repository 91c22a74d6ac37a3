"""A relative change by noise band with its 95 % interval, and what the interval lets one say of it.

A band is above or below something only if its whole interval is; two bands differ only if their intervals do not meet.
What the intervals leave open is called open: a gap whose shape is within the noise neither rises nor falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SMALL, WIDE = 0.05, 1.0  # gaps below the one leave nothing to learn; above the other at every band, little carries over
ALIKE, NARROW = 0.2, 0.5  # of the largest gap: how far bands that are alike may differ, and their intervals reach


@dataclass(frozen=True)
class Curve:
    """A relative change by noise band with its 95 % interval, each of the three as long as `u`."""

    u: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]

    def to_dict(self) -> dict[str, list[float]]:
        return {"mean": self.mean, "low": self.low, "high": self.high}


def advice(gap: Curve) -> list[str]:
    """What a transfer gap says about retention, as codes that the report puts into words; none if it is not finite.

    no_gap: nothing to learn; uncertain: the intervals are wider than the gap; wide: the pretrained knowledge fits at
    no band; and the gap's shape: flat; not_monotone, for a band clearly below an earlier one; rising, for a band
    clearly above an earlier one and none below, the last one above the first; unclear, where the intervals hide it.
    """
    mean, low, high = (np.array(v, dtype=np.float64) for v in (gap.mean, gap.low, gap.high))
    if not len(mean) or not np.isfinite([mean, low, high]).all():
        return []
    uncertain = bool(np.median(high - low) > max(np.median(mean), SMALL))
    if high.max() < SMALL or (mean.max() < SMALL and not uncertain):
        return ["no_gap"]
    codes = ["uncertain"] if uncertain else []
    if low.min() > WIDE:
        codes.append("wide")
    shape = _shape(mean, low, high)
    return codes if shape is None or (shape == "unclear" and uncertain) else [*codes, shape]


def _shape(mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> str | None:
    if len(mean) < 2:
        return None
    top = mean.max()
    if mean.max() - mean.min() <= ALIKE * top and high.max() - low.min() <= NARROW * top:
        return "flat"
    pairs = [(earlier, later) for later in range(len(mean)) for earlier in range(later)]
    if any(high[later] < low[earlier] for earlier, later in pairs):
        return "not_monotone"
    half = len(mean) // 2
    grows = mean[-1] > mean[0] and mean[half:].mean() > mean[:half].mean()
    return "rising" if grows and any(low[later] > high[earlier] for earlier, later in pairs) else "unclear"


def against_limits(curve: Curve, limits: Sequence[float]) -> list[str]:
    """Of each band: kept (its whole interval is at most the limit), exceeded (its whole interval is above), unclear."""
    return [
        "kept" if high <= limit else "exceeded" if low > limit else "unclear"
        for low, high, limit in zip(curve.low, curve.high, limits)
    ]
