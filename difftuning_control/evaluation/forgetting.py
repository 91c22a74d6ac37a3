"""Measurements of the chain of forgetting: the transfer gap, what a model forgets and learns, and the schedule.

    transfer gap     g(u) = ℓ_target(u) / ℓ_bank(u) − 1     the pretrained model on new data against its own samples
    forgetting       f(u) = ℓ'_bank(u) / ℓ_bank(u) − 1      the tuned model (') on the bank against the pretrained one
    learnt           h(u) = 1 − ℓ'_target(u) / ℓ_target(u)

Both sides of a ratio see the same noise at the same timesteps (common random numbers), so what is left of chance is the
choice of pictures; its interval is Student's over the pairs, by the delta method (a bootstrap of few is too narrow).

The measured schedule: let G be the isotonic (never falling) fit of the gap, at least 0. Then

    ξ(u) = 1 / (1 + G(u))         the share of its competence that the pretrained model carries over to the new data
    ψ(u) = (1 − ξ(u)) / max       what is left to learn

References:
    Diffusion Tuning: Transferring Diffusion Models via Chain of Forgetting (Zhong et al., NeurIPS 2024),
    https://arxiv.org/abs/2406.00773
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from difftuning_control.data.latents import Part, part_of
from difftuning_control.errors import UserError
from difftuning_control.evaluation.curve import SMALL, Curve, advice
from difftuning_control.evaluation.losses import BandValidator
from difftuning_control.objective.batch import LatentBatch
from difftuning_control.objective.difftuning import DiffTuningObjective
from difftuning_control.objective.schedules import ConstantSchedule, TabulatedSchedule
from difftuning_control.recipe.measured_schedule import MeasuredSchedule

if TYPE_CHECKING:
    from difftuning_control.data.bank import KnowledgeBank
    from difftuning_control.families.family import Family
    from difftuning_control.families.prompts import PromptEmbeddings

SCHEDULE_BANDS = 10
LEAST_ROWS = 4


def paired_ratio(numerator: Tensor, denominator: Tensor, *, level: float = 0.95) -> tuple[Tensor, Tensor, Tensor]:
    """mean(numerator) / mean(denominator) − 1 by band, and its interval over the rows.

    With a_r and b_r the losses, d_r = a_r / ā − b_r / b̄ and s² = Σ d_r² / (N (N − 1)), the ends are
    ā / b̄ · exp(± t s) − 1, t being Student's quantile with N − 1 degrees of freedom.

    Args:
        numerator, denominator: losses (N, bands); row r of one had the same noise as row r of the other.
        level: of the interval.

    Returns:
        the ratio, its lower and its upper end, (bands,) float64 each.

    Raises:
        ValueError: if the shapes differ or there are fewer than 2 rows.
    """
    if numerator.shape != denominator.shape or numerator.ndim != 2 or len(numerator) < 2:
        raise ValueError(f"losses are {tuple(numerator.shape)} and {tuple(denominator.shape)}; expected equal (N, B).")
    above, below = numerator.double().numpy(), denominator.double().numpy()
    from scipy.stats import t  # takes a second to import

    count, ratio = len(above), above.mean(0) / below.mean(0)
    spread = np.square(above / above.mean(0) - below / below.mean(0)).sum(0) / (count * (count - 1))
    factor = np.exp(t.ppf((1 + level) / 2, count - 1) * np.sqrt(spread))
    return torch.from_numpy(ratio - 1), torch.from_numpy(ratio / factor - 1), torch.from_numpy(ratio * factor - 1)


def fit_schedule(u: list[float], gap: list[float]) -> TabulatedSchedule:
    """The measured schedule of a transfer gap: see the module's equations. A gap of 0 everywhere gives ψ = ξ = 1.

    Raises:
        ValueError: if a gap is not finite, or u does not rise within [0, 1].
    """
    from sklearn.isotonic import IsotonicRegression  # saves sklearn where a schedule is given

    if not np.isfinite(gap).all():
        raise ValueError("the transfer gap is not finite at every band.")
    fitted = IsotonicRegression(increasing=True).fit_transform(u, gap).clip(min=0)
    xi = 1 / (1 + fitted)
    learn = 1 - xi
    psi = learn / learn.max() if fitted.max() >= SMALL else np.ones_like(xi)
    if fitted.max() < SMALL:
        xi = np.ones_like(xi)
    return TabulatedSchedule(u, psi.tolist(), xi.tolist())


@dataclass(frozen=True)
class LossRows:
    """Rows to measure, the same number of target and bank rows: row r of both gets the same noise."""

    target: BandValidator
    bank: BandValidator

    @property
    def u(self) -> list[float]:
        return self.target.centres


def loss_rows(
    family: Family,
    target: Part,
    bank: Part,
    embeddings: PromptEmbeddings,
    *,
    rows: int | None = None,
    draws: int = 1,
    bands: int = SCHEDULE_BANDS,
    seed: int = 0,
) -> LossRows:
    """Validators for target and bank.

    Args:
        rows: at most so many of each side; as many as the smaller side has when None.
        draws: noise levels a row and band.

    Raises:
        UserError: if a side has fewer than 4 rows.
    """
    count = min(len(target.prompts), len(bank.prompts), rows if rows is not None else len(target.prompts))
    if count < LEAST_ROWS:
        raise UserError(
            f"the transfer gap needs at least {LEAST_ROWS} target pictures and bank samples; there are "
            f"{len(target.prompts)} and {len(bank.prompts)}."
        )
    return LossRows(*(row_validator(family, p, embeddings, count, draws, bands, seed) for p in (target, bank)))


def row_validator(
    family: Family,
    part: Part,
    embeddings: PromptEmbeddings,
    count: int,
    draws: int,
    bands: int,
    seed: int,
) -> BandValidator:
    """A validator of at most `count` rows, spread over those of `part`."""
    count = min(count, len(part.prompts))
    objective = DiffTuningObjective(family.process, ConstantSchedule(), retention_weight=0.0, retention_ratio=0.0)
    chosen = torch.linspace(0, len(part.prompts) - 1, count).round().long()  # spread: neighbours may share a prompt
    conditioning = embeddings.rows([part.prompts[i] for i in chosen.tolist()])
    if part.sizes is not None:
        conditioning["sizes"] = part.sizes[chosen]
    weights = part.loss_weights[chosen] if part.loss_weights is not None else None
    batch = LatentBatch(part.latents[chosen], conditioning, torch.zeros(count, dtype=torch.bool), loss_weights=weights)
    return BandValidator(family, objective, batch, seed, bands=bands, draws=draws)


def transfer_gap(rows: LossRows, denoiser: Any) -> tuple[Curve, dict[str, list[float]]]:
    """g(u) of a denoiser, and its mean losses {target, bank} by band."""
    target, bank = rows.target.rows(denoiser), rows.bank.rows(denoiser)
    losses = {"target": target.double().mean(0).tolist(), "bank": bank.double().mean(0).tolist()}
    return Curve(rows.u, *(t.tolist() for t in paired_ratio(target, bank))), losses


def relative_change(base: Tensor, tuned: Tensor, u: list[float]) -> Curve:
    """tuned / base − 1 by band, from losses (N, bands) of the same rows: f(u) on the bank, −h(u) on the target."""
    return Curve(u, *(t.tolist() for t in paired_ratio(tuned, base)))


def affordable_rows(steps: int, batch_size: int, available: int, share: float = 0.05) -> int:
    """How many rows of each side can be measured in a share of a tuning run's time.

    A training row costs a forward and a backward, about three forwards; a measured row costs a forward a band.

    Raises:
        UserError: if it is too few to measure anything.
    """
    rows = int(share * steps * batch_size * 3 / (2 * SCHEDULE_BANDS))
    if rows < LEAST_ROWS:
        raise UserError(
            f"a run of {steps} steps of {batch_size} rows is too short for tuning.schedule.kind auto, which may "
            f"take {share:.0%} of it; run difftune analyze and name its schedule.json with kind measured."
        )
    return min(rows, available)


def measure_schedule(
    family: Family,
    target: Part,
    bank: KnowledgeBank,
    embeddings: PromptEmbeddings,
    rows: int,
    seed: int = 0,
) -> MeasuredSchedule:
    """The schedule of the pretrained model on these data, with what was measured."""
    measured = loss_rows(family, target, part_of(bank, bank.prompts), embeddings, rows=rows, seed=seed)
    gap, losses = transfer_gap(measured, family.model)
    fitted = fit_schedule(gap.u, gap.mean)
    return MeasuredSchedule(
        u=list(fitted.u),
        psi=list(fitted.psi_values),
        xi=list(fitted.xi_values),
        gap=gap.to_dict(),
        losses=losses,
        advice=advice(gap),
        rows=rows,
    )
