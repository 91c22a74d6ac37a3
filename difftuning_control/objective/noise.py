"""Forward processes, as one grid of noise levels i = 0 … T−1 from nearly clean to pure noise.

    noisy_model_input = α_i · latents + σ_i · noise

                     α_i           σ_i            target              u_i          timestep
    ε-prediction     √ᾱ_t          √(1 − ᾱ_t)     ε                   (t + 1)/T    t
    v-prediction     √ᾱ_t          √(1 − ᾱ_t)     α ε − σ x           (t + 1)/T    t
    flow matching    1 − σ         σ              ε − x               σ            σ · T

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239
    Progressive Distillation for Fast Sampling (Salimans & Ho, 2022), https://arxiv.org/abs/2202.00512
    Flow Matching for Generative Modeling (Lipman et al., 2023), https://arxiv.org/abs/2210.02747
    Scaling Rectified Flow Transformers (Esser et al., 2024), https://arxiv.org/abs/2403.03206
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "flow"]
BaseDensity = Literal["uniform", "logit_normal"]


@dataclass(frozen=True)
class NoiseProcess:
    """A forward process on T noise levels.

    Args:
        alphas: signal amplitude of each level, (T,).
        sigmas: noise amplitude of each level, (T,).
        timesteps: what the model is told at each level, (T,).
        u: noise coordinate of each level in [0, 1], rising, (T,).
        base_density: how often the family trains at each level, (T,), sums to 1.
        prediction: what the model predicts.
    """

    alphas: Tensor
    sigmas: Tensor
    timesteps: Tensor
    u: Tensor
    base_density: Tensor
    prediction: Prediction

    def __post_init__(self) -> None:
        if self.prediction not in ("epsilon", "v_prediction", "flow"):
            raise ValueError(f"prediction is {self.prediction!r}; expected epsilon, v_prediction or flow.")
        shapes = {tuple(t.shape) for t in (self.alphas, self.sigmas, self.timesteps, self.u, self.base_density)}
        if len(shapes) != 1 or self.alphas.ndim != 1:
            raise ValueError(f"the levels' tensors have shapes {sorted(shapes)}; expected one shape (T,).")
        if not bool((self.u[1:] > self.u[:-1]).all()) or self.u[0] < 0 or self.u[-1] > 1:
            raise ValueError("u must rise from level to level and lie in [0, 1].")
        if abs(float(self.base_density.sum()) - 1) > 1e-4:
            raise ValueError(f"base_density sums to {float(self.base_density.sum()):.4f}; expected 1.")

    def __len__(self) -> int:
        return len(self.u)

    @classmethod
    def from_scheduler(cls, scheduler: Any, base_density: BaseDensity = "uniform") -> NoiseProcess:
        """The training-time process of a diffusers scheduler object, DDPM-type or flow matching.

        Raises:
            ValueError: if the scheduler is of neither kind, predicts something else, or `base_density` is unknown.
        """
        config = scheduler.config
        prediction = config.get("prediction_type", "epsilon")
        by_flow = prediction == "flow_prediction" and config.get("use_flow_sigmas", False)
        by_flow = by_flow and not config.get("use_dynamic_shifting", False)
        if by_flow or "FlowMatch" in type(scheduler).__name__:
            sigmas = _flow_sigmas(config)
            timesteps = sigmas * config.num_train_timesteps
            density = _base_density(base_density, len(sigmas))
            return cls(1 - sigmas, sigmas, timesteps, sigmas, density, "flow")
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        continuous = config.get("timestep_type") == "continuous"  # the model is told a function of σ there, not t
        if alphas_cumprod is None or continuous or prediction not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"{type(scheduler).__name__} with prediction_type {prediction!r} is not supported; expected a "
                "DDPM-type scheduler with epsilon or v_prediction, or a flow-matching one."
            )
        alphas_cumprod = alphas_cumprod.detach().cpu().float()
        steps = torch.arange(len(alphas_cumprod))
        u = (steps + 1) / len(steps)
        density = _base_density(base_density, len(steps))
        return cls(alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5, steps, u, density, prediction)

    def shifted(self, shift: float) -> NoiseProcess:
        """The same levels with more noise, s σ / (1 + (s − 1) σ), each trained at as often as before.

        Raises:
            ValueError: for other processes than flow matching.
        """
        if self.prediction != "flow":
            raise ValueError(f"{self.prediction} has no timestep shift; only flow matching does.")
        sigmas = _shift(self.sigmas, shift)
        timesteps = self.timesteps * (sigmas / self.sigmas)
        return replace(self, alphas=1 - sigmas, sigmas=sigmas, timesteps=timesteps, u=sigmas)

    @property
    def time_sign(self) -> int:
        """1 where timesteps rise with the noise, −1 where they fall."""
        return 1 if self.timesteps[0] < self.timesteps[-1] else -1

    def levels_of(self, timesteps: Tensor) -> Tensor:
        """The level nearest to each of the model's timesteps, (B,)."""
        grid = self.time_sign * self.timesteps.to(timesteps.device, torch.float32)
        values = self.time_sign * timesteps.to(torch.float32)
        right = torch.searchsorted(grid, values.contiguous()).clamp(max=len(grid) - 1)
        left = (right - 1).clamp(min=0)
        return torch.where(values - grid[left] <= grid[right] - values, left, right)

    def u_at(self, timestep: Tensor | float) -> float:
        """The noise coordinate of a sampler's timestep, the first row's where it is given for each of a batch."""
        first = torch.as_tensor(timestep).reshape(-1)[:1].cpu()
        return float(self.u[self.levels_of(first)])

    def _at(self, table: Tensor, levels: Tensor, like: Tensor) -> Tensor:
        values = looked_up(table, levels, like.device).to(like.dtype)
        return values.view(-1, *[1] * (like.ndim - 1))

    def add_noise(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """α latents + σ noise, (B, …)."""
        return self._at(self.alphas, levels, latents) * latents + self._at(self.sigmas, levels, latents) * noise

    def target(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """What the model should predict, (B, …)."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "v_prediction":
            return self._at(self.alphas, levels, latents) * noise - self._at(self.sigmas, levels, latents) * latents
        return noise - latents

    def snr(self, levels: Tensor) -> Tensor:
        """α²/σ², (B,)."""
        return (self.alphas / self.sigmas).square().to(levels.device)[levels]

    def min_snr_weight(self, levels: Tensor, gamma: float) -> Tensor:
        """min(SNR, γ)/SNR for ε and min(SNR, γ)/(SNR + 1) for v, (B,) (Hang et al., 2023, arXiv:2303.09556).

        Raises:
            ValueError: for flow matching, where the weighting is not defined.
        """
        snr = self.snr(levels)
        if self.prediction == "epsilon":  # min(1, γ/SNR) is the same and stays finite at zero SNR
            return (gamma / snr).clamp(max=1.0)
        if self.prediction == "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1)
        raise ValueError("min-SNR weighting is defined for epsilon and v_prediction; leave min_snr_gamma empty here.")


def looked_up(table: Tensor, levels: Tensor, device: torch.device) -> Tensor:
    """Entries (B,) of a table at levels (B,), on a device: looked up where the levels are, which nobody waits for."""
    return table.to(levels.device)[levels].to(device, non_blocking=device.type == "cuda")


def _flow_sigmas(config: Any) -> Tensor:
    """Rising training sigmas of a flow-matching scheduler, with its static timestep shift s: s σ / (1 + (s − 1) σ)."""
    count = config.num_train_timesteps
    sigmas = torch.arange(1, count + 1, dtype=torch.float32) / count  # as diffusers does: it looks timesteps up with ==
    if not config.get("use_dynamic_shifting", False):
        sigmas = _shift(sigmas, config.get("shift", config.get("flow_shift", 1.0)))
    return sigmas


def _shift(sigmas: Tensor, shift: float) -> Tensor:
    return (shift * sigmas / (1 + (shift - 1) * sigmas)).clamp(max=1)  # rounded, pure noise can lie above 1


def _base_density(kind: str, count: int) -> Tensor:
    """Density over the unshifted levels: uniform, or the logit-normal (0, 1) of Stable Diffusion 3 (Esser et al.)."""
    if kind == "uniform":
        return torch.full((count,), 1 / count, dtype=torch.float64)
    if kind == "logit_normal":
        edges = torch.arange(count + 1, dtype=torch.float64) / count
        cumulative = 0.5 * (1 + torch.erf(torch.logit(edges) / math.sqrt(2)))
        return cumulative.diff()
    raise ValueError(f"base density is {kind!r}; expected uniform or logit_normal.")


BANDS = 5
