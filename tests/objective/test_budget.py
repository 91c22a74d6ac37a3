"""The forgetting budget: multipliers rise where the bank's loss rises too much, fall where it does not."""

import numpy as np
import pytest
import torch

from difftuning_control.objective.budget import HIGHEST, LOWEST, ForgettingBudget, spread_budget
from difftuning_control.objective.noise import BANDS

CENTRES = [(b + 0.5) / BANDS for b in range(BANDS)]
U = torch.tensor(CENTRES)


def budget(allowed=0.1, start=0.5):
    return ForgettingBudget([allowed] * BANDS, CENTRES, [0.5, 0.2, 0.1, 0.05, 0.01], start)


def base_losses():
    return torch.tensor([0.5, 0.2, 0.1, 0.05, 0.01])


def test_a_band_over_its_budget_gains_weight_and_the_others_lose_it():
    b = budget()
    b.update(base_losses() * torch.tensor([1.0, 1.5, 1.0, 1.0, 1.0]), U)
    assert b.multipliers[1] > 0.5
    assert all(b.multipliers[i] < 0.5 for i in (0, 2, 3, 4))
    assert b.rise == pytest.approx([0, 0.5, 0, 0, 0], abs=1e-6)


def test_exactly_on_the_budget_nothing_moves():
    b = budget()
    for _ in range(20):
        b.update(1.1 * base_losses(), U)
    assert b.multipliers == pytest.approx([0.5] * BANDS, rel=1e-4)


def test_dual_ascent_finds_the_multiplier_that_keeps_the_budget():
    """A model that trades: the bank's loss rises by 0.8 / (1 + 4 μ); with 10 % allowed the answer is μ = 1.75."""
    b, rng = budget(0.1, 0.01), np.random.default_rng(0)
    for _ in range(600):
        rise = 0.8 / (1 + 4 * b.multipliers)
        rows = rng.integers(0, BANDS, 8)
        noisy = (1 + rise[rows]) * base_losses().numpy()[rows] * rng.gamma(50, 1 / 50, 8)
        b.update(torch.from_numpy(noisy), U[rows])
    assert b.multipliers == pytest.approx([1.75] * BANDS, rel=0.35)
    assert b.rise == pytest.approx([0.1] * BANDS, abs=0.06)


def test_a_band_without_rows_stays_as_it_is():
    b = budget()
    b.update(2 * base_losses()[:1], U[:1])
    assert np.isnan(b.rise[1:]).all()
    assert list(b.multipliers[1:]) == [0.5] * 4


def test_multipliers_stay_within_their_bounds():
    b = budget()
    for _ in range(500):
        b.update(base_losses() * torch.tensor([9.0, 9.0, 0.1, 0.1, 0.1]), U)
    assert b.multipliers.tolist()[0] == HIGHEST
    assert b.multipliers.min() >= LOWEST


def test_weights_are_those_of_each_rows_band():
    b = budget()
    b.multipliers = np.arange(1.0, 6.0)
    assert b.weights(torch.tensor([0.0, 0.19, 0.2, 0.55, 0.999, 1.0])).tolist() == [1, 1, 2, 3, 5, 5]


def test_the_base_between_its_points_is_interpolated():
    b = ForgettingBudget([0.0] * BANDS, [0.0, 1.0], [1.0, 3.0], 1.0)
    b.update(torch.tensor([2.0]), torch.tensor([0.5]))
    assert b.rise[2] == pytest.approx(0.0)


def test_its_state_is_restored_exactly():
    one, other = budget(), budget()
    for seed in range(5):
        one.update(base_losses() * (1 + torch.rand(5, generator=torch.Generator().manual_seed(seed))), U)
    other.load_state_dict(one.state_dict())
    for b in (one, other):
        b.update(1.3 * base_losses(), U)
    assert one.state_dict() == other.state_dict()


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.02, [0.02] * BANDS), (0, [0.0] * BANDS), ([0, 0.1, 0.2, 0.3, 0.4], [0, 0.1, 0.2, 0.3, 0.4])],
)
def test_one_number_holds_for_all_bands(value, expected):
    assert spread_budget(value) == expected


@pytest.mark.parametrize("value", [-0.1, [0.1] * 3, [0.1, 0.1, 0.1, 0.1, -1.0], float("nan"), []])
def test_a_budget_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match="expected one number of at least 0, or 5 of them"):
        spread_budget(value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ForgettingBudget([], CENTRES, [1.0] * 5, 1.0),
        lambda: ForgettingBudget([-1.0], CENTRES, [1.0] * 5, 1.0),
        lambda: ForgettingBudget([0.1], CENTRES, [0.0] * 5, 1.0),
        lambda: ForgettingBudget([0.1], CENTRES, [1.0] * 4, 1.0),
        lambda: ForgettingBudget([0.1], CENTRES, [1.0] * 5, 0.0),
    ],
)
def test_what_no_budget_can_be_is_refused(make):
    with pytest.raises(ValueError, match=r"budget is|losses must|start is"):
        make()
