"""The Diff-Tuning objective, for our trainer and for anybody's loop.

    L(θ) = E_target[ψ(u) ℓ(θ; x, u)] + λ E_bank[ξ(u) ℓ(θ; x̂, u)]

ℓ is the model's own per-sample loss: the squared error of its prediction (ε, v or flow), averaged over the sample; of a
model that predicts its variance too, perhaps with the variational bound that trains it (`variance.py`).
Two estimators of L, with the same expected loss and gradient up to the constant Z_ψ = E[ψ(u)]:

    weight   u ~ the family's density p(u); a target row counts ψ(u), a bank row λ ξ(u).        Expectation L.
    sample   u ~ ψ p / Z_ψ for target rows and ~ ξ p / Z_ξ for bank rows; a target row counts 1, a bank row
             λ Z_ξ / Z_ψ. Expectation L / Z_ψ, with less variance where ψ and ξ vary much.

Target and bank rows are averaged separately, as in the authors' code, so λ does not depend on the bank's share of the
batch. ψ = 1, λ = 0 is plain fine-tuning; ψ = ξ = 1 is prior preservation.

References:
    Diffusion Tuning: Transferring Diffusion Models via Chain of Forgetting (Zhong et al., NeurIPS 2024),
    https://arxiv.org/abs/2406.00773
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from difftuning_control.objective.noise import BaseDensity, NoiseProcess, looked_up
from difftuning_control.objective.rows import (
    Bank,
    bank_latents,
    check_one_a_row,
    check_roles,
    check_same_shape,
    draw_items,
    extend_rows,
    moved,
    rows_of_share,
    sums_by_role,
)
from difftuning_control.objective.schedules import (
    ConstantSchedule,
    PaperSchedule,
    Schedule,
    draw_levels,
    timestep_density,
)
from difftuning_control.objective.variance import BOUND_WEIGHT, variational_bound

PRESETS = ("paper", "plain", "prior_preservation")


@dataclass(frozen=True)
class NoisedBatch:
    """A batch after the forward process: what the model is given, what it should predict, and at which levels."""

    noisy_model_input: Tensor
    timesteps: Tensor
    target: Tensor
    levels: Tensor


@dataclass(frozen=True)
class DiffTuningObjective:
    """Draws noise levels by the role of each row and weighs the per-sample loss.

    Args:
        process: the forward process the model was trained with.
        schedule: ψ and ξ.
        estimator: `sample` or `weight`, see the module's equation.
        retention_weight: λ, at least 0. The authors use 0.1.
        retention_ratio: share of a batch that comes from the bank, in [0, 1). The authors use 0.2.
        min_snr_gamma: multiplies ℓ by the min-SNR-γ weight (arXiv:2303.09556); None for none.
        stratified: spread the levels of a batch evenly over their density.
        variance: of a model that predicts it beside ε: `fixed` leaves that part untrained, `hybrid` adds
            0.001 · T · the bound's term to ℓ.

    Raises:
        ValueError: if a value is out of its range.
    """

    process: NoiseProcess
    schedule: Schedule
    estimator: Literal["sample", "weight"] = "sample"
    retention_weight: float = 0.1
    retention_ratio: float = 0.2
    min_snr_gamma: float | None = None
    stratified: bool = False
    variance: Literal["fixed", "hybrid"] = "fixed"

    def __post_init__(self) -> None:
        if self.variance not in ("fixed", "hybrid"):
            raise ValueError(f"variance is {self.variance!r}; expected fixed or hybrid.")
        if self.variance == "hybrid" and self.process.prediction != "epsilon":
            raise ValueError(f"variance is hybrid, which is defined for epsilon, not for {self.process.prediction}.")
        if self.variance == "hybrid" and not self.process.alphas[-1] > 0:
            raise ValueError(
                "variance is hybrid, whose bound divides by alpha, and alpha is 0 at the last level; say fixed."
            )
        if self.estimator not in ("sample", "weight"):
            raise ValueError(f"estimator is {self.estimator!r}; expected sample or weight.")
        if not 0 <= self.retention_weight < math.inf:
            raise ValueError(f"retention_weight is {self.retention_weight}; expected a finite number of at least 0.")
        if not 0 <= self.retention_ratio < 1:
            raise ValueError(f"retention_ratio is {self.retention_ratio}; expected at least 0 and less than 1.")
        if self.min_snr_gamma is not None:
            if not 0 < self.min_snr_gamma < math.inf:
                raise ValueError(f"min_snr_gamma is {self.min_snr_gamma}; expected a finite number above 0.")
            self.process.min_snr_weight(torch.zeros(1, dtype=torch.long), self.min_snr_gamma)
        timestep_density(self.psi, self.process.base_density)
        if self.uses_retention and not (self.xi > 0).any():
            raise ValueError(
                "the schedule's xi is 0 at every level, yet the batch has bank rows; "
                "set retention_ratio and retention_weight to 0 for plain fine-tuning."
            )

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        preset: str | None = None,
        schedule: Schedule | None = None,
        base_density: BaseDensity = "uniform",
        **settings: Any,
    ) -> DiffTuningObjective:
        """An objective for a diffusers scheduler object.

        `preset="paper"` is the authors' code: τ = 1, a fifth of the batch from the bank, λ = 0.1, sampled timesteps.
        `"plain"` is ordinary fine-tuning, `"prior_preservation"` DreamBooth's. Or give a `schedule`. `base_density` is
        how often the model trains at each level: logit_normal for Stable Diffusion 3.

        Raises:
            ValueError: for an unknown preset, or unless exactly one of preset and schedule is given.
        """
        if (preset is None) == (schedule is None):
            raise ValueError("give either preset= or schedule=, not both and not neither.")
        process = NoiseProcess.from_scheduler(scheduler, base_density)
        if preset == "paper":
            schedule = PaperSchedule(1.0, len(process))
        elif preset == "plain":
            schedule = ConstantSchedule(1.0, 0.0)
            settings = {"retention_weight": 0.0, "retention_ratio": 0.0} | settings
        elif preset == "prior_preservation":
            schedule = ConstantSchedule(1.0, 1.0)
            settings = {"retention_weight": 1.0, "retention_ratio": 0.5} | settings
        elif preset is not None:
            raise ValueError(f"preset is {preset!r}; expected one of {', '.join(PRESETS)}.")
        assert schedule is not None
        return cls(process, schedule, **settings)

    @property
    def uses_retention(self) -> bool:
        return self.retention_ratio > 0 and self.retention_weight > 0

    @property
    def psi(self) -> Tensor:
        """ψ at every level, (T,)."""
        return self.schedule.psi(self.process.u)

    @property
    def xi(self) -> Tensor:
        """ξ at every level, (T,)."""
        return self.schedule.xi(self.process.u)

    def density(self, retention: bool) -> Tensor:
        """What target rows (or bank rows) draw their level from, (T,)."""
        if self.estimator == "weight":
            return self.process.base_density
        return timestep_density(self.xi if retention else self.psi, self.process.base_density)

    def retention_rows(self, batch_size: int) -> int:
        """How many rows of a batch of this size come from the bank (rounded down, as in the authors' code)."""
        return rows_of_share(batch_size, self.retention_ratio) if self.uses_retention else 0

    # --- the hook for other people's loops: add_bank_rows, extend_rows (or mix), sample_timesteps, reduce ------------

    def add_bank_rows(
        self, latents: Tensor, bank: Bank, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Append rows of the bank to a batch of target rows, and say which.

        Args:
            latents: (B, C, h, w), scaled.
            bank: gives latents of the same shape and scale.

        Returns:
            latents of B + n rows; is_retention (B + n,) bool on their device; items (n,) long on the CPU, the numbers
            of the bank's items that were added. n = B r / (1 − r), rounded, at least 1, is what makes the bank's share
            r; it is 0 without retention. `extend_rows` gives whatever else the model is told its rows.

        Raises:
            ValueError: if the batch or the bank has no rows, or the bank's latents have another shape.
        """
        count = len(latents)
        if count == 0:
            raise ValueError(f"latents are {tuple(latents.shape)}; expected at least one target row.")
        extra = max(1, round(count * self.retention_ratio / (1 - self.retention_ratio))) if self.uses_retention else 0
        items = draw_items(bank, extra, generator) if extra else torch.zeros(0, dtype=torch.long)
        if extra:
            latents = torch.cat([latents, bank_latents(bank, items, latents)])
        return latents, torch.arange(len(latents), device=latents.device) >= count, items

    def mix(
        self,
        latents: Tensor,
        prompt_embeds: Any,
        bank: Bank,
        empty_prompt_embeds: Any,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Any, Tensor]:
        """`add_bank_rows` and `extend_rows` in one, where all bank rows are told the same and nothing is padded.

        Args:
            latents: (B, C, h, w), scaled.
            prompt_embeds: (B, L, D), or a list, tuple or dict as `extend_rows` takes.
            bank: gives latents of the same shape and scale.
            empty_prompt_embeds: the embedding of the empty prompt, (1, L, D), or built like `prompt_embeds`.

        Returns:
            latents and prompt_embeds of B + n rows, and is_retention (B + n,) bool.

        Raises:
            ValueError: if the parts do not agree in rows or shapes.
        """
        latents, is_retention, _ = self.add_bank_rows(latents, bank, generator)
        extended = extend_rows(prompt_embeds, empty_prompt_embeds, is_retention, name="prompt_embeds")
        return latents, extended, is_retention

    def sample_levels(self, is_retention: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A noise level for each row, by its role, (B,) long on the device of `is_retention`.

        Raises:
            ValueError: unless `is_retention` is (B,) bool.
        """
        check_roles(is_retention)
        levels = torch.empty(len(is_retention), dtype=torch.long)
        roles = is_retention.cpu()
        for retention in (False, True):
            count = int((roles == retention).sum())
            if count:
                drawn = draw_levels(self.density(retention), count, generator, self.stratified)
                levels[roles == retention] = drawn.cpu()
        return levels.to(is_retention.device)

    def sample_timesteps(self, is_retention: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A timestep for each row, by its role, as the model takes it, (B,).

        Raises:
            ValueError: unless `is_retention` is (B,) bool.
        """
        levels = self.sample_levels(is_retention, generator)
        return self.process.timesteps.to(levels.device)[levels]

    def row_weights(self, levels: Tensor, is_retention: Tensor, multipliers: Tensor | float | None = None) -> Tensor:
        """What multiplies each row's ℓ before target and bank rows are averaged separately, (B,) float32.

        Args:
            multipliers: stands in for λ, one number a row (B,).

        Raises:
            ValueError: unless levels, is_retention and multipliers have one number a row.
        """
        numbers = {"multipliers": multipliers} if isinstance(multipliers, Tensor) and multipliers.ndim else {}
        check_one_a_row(is_retention, levels=levels, **numbers)
        weight = self.retention_weight if multipliers is None else multipliers
        if self.estimator == "weight":
            psi, xi = self.psi.to(levels.device)[levels], self.xi.to(levels.device)[levels]
            weights = torch.where(is_retention, weight * xi, psi)
        else:
            weights = torch.where(is_retention, weight * self._balance(), 1.0).to(levels.device)
        if self.min_snr_gamma is not None:
            weights = weights * self.process.min_snr_weight(levels, self.min_snr_gamma)
        return weights.float()

    def _balance(self) -> float:
        """Z_ξ / Z_ψ, so that `sample` and `weight` mean the same λ; 1 for the paper's powers on DDPM levels."""
        base = self.process.base_density
        return float((self.xi.double() * base).sum() / (self.psi.double() * base).sum())

    def reduce(self, per_sample_loss: Tensor, timesteps: Tensor, is_retention: Tensor) -> Tensor:
        """The objective from the per-sample losses ℓ (B,), a scalar.

        Raises:
            ValueError: unless losses, timesteps and is_retention have one number a row.
        """
        check_one_a_row(is_retention, per_sample_loss=per_sample_loss, timesteps=timesteps)
        return self.combine(per_sample_loss, self.process.levels_of(timesteps), is_retention)

    # --- what the trainer, validation and analysis use ---------------------------------------------------------------

    def combine(
        self,
        per_sample_loss: Tensor,
        levels: Tensor,
        is_retention: Tensor,
        counts: tuple[int, int] | None = None,
        multipliers: Tensor | None = None,
    ) -> Tensor:
        """Σ over roles of the mean of weight · ℓ, a scalar.

        Args:
            counts: how many target and bank rows the means are over, where these rows are one process's part of a
                larger batch; the numbers in this batch when None.
            multipliers: stands in for λ, one number a row (B,).

        Levels, roles and multipliers may be on the CPU while the losses are on a GPU; nobody waits for it then.

        Raises:
            ValueError: unless losses, levels, is_retention and multipliers have one number a row.
        """
        check_one_a_row(is_retention, per_sample_loss=per_sample_loss)
        if counts is None:
            bank = int(is_retention.sum())
            counts = len(is_retention) - bank, bank
        weights = self.row_weights(levels, is_retention, multipliers)
        weighted = per_sample_loss.float() * moved(weights, per_sample_loss)
        target_sum, bank_sum = sums_by_role(weighted, is_retention)
        return target_sum / max(counts[0], 1) + bank_sum / max(counts[1], 1)

    def add_noise(self, latents: Tensor, noise: Tensor, levels: Tensor) -> NoisedBatch:
        """The forward process at the given levels, (B,) long.

        Raises:
            ValueError: unless latents and noise have one shape, and as many rows as there are levels.
        """
        check_same_shape(latents=latents, noise=noise)
        if levels.shape != latents.shape[:1]:
            raise ValueError(f"levels are {tuple(levels.shape)} for {len(latents)} latents; expected one a row.")
        return NoisedBatch(
            self.process.add_noise(latents, noise, levels),
            looked_up(self.process.timesteps, levels, latents.device),
            self.process.target(latents, noise, levels),
            levels,
        )

    def losses(
        self, model_output: Tensor, latents: Tensor, noised: NoisedBatch, loss_weights: Tensor | None = None
    ) -> Tensor:
        """ℓ of every row, (B,) float32.

        Args:
            model_output: (B, C, h, w), or (B, 2C, h, w) where the model predicts its variance too.
            latents: (B, C, h, w), without noise.
            loss_weights: as `per_sample_loss` takes them.

        Raises:
            ValueError: if the shapes do not agree, or `variance` is hybrid and the model does not predict it, or there
                are weights, which the bound knows not.
        """
        channels = latents.shape[1]
        model_pred, variance = model_output[:, :channels], model_output[:, channels:]
        losses = per_sample_loss(model_pred, noised.target, loss_weights)
        if self.variance == "fixed":
            return losses
        if variance.shape != latents.shape:
            raise ValueError(
                f"variance is hybrid, but the model gives {model_output.shape[1]} channels; expected {2 * channels}."
            )
        if loss_weights is not None:
            raise ValueError("variance is hybrid, whose bound is of whole samples; expected no loss_weights.")
        bound = variational_bound(self.process, latents, noised.noisy_model_input, model_pred, variance, noised.levels)
        return losses + BOUND_WEIGHT * len(self.process) * bound


def per_sample_loss(model_pred: Tensor, target: Tensor, loss_weights: Tensor | None = None) -> Tensor:
    """ℓ: the squared error averaged over everything but the batch, (B,) float32.

    Args:
        loss_weights: what multiplies the squared error at each place, (B, 1, h, w), as `mask_weights` makes them.

    Raises:
        ValueError: unless the two have one shape, and the weights as many rows and places.
    """
    check_same_shape(model_pred=model_pred, target=target)
    errors = (model_pred.float() - target.float()).square()
    if loss_weights is not None:
        expected = (len(target), 1, *target.shape[2:])
        if loss_weights.shape != expected:
            raise ValueError(f"loss_weights are {tuple(loss_weights.shape)}; expected {expected}.")
        errors = errors * loss_weights
    return errors.flatten(1).mean(1)
