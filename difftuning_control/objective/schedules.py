"""Reconsolidation ψ(u) and retention ξ(u): how strongly new data and the pretrained model's own samples count.

    L(θ) = E_target[ψ(u) ℓ(θ; x, u)] + λ E_bank[ξ(u) ℓ(θ; x̂, u)]

u in [0, 1] is the noise coordinate, 0 clean and 1 pure noise: (t + 1)/T for DDPM-type processes, σ for flow matching.
It is not the signal-to-noise ratio. ψ never falls and ξ never rises with u; both are finite and at least 0.

References:
    Diffusion Tuning: Transferring Diffusion Models via Chain of Forgetting (Zhong et al., NeurIPS 2024),
    https://arxiv.org/abs/2406.00773
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

S = TypeVar("S")


@dataclass(frozen=True)
class PowerSchedule:
    """ψ(u) = u^τ and ξ(u) = 1 − u^τ. The paper's class-conditional experiments use τ = 1.

    Args:
        retention_tau: τ of ξ alone; that of ψ when None.
        psi_value: ψ at every level instead; None for u^τ.

    Raises:
        ValueError: unless 0 < tau < ∞, and retention_tau and psi_value likewise.
    """

    tau: float = 1.0
    retention_tau: float | None = None
    psi_value: float | None = None

    def __post_init__(self) -> None:
        _check_powers("power", self.tau, self.retention_tau, self.psi_value)

    def psi(self, u: Tensor) -> Tensor:
        return u**self.tau if self.psi_value is None else torch.full_like(u, self.psi_value)

    def xi(self, u: Tensor) -> Tensor:
        return 1 - u ** (self.tau if self.retention_tau is None else self.retention_tau)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "power", "tau": self.tau} | _given(retention_tau=self.retention_tau, psi_value=self.psi_value)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PowerSchedule:
        return _of_class(cls, values)


@dataclass(frozen=True)
class PaperSchedule:
    """The authors' code: ψ ∝ (t + 1)^τ and its mirror image ξ ∝ (T − t)^τ, that is ψ(u) = u^τ, ξ(u) = (1 − u + 1/T)^τ.

    Args:
        retention_tau: τ of ξ alone; that of ψ when None.
        psi_value: ψ at every level instead; None for u^τ.

    Raises:
        ValueError: unless 0 < tau < ∞, retention_tau and psi_value likewise, and num_train_timesteps ≥ 1.
    """

    tau: float = 1.0
    num_train_timesteps: int = 1000
    retention_tau: float | None = None
    psi_value: float | None = None

    def __post_init__(self) -> None:
        _check_powers("paper", self.tau, self.retention_tau, self.psi_value)
        if not 1 <= self.num_train_timesteps < math.inf:
            raise ValueError(f"num_train_timesteps is {self.num_train_timesteps}; it must be at least 1.")

    def psi(self, u: Tensor) -> Tensor:
        return u**self.tau if self.psi_value is None else torch.full_like(u, self.psi_value)

    def xi(self, u: Tensor) -> Tensor:
        tau = self.tau if self.retention_tau is None else self.retention_tau
        return (1 - u + 1 / self.num_train_timesteps) ** tau

    def to_dict(self) -> dict[str, Any]:
        values = {"kind": "paper", "tau": self.tau, "num_train_timesteps": self.num_train_timesteps}
        return values | _given(retention_tau=self.retention_tau, psi_value=self.psi_value)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PaperSchedule:
        return _of_class(cls, values)


@dataclass(frozen=True, init=False)
class ConstantSchedule:
    """The same at every noise level: ψ = 1, ξ = 0 is plain fine-tuning; ψ = ξ = 1 is DreamBooth's prior preservation.

    Raises:
        ValueError: unless psi is above 0 and xi at least 0, both finite.
    """

    psi_value: float
    xi_value: float

    def __init__(self, psi: float = 1.0, xi: float = 0.0):
        if not 0 < psi < math.inf:
            raise ValueError(f"psi is {psi}; it must be finite and above 0, or nothing is learnt.")
        if not 0 <= xi < math.inf:
            raise ValueError(f"xi is {xi}; it must be finite and at least 0.")
        object.__setattr__(self, "psi_value", float(psi))
        object.__setattr__(self, "xi_value", float(xi))

    def psi(self, u: Tensor) -> Tensor:
        return torch.full_like(u, self.psi_value)

    def xi(self, u: Tensor) -> Tensor:
        return torch.full_like(u, self.xi_value)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "constant", "psi": self.psi_value, "xi": self.xi_value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ConstantSchedule:
        return _of_class(cls, values)


@dataclass(frozen=True, init=False)
class TabulatedSchedule:
    """ψ and ξ measured at points u, linear between them and constant beyond the first and the last.

    Args:
        u: at least two points in [0, 1], strictly rising.
        psi: ψ at these points, not falling, at least 0 and somewhere above 0.
        xi: ξ at these points, not rising, at least 0.

    Raises:
        ValueError: where a condition above does not hold.
    """

    u: tuple[float, ...]
    psi_values: tuple[float, ...]
    xi_values: tuple[float, ...]

    def __init__(self, u: Sequence[float], psi: Sequence[float], xi: Sequence[float]):
        for name, values in (("u", u), ("psi_values", psi), ("xi_values", xi)):
            object.__setattr__(self, name, tuple(float(v) for v in values))
        if not (len(self.u) == len(self.psi_values) == len(self.xi_values) >= 2):
            lengths = f"{len(self.u)}, {len(self.psi_values)} and {len(self.xi_values)}"
            raise ValueError(f"u, psi and xi have {lengths} values; a table needs three lists of equal length ≥ 2.")
        if not (self.u[0] >= 0 and self.u[-1] <= 1 and all(a < b for a, b in zip(self.u, self.u[1:]))):
            raise ValueError("u must rise strictly and lie in [0, 1].")
        for name, values in (("psi", self.psi_values), ("xi", self.xi_values)):
            if not all(0 <= v <= 1e6 for v in values):  # beyond, float32 losses lose their meaning
                raise ValueError(f"{name} must lie between 0 and 1e6 everywhere.")
        if any(a > b for a, b in zip(self.psi_values, self.psi_values[1:])) or max(self.psi_values) == 0:
            raise ValueError("psi must not fall with u and must be above 0 somewhere.")
        if any(a < b for a, b in zip(self.xi_values, self.xi_values[1:])):
            raise ValueError("xi must not rise with u.")

    def _interpolate(self, u: Tensor, values: Sequence[float]) -> Tensor:
        points = torch.tensor(self.u, dtype=torch.float64, device=u.device)
        table = torch.tensor(values, dtype=torch.float64, device=u.device)
        x = u.to(torch.float64).clamp(points[0], points[-1])
        right = torch.searchsorted(points, x.contiguous()).clamp(1, len(points) - 1)
        left = right - 1
        share = (x - points[left]) / (points[right] - points[left])
        return torch.lerp(table[left], table[right], share).to(u.dtype)

    def psi(self, u: Tensor) -> Tensor:
        return self._interpolate(u, self.psi_values)

    def xi(self, u: Tensor) -> Tensor:
        return self._interpolate(u, self.xi_values)

    def to_dict(self) -> dict[str, Any]:
        table = {"u": list(self.u), "psi": list(self.psi_values), "xi": list(self.xi_values)}
        return {"kind": "measured", **table}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TabulatedSchedule:
        return _of_class(cls, values)


def _check_powers(kind: str, tau: float, retention_tau: float | None, psi: float | None) -> None:
    for name, value in (("tau", tau), ("retention_tau", retention_tau), ("psi", psi)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; a {kind} schedule needs a finite {name} above 0.")


def _given(**values: float | None) -> dict[str, float]:
    """What a schedule's description has of its options: those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def with_flat_retention(schedule: Schedule, u: Tensor) -> TabulatedSchedule:
    """The schedule's ψ with ξ = 1, as a table at the levels u (T,): what a forgetting budget trains with."""
    return TabulatedSchedule(u.tolist(), schedule.psi(u).tolist(), [1.0] * len(u))


def tabulate(function: Callable[[Tensor], Any], points: int = 1001) -> TabulatedSchedule:
    """The schedule of a function, as a table at evenly spaced u from 0 to 1.

    Args:
        function: given u (N,) float64, it gives ψ(u) and ξ(u), each (N,) or one number.

    Raises:
        ValueError: if it fails, or gives something else than a schedule may be.
    """
    u = torch.linspace(0, 1, points, dtype=torch.float64)
    try:
        psi, xi = (torch.as_tensor(v, dtype=torch.float64).expand(points).tolist() for v in function(u.clone()))
    except Exception as error:  # of somebody's function
        raise ValueError(f"the function gave no ψ(u) and ξ(u) for {points} values of u ({error}).") from None
    return TabulatedSchedule(u.tolist(), psi, xi)


Schedule = PowerSchedule | PaperSchedule | ConstantSchedule | TabulatedSchedule
KINDS: dict[str, type[Schedule]] = {
    "power": PowerSchedule,
    "paper": PaperSchedule,
    "constant": ConstantSchedule,
    "measured": TabulatedSchedule,
}


def schedule_from_dict(values: dict[str, Any]) -> Schedule:
    """The schedule that `to_dict` described, of whatever kind.

    Raises:
        ValueError: if the kind is unknown or its parameters are missing, superfluous or out of range.
    """
    parameters = dict(values)
    kind = parameters.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"schedule kind is {kind!r}; expected one of {', '.join(KINDS)}.")
    try:
        return KINDS[kind](**parameters)
    except TypeError as error:
        raise ValueError(f"a {kind} schedule cannot be made from {sorted(parameters)}: {error}.") from None


def _of_class(cls: type[S], values: dict[str, Any]) -> S:
    schedule = schedule_from_dict(values)
    if not isinstance(schedule, cls):
        raise ValueError(f"schedule kind is {values.get('kind')!r}, which is no {cls.__name__}.")
    return schedule


def timestep_density(values: Tensor, base_density: Tensor) -> Tensor:
    """p(i) ∝ values(i) · base(i) over the noise levels i: what the `sample` estimator draws from.

    Args:
        values: ψ or ξ at every level, (T,), at least 0.
        base_density: the family's own density over the levels, (T,), sums to 1.

    Returns:
        (T,) float64, sums to 1.

    Raises:
        ValueError: if nothing has weight.
    """
    density = values.double() * base_density.double()
    total = density.sum()
    if not total > 0:
        raise ValueError("the schedule is 0 at every noise level, so no timestep can be drawn from it.")
    return density / total


def draw_levels(density: Tensor, count: int, generator: torch.Generator | None, stratified: bool) -> Tensor:
    """`count` noise levels from a density (T,), by inverting its distribution function.

    With `stratified`, row k of a random order takes its uniform number from [k, k + 1)/count: each row alone has the
    given density, together they cover it evenly, which lowers the variance of a batch's loss.
    """
    device = generator.device if generator is not None else density.device
    exact = torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs do not have
    uniform = torch.rand(count, generator=generator, device=device, dtype=exact)
    if stratified and count > 1:
        order = torch.randperm(count, generator=generator, device=device)
        uniform = (order + uniform) / count
    cumulative = density.to(exact).to(device).cumsum(0)
    levels = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
    return levels.clamp(max=len(density) - 1)
