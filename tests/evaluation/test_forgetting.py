"""The chain of forgetting: gaps that are planted are found, their intervals cover, and the schedule follows them."""

import numpy as np
import pytest
import torch
from torch import nn

from difftuning_control.data.bank import KnowledgeBank
from difftuning_control.data.embeddings import cached_embeddings
from difftuning_control.data.latents import Part
from difftuning_control.errors import UserError
from difftuning_control.evaluation.forgetting import (
    LEAST_ROWS,
    SCHEDULE_BANDS,
    Curve,
    advice,
    affordable_rows,
    fit_schedule,
    loss_rows,
    measure_schedule,
    paired_ratio,
    relative_change,
    transfer_gap,
)
from difftuning_control.evaluation.losses import BandValidator
from difftuning_control.objective.batch import LatentBatch
from difftuning_control.objective.difftuning import DiffTuningObjective
from difftuning_control.objective.schedules import ConstantSchedule

U = [(b + 0.5) / SCHEDULE_BANDS for b in range(SCHEDULE_BANDS)]


class Planted(nn.Module):
    """Predicts the noise of latents that are all zero with a known squared error: `base`, times 1 + gap(u) on targets.

    Target rows are told by their prompt. With latents of zero the noise is the input over σ.
    """

    def __init__(self, family, target_embeds, gap, base=0.04):
        super().__init__()
        self.family, self.target, self.gap, self.base = family, target_embeds, gap, base

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=False):
        process = self.family.process
        levels = process.levels_of(timestep)
        noise = sample / process.sigmas[levels].view(-1, 1, 1, 1)
        is_target = (encoder_hidden_states == self.target).flatten(1).all(1)
        loss = self.base * torch.where(is_target, 1 + self.gap(process.u[levels]), 1.0)
        return (noise + loss.sqrt().view(-1, 1, 1, 1),)


@pytest.fixture
def planted(family, tmp_path):
    """Measures a planted gap as the package would: the gap's curve and the losses."""
    embeddings = cached_embeddings(family, ["new", "old"], tmp_path, lambda count: None)
    zeros = torch.zeros(12, 4, 8, 8)

    def measure(gap):
        rows = loss_rows(family, Part(zeros, ["new"] * 12), Part(zeros, ["old"] * 12), embeddings)
        return transfer_gap(rows, Planted(family, embeddings.rows(["new"])["prompt_embeds"], gap))

    return measure


# --- planted gaps ---------------------------------------------------------------------------------------------------


def test_a_bank_equal_to_the_target_gives_no_gap_and_a_flat_schedule(planted):
    curve, losses = planted(lambda u: torch.zeros_like(u))
    assert curve.mean == pytest.approx([0.0] * SCHEDULE_BANDS, abs=1e-5)
    assert losses["target"] == pytest.approx([0.04] * SCHEDULE_BANDS, rel=1e-4)
    schedule = fit_schedule(curve.u, curve.mean)
    assert schedule.psi_values == schedule.xi_values == (1.0,) * SCHEDULE_BANDS
    assert advice(curve) == ["no_gap"]


def test_a_shift_at_the_top_band_alone_gives_a_step(planted):
    curve, _ = planted(lambda u: torch.where(u > 0.9, 3.0, 0.0))
    schedule = fit_schedule(curve.u, curve.mean)
    assert schedule.psi_values == pytest.approx([0.0] * 9 + [1.0], abs=1e-4)
    assert schedule.xi_values == pytest.approx([1.0] * 9 + [0.25], abs=1e-4)
    assert advice(curve) == ["rising"]


def test_a_shift_of_the_upper_half_gives_a_step_in_the_middle(planted):
    curve, _ = planted(lambda u: torch.where(u > 0.5, 1.0, 0.0))
    schedule = fit_schedule(curve.u, curve.mean)
    assert schedule.psi_values == pytest.approx([0.0] * 5 + [1.0] * 5, abs=1e-4)
    assert schedule.xi_values == pytest.approx([1.0] * 5 + [0.5] * 5, abs=1e-4)


def test_a_shift_at_one_low_band_is_pooled_and_said_to_be_not_monotone(planted):
    curve, _ = planted(lambda u: torch.where((u > 0.1) & (u <= 0.2), 2.0, 0.0))
    schedule = fit_schedule(curve.u, curve.mean)
    assert schedule.psi_values == pytest.approx([0.0] + [1.0] * 9, abs=1e-4)
    assert schedule.xi_values[1:] == pytest.approx([1 / (1 + 2 / 9)] * 9, rel=1e-3)
    assert advice(curve) == ["not_monotone"]


def test_a_gap_that_is_alike_everywhere_gives_a_flat_schedule(planted):
    curve, _ = planted(lambda u: torch.full_like(u, 0.5))
    schedule = fit_schedule(curve.u, curve.mean)
    assert schedule.psi_values == pytest.approx([1.0] * SCHEDULE_BANDS)
    assert schedule.xi_values == pytest.approx([1 / 1.5] * SCHEDULE_BANDS, rel=1e-4)
    assert advice(curve) == ["flat"]


def test_a_gap_that_rises_with_the_noise_is_read_off_exactly(planted):
    curve, _ = planted(lambda u: 2 * u)
    assert curve.mean == pytest.approx([2 * u for u in U], rel=2e-2)
    schedule = fit_schedule(curve.u, curve.mean)
    assert all(a < b for a, b in zip(schedule.psi_values, schedule.psi_values[1:]))
    assert schedule.xi_values == pytest.approx([1 / (1 + g) for g in curve.mean], rel=1e-9)
    assert advice(curve) == ["rising"]


def test_a_gap_that_is_wide_at_every_band_is_said_to_be(planted):
    curve, _ = planted(lambda u: 2 + 3 * u)
    assert advice(curve) == ["wide", "rising"]


def test_a_negative_gap_counts_as_none():
    assert fit_schedule(U, [-0.5] * SCHEDULE_BANDS).psi_values == (1.0,) * SCHEDULE_BANDS


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gap_that_is_not_finite_gives_no_schedule(bad):
    with pytest.raises(ValueError, match="not finite"):
        fit_schedule(U, [0.1] * 9 + [bad])


# --- intervals ------------------------------------------------------------------------------------------------------


def test_the_interval_of_equal_losses_has_no_width():
    losses = torch.rand(10, 3) + 0.5
    for part in paired_ratio(losses, losses):
        assert part.tolist() == [0.0] * 3


@pytest.mark.parametrize("rows", [4, 6, 30])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(rows):
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        pictures = rng.gamma(4.0, 1.0, (rows, 1))
        above, below = 1.3 * pictures * rng.gamma(20, 1 / 20, (rows, 1)), pictures
        _, low, high = paired_ratio(torch.from_numpy(above), torch.from_numpy(below))
        covered.append(bool(low[0] <= 0.3 <= high[0]))
    assert 0.92 <= np.mean(covered) <= 0.98


def test_pairs_make_the_interval_narrower_than_the_pictures_alone_would():
    rng = np.random.default_rng(0)
    pictures = rng.gamma(1.0, 1.0, (40, 1)) + 0.1
    paired = paired_ratio(torch.from_numpy(1.1 * pictures), torch.from_numpy(pictures))
    shuffled = paired_ratio(torch.from_numpy(1.1 * rng.permutation(pictures)), torch.from_numpy(pictures))
    assert float(paired[2] - paired[1]) < 1e-9 < 0.1 < float(shuffled[2] - shuffled[1])


@pytest.mark.parametrize(("above", "below"), [((3, 2), (4, 2)), ((1, 2), (1, 2)), ((4,), (4,))])
def test_losses_that_are_no_pairs_are_refused(above, below):
    with pytest.raises(ValueError, match="expected equal"):
        paired_ratio(torch.ones(above), torch.ones(below))


def test_few_pictures_of_unlike_difficulty_are_called_uncertain():
    wide = Curve(U, [0.3] * 10, [-0.4] * 10, [1.1] * 10)
    assert "uncertain" in advice(wide)


# --- what is measured on --------------------------------------------------------------------------------------------


def test_target_and_bank_rows_share_noise_and_timesteps(family, tmp_path):
    embeddings = cached_embeddings(family, ["a"], tmp_path, lambda count: None)
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = loss_rows(family, Part(latents, ["a"] * 6), Part(latents, ["a"] * 6), embeddings, draws=2)
    assert torch.equal(rows.target.rows(family.denoiser), rows.bank.rows(family.denoiser))


def test_more_draws_measure_the_same_thing_with_other_noise(family, tmp_path):
    embeddings = cached_embeddings(family, [""], tmp_path, lambda count: None)
    batch = LatentBatch(torch.zeros(4, 4, 8, 8), embeddings.rows([""] * 4), torch.zeros(4, dtype=torch.bool))
    objective = DiffTuningObjective(family.process, ConstantSchedule(), retention_weight=0.0, retention_ratio=0.0)
    one, many = (BandValidator(family, objective, batch, draws=d).rows(family.denoiser) for d in (1, 5))
    assert one.shape == many.shape == (4, 5)
    assert not torch.equal(one, many)
    assert torch.allclose(one.mean(0), many.mean(0), rtol=0.25)


def test_rows_are_spread_over_the_data_and_as_many_on_both_sides(family, tmp_path):
    embeddings = cached_embeddings(family, ["a", "b"], tmp_path, lambda count: None)
    target = Part(torch.arange(5.0).view(5, 1, 1, 1).expand(5, 4, 8, 8), ["a"] * 5)
    bank = Part(torch.arange(9.0).view(9, 1, 1, 1).expand(9, 4, 8, 8), ["b"] * 9)
    rows = loss_rows(family, target, bank, embeddings)
    assert rows.target.batch.latents[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert rows.bank.batch.latents[:, 0, 0, 0].tolist() == [0, 2, 4, 6, 8]


def test_too_few_pictures_are_refused(family, tmp_path):
    embeddings = cached_embeddings(family, ["a"], tmp_path, lambda count: None)
    few = Part(torch.zeros(LEAST_ROWS - 1, 4, 8, 8), ["a"] * (LEAST_ROWS - 1))
    with pytest.raises(UserError, match="at least 4 target pictures and bank samples; there are 3 and 3"):
        loss_rows(family, few, few, embeddings)


def test_comparing_a_model_with_itself_shows_nothing_forgotten(family, tmp_path):
    losses = torch.rand(8, 5) + 0.1
    assert relative_change(losses, losses, [0.1, 0.3, 0.5, 0.7, 0.9]).mean == [0.0] * 5
    assert relative_change(losses, 1.2 * losses, [0.1, 0.3, 0.5, 0.7, 0.9]).mean == pytest.approx([0.2] * 5)


# --- the time that measuring may take -------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "batch"), [(30, 32), (300, 16), (1000, 4), (100_000, 32)])
def test_measuring_stays_within_its_share_of_the_run(steps, batch):
    rows = affordable_rows(steps, batch, 10**9)
    assert 2 * rows * SCHEDULE_BANDS <= 0.05 * 3 * steps * batch


def test_no_more_rows_than_there_are_and_not_too_few():
    assert affordable_rows(10_000, 32, 7) == 7
    with pytest.raises(UserError, match=r"too short for tuning\.schedule\.kind auto"):
        affordable_rows(20, 10, 100)


def test_what_was_measured_is_recorded_beside_the_schedule(family, tmp_path):
    embeddings = cached_embeddings(family, ["a"], tmp_path, lambda count: None)
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    bank = KnowledgeBank(latents.flip(0), ["a"] * 6)
    measured = measure_schedule(family, Part(latents, ["a"] * 6), bank, embeddings, rows=5)
    assert list(measured.to_dict()) == ["kind", "u", "psi", "xi", "gap", "losses", "advice", "rows"]
    assert (measured.kind, measured.rows) == ("measured", 5)
    assert measured.build() == fit_schedule(measured.u, measured.gap["mean"])
    assert len(measured.gap["mean"]) == len(measured.losses["bank"]) == SCHEDULE_BANDS
