"""Detection of sudden convergence: the step at which a noisy curve of fidelity over training steps rises, if any.

A ControlNet does not learn gradually to follow its condition, it succeeds abruptly, usually within 10 000 steps. The
curve is fitted by a ramp, two levels with a straight rise between two of the measured steps a < b:

    v(s) = before + (after − before) · r(s),    r(s) = min(max((s − a) / (b − a), 0), 1)

by least squares, in closed form for every pair (a, b). Between neighbouring measurements a ramp and a step function are
the same. A rise counts if an F-test against a constant gives p < 1 %, corrected for the search over pairs (Bonferroni):

    F = (E₀ − E) / (E / ν),    ν = (n − 2) (1 − ρ) / (1 + ρ)

with the squared errors E₀ of the constant and E of the ramp; the residuals' correlation ρ ≥ 0 from one measurement to
the next lowers F, for a curve that wanders is no rise.

References:
    Adding Conditional Control to Text-to-Image Diffusion Models (Zhang et al., 2023), section 3 and figure 4,
    https://arxiv.org/abs/2302.05543
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from difftuning_control.evaluation.fidelity_record import Convergence

LEAST = 5
CHANCE = 0.01
SUDDEN = 0.25


@dataclass(frozen=True)
class _Ramps:
    """The best ramp between every two measurements, arrays (pairs,), and the squared error of a constant."""

    first: np.ndarray
    last: np.ndarray
    before: np.ndarray
    rise: np.ndarray
    error: np.ndarray
    constant: float

    @property
    def best(self) -> int:
        return int(self.error.argmin())


def _ramps(steps: np.ndarray, values: np.ndarray) -> _Ramps:
    """Least squares on r(s) for all pairs at once, from running sums over the measurements."""
    count, mean = len(steps), values.mean()
    s, y = (steps - steps[0]) / (steps[-1] - steps[0]), values - mean
    a, b = np.triu_indices(count, 1)
    ones, linear, square, value, product = (
        np.cumsum(v)[b] - np.cumsum(v)[a] for v in (np.ones(count), s, s * s, y, s * y)
    )
    width, after = s[b] - s[a], count - 1 - b
    r = (linear - s[a] * ones) / width + after
    rr = (square - 2 * s[a] * linear + s[a] ** 2 * ones) / width**2 + after
    ry = (product - s[a] * value) / width - np.cumsum(y)[b]  # the sum after b, for y sums to 0
    spread = rr - r**2 / count
    rise = ry / spread
    constant = float(y @ y)
    return _Ramps(a, b, mean - rise * r / count, rise, (constant - ry * rise).clip(min=0), constant)


def _chance(simple: float, full: float, freedom: float, degrees: int) -> float:
    """p of an F-test for one more parameter: squared errors without and with it, freedom that scales F, degrees."""
    from scipy.special import fdtrc  # saves scipy where no curve is tested

    if full <= 1e-12 * simple:  # no noise but that of rounding
        return 0.0
    return float(fdtrc(1, degrees, (simple - full) / full * freedom))


def _freedom(residuals: np.ndarray) -> float:
    """Degrees of freedom that residuals are worth, for they may resemble their neighbours."""
    power = float(residuals @ residuals)
    rho = max(0.0, float(residuals[1:] @ residuals[:-1]) / power) if power else 0.0
    return (len(residuals) - 2) * (1 - rho) / (1 + rho)


def _rise(steps: np.ndarray, values: np.ndarray) -> _Ramps | None:
    """The fits, if the best one rises beyond chance."""
    if len(steps) < LEAST or np.ptp(values) <= 1e-12 * np.abs(values).max():
        return None
    fits = _ramps(steps, values)
    k = fits.best
    if fits.rise[k] <= 0:
        return None
    a, b = steps[fits.first[k]], steps[fits.last[k]]
    residuals = values - fits.before[k] - fits.rise[k] * ((steps - a) / (b - a)).clip(0, 1)
    p = _chance(fits.constant, fits.error[k], _freedom(residuals), len(steps) - 2) * len(fits.error)
    return fits if p < CHANCE else None


def _curve(steps: Sequence[int], values: Sequence[float], higher_is_better: bool) -> tuple[np.ndarray, np.ndarray]:
    """The curve as arrays, turned so that up is better."""
    s, v = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if s.shape != v.shape or s.ndim != 1:
        raise ValueError(f"there are {s.shape} steps and {v.shape} values; expected as many of both.")
    if (np.diff(s) <= 0).any():
        raise ValueError("the steps of a curve must rise.")
    if not np.isfinite(v).all():
        raise ValueError("a value of the curve is not finite.")
    return s, v if higher_is_better else -v


def find_convergence(
    steps: Sequence[int], values: Sequence[float], higher_is_better: bool = True
) -> Convergence | None:
    """The rise of a fidelity curve by the module's fit; None if there is none beyond chance or under 5 measurements.

    Args:
        steps: at which it was measured, rising.
        values: of any range.

    Raises:
        ValueError: if the lengths differ, the steps do not rise or a value is not finite.
    """
    s, v = _curve(steps, values, higher_is_better)
    fits = _rise(s, v)
    if fits is None:
        return None
    k, sign = fits.best, 1 if higher_is_better else -1
    start, end = float(s[fits.first[k]]), float(s[fits.last[k]])
    before, rise = float(fits.before[k]), float(fits.rise[k])
    sudden = end - start <= SUDDEN * float(s[-1] - s[0])
    return Convergence(
        start=start,
        end=end,
        step=(start + end) / 2,
        before=sign * before,
        after=sign * (before + rise),
        sudden=sudden,
    )


def has_settled(
    steps: Sequence[int], values: Sequence[float], higher_is_better: bool = True, patience: int = 3, known: int = 0
) -> int | None:
    """The first step at which the curve up to it had visibly converged; None if it never had.

    The rise must end at least `patience` measurements before that step, and a rise that lasts until it must fit worse
    beyond chance, so that noise on a slow rise is not taken for a plateau. What comes after never changes the answer.

    Args:
        known: measurements of which it is known already that the curve had not settled by then.

    Raises:
        ValueError: as `find_convergence`, or if the patience is below 1.
    """
    if patience < 1:
        raise ValueError(f"the patience is {patience}; expected at least 1 measurement.")
    s, v = _curve(steps, values, higher_is_better)
    for count in range(max(LEAST, known + 1), len(s) + 1):
        if _settled(s[:count], v[:count], patience):
            return int(steps[count - 1])
    return None


def _settled(steps: np.ndarray, values: np.ndarray, patience: int) -> bool:
    fits, latest = _rise(steps, values), len(steps) - 1
    if fits is None or fits.last[fits.best] > latest - patience:
        return False
    rising, degrees = fits.error[fits.last == latest].min(), len(steps) - 4
    looks = len(steps)  # a slow rise is asked at every measurement whether it has ended
    return _chance(rising, fits.error[fits.best], degrees, degrees) * looks < CHANCE
