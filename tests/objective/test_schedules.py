import json

import pytest
import torch

from difftuning_control.objective.schedules import (
    ConstantSchedule,
    PaperSchedule,
    PowerSchedule,
    TabulatedSchedule,
    draw_levels,
    schedule_from_dict,
    timestep_density,
)

TABLE = TabulatedSchedule(u=[0.1, 0.4, 0.9], psi=[0.0, 0.5, 2.0], xi=[3.0, 3.0, 0.25])
SCHEDULES = [
    PowerSchedule(0.3),
    PowerSchedule(1.0),
    PowerSchedule(2.0),
    PaperSchedule(0.5),
    PaperSchedule(2.0, 50),
    ConstantSchedule(),
    ConstantSchedule(2.0, 0.5),
    TABLE,
]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.to_dict()["kind"])
GRID = torch.linspace(0, 1, 501)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@every_schedule
def test_psi_and_xi_are_finite_and_not_negative(schedule):
    for values in (schedule.psi(GRID), schedule.xi(GRID)):
        assert values.shape == GRID.shape
        assert values.isfinite().all()
        assert (values >= 0).all()


@every_schedule
def test_psi_never_falls_and_xi_never_rises(schedule):
    assert (schedule.psi(GRID).diff() >= 0).all()
    assert (schedule.xi(GRID).diff() <= 0).all()


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.0])
def test_power_schedule_splits_one_between_new_and_old(tau):
    schedule = PowerSchedule(tau)
    torch.testing.assert_close(schedule.psi(GRID), GRID**tau)
    torch.testing.assert_close(schedule.psi(GRID) + schedule.xi(GRID), torch.ones_like(GRID))


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.0])
def test_paper_schedule_xi_mirrors_psi_on_the_timesteps(tau):
    u = torch.arange(1, 1001) / 1000
    schedule = PaperSchedule(tau, 1000)
    torch.testing.assert_close(schedule.xi(u), schedule.psi(u).flip(0))


def test_constant_schedule_defaults_to_plain_fine_tuning():
    assert (ConstantSchedule().psi(GRID) == 1).all()
    assert (ConstantSchedule().xi(GRID) == 0).all()


def test_tabulated_schedule_is_exact_at_its_points():
    u = torch.tensor(TABLE.u, dtype=torch.float64)
    assert TABLE.psi(u).tolist() == list(TABLE.psi_values)
    assert TABLE.xi(u).tolist() == list(TABLE.xi_values)


def test_tabulated_schedule_is_linear_between_its_points():
    u = torch.tensor([0.25, 0.5, 0.65])
    torch.testing.assert_close(TABLE.psi(u), torch.tensor([0.25, 0.8, 1.25]))
    torch.testing.assert_close(TABLE.xi(u), torch.tensor([3.0, 2.45, 1.625]))


def test_tabulated_schedule_is_constant_outside_its_points():
    u = torch.tensor([0.0, 0.05, 0.95, 1.0])
    torch.testing.assert_close(TABLE.psi(u), torch.tensor([0.0, 0.0, 2.0, 2.0]))
    torch.testing.assert_close(TABLE.xi(u), torch.tensor([3.0, 3.0, 0.25, 0.25]))


@every_schedule
def test_a_schedule_survives_json(schedule):
    assert schedule_from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


def test_schedule_from_dict_leaves_its_argument_alone():
    values = {"kind": "power", "tau": 2.0}
    schedule_from_dict(values)
    assert values == {"kind": "power", "tau": 2.0}


@pytest.mark.parametrize("tau", [0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("kind", [PowerSchedule, PaperSchedule])
def test_tau_must_be_finite_and_above_zero(kind, tau):
    with pytest.raises(ValueError, match=f"tau is {tau}; .* finite tau above 0"):
        kind(tau)


def test_paper_schedule_needs_a_timestep():
    with pytest.raises(ValueError, match="num_train_timesteps is 0; it must be at least 1"):
        PaperSchedule(1.0, 0)


@pytest.mark.parametrize("psi", [0.0, -1.0, float("inf"), float("nan")])
def test_constant_psi_must_be_finite_and_above_zero(psi):
    with pytest.raises(ValueError, match=f"psi is {psi}; it must be finite and above 0"):
        ConstantSchedule(psi)


@pytest.mark.parametrize("xi", [-1.0, float("inf"), float("nan")])
def test_constant_xi_must_be_finite_and_not_negative(xi):
    with pytest.raises(ValueError, match=f"xi is {xi}; it must be finite and at least 0"):
        ConstantSchedule(1.0, xi)


@pytest.mark.parametrize(
    ("u", "psi", "xi", "message"),
    [
        ([0.5], [1.0], [1.0], "equal length ≥ 2"),
        ([0.0, 1.0], [0.0, 1.0, 2.0], [1.0, 0.0], "2, 3 and 2 values"),
        ([0.5, 0.5], [0.0, 1.0], [1.0, 0.0], "u must rise strictly"),
        ([-0.1, 1.0], [0.0, 1.0], [1.0, 0.0], r"lie in \[0, 1\]"),
        ([0.0, 1.1], [0.0, 1.0], [1.0, 0.0], r"lie in \[0, 1\]"),
        ([0.0, float("nan")], [0.0, 1.0], [1.0, 0.0], "u must rise strictly"),
        ([0.0, 1.0], [-1.0, 1.0], [1.0, 0.0], "psi must lie between 0"),
        ([0.0, 1.0], [0.0, float("inf")], [1.0, 0.0], "psi must lie between 0"),
        ([0.0, 1.0], [0.0, 1.0], [float("nan"), 0.0], "xi must lie between 0"),
        ([0.0, 1.0], [0.0, 1e300], [1.0, 0.0], "psi must lie between 0 and 1e6"),
        ([0.0, 1.0], [1.0, 0.5], [1.0, 0.0], "psi must not fall"),
        ([0.0, 1.0], [0.0, 0.0], [1.0, 0.0], "psi must .* be above 0 somewhere"),
        ([0.0, 1.0], [0.0, 1.0], [0.0, 1.0], "xi must not rise"),
    ],
)
def test_a_table_that_is_no_schedule_is_refused(u, psi, xi, message):
    with pytest.raises(ValueError, match=message):
        TabulatedSchedule(u, psi, xi)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "schedule kind is None; expected one of power, paper, constant, measured"),
        ({"kind": "cosine"}, "schedule kind is 'cosine'; expected one of power"),
        ({"kind": "power", "gamma": 1.0}, r"a power schedule cannot be made from \['gamma'\]"),
        ({"kind": "power", "tau": "one"}, r"a power schedule cannot be made from \['tau'\]"),
        ({"kind": "measured", "u": [0, 1], "psi": [0, 1]}, "measured schedule cannot be made from .*'xi'"),
        ({"kind": "power", "tau": -1.0}, "tau is -1.0"),
    ],
)
def test_a_description_of_no_schedule_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        schedule_from_dict(values)


@every_schedule
def test_timestep_density_is_proportional_to_schedule_times_base_and_sums_to_one(schedule):
    u = torch.arange(1, 51) / 50
    base = torch.rand(50, generator=seeded(), dtype=torch.float64)
    density = timestep_density(schedule.psi(u), base / base.sum())
    assert density.dtype == torch.float64
    assert float(density.sum()) == pytest.approx(1.0, abs=1e-12)
    weights = schedule.psi(u).double() * base
    torch.testing.assert_close(density * weights.sum(), weights)


def test_timestep_density_refuses_a_schedule_that_is_zero_everywhere():
    with pytest.raises(ValueError, match="0 at every noise level"):
        timestep_density(torch.zeros(5), torch.full((5,), 0.2))


def uneven_density(levels: int) -> torch.Tensor:
    density = torch.rand(levels, generator=seeded(7), dtype=torch.float64) ** 2
    density[levels // 2] = 0
    return density / density.sum()


@pytest.mark.parametrize("stratified", [False, True])
def test_drawn_levels_follow_the_density(stratified):
    density, count = uneven_density(40), 200_000
    levels = draw_levels(density, count, seeded(), stratified)
    frequency = levels.bincount(minlength=40) / count
    assert ((frequency - density).abs() <= 5 * (density / count).sqrt()).all()


@pytest.mark.parametrize("stratified", [False, True])
def test_a_level_of_density_zero_is_never_drawn(stratified):
    density = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    assert set(draw_levels(density, 10_000, seeded(), stratified).tolist()) == {1, 3}


def test_stratified_rows_cover_each_stratum_exactly_once():
    density = torch.full((96,), 1 / 96, dtype=torch.float64)
    levels = draw_levels(density, 32, seeded(), stratified=True)
    assert (levels // 3).sort().values.tolist() == list(range(32))


def test_stratified_rows_stay_within_one_row_of_any_distribution_function():
    density, count = uneven_density(40), 64
    levels = draw_levels(density, count, seeded(), stratified=True)
    below = levels.bincount(minlength=40).cumsum(0)
    assert ((below - count * density.cumsum(0)).abs() <= 1 + 1e-9).all()


def test_each_stratified_row_alone_has_the_density():
    density, draws, rows = uneven_density(6), 4000, 4
    generator = seeded()
    levels = torch.stack([draw_levels(density, rows, generator, stratified=True) for _ in range(draws)])
    frequency = torch.nn.functional.one_hot(levels, 6).double().mean(0)
    assert ((frequency - density).abs() <= 5 * (density / draws).sqrt()).all()


def test_stratified_draws_vary_less_from_batch_to_batch():
    density, generator = uneven_density(40), seeded()
    spread = {
        stratified: torch.stack(
            [draw_levels(density, 16, generator, stratified).double().mean() for _ in range(200)]
        ).std()
        for stratified in (False, True)
    }
    assert spread[True] < 0.25 * spread[False]


@pytest.mark.parametrize("stratified", [False, True])
def test_the_same_generator_draws_the_same_levels(stratified):
    first, second = (draw_levels(uneven_density(40), 16, seeded(3), stratified) for _ in range(2))
    assert first.tolist() == second.tolist()
    assert first.tolist() != draw_levels(uneven_density(40), 16, seeded(4), stratified).tolist()


def test_without_a_generator_the_global_one_draws():
    torch.manual_seed(5)
    first = draw_levels(uneven_density(40), 16, None, stratified=True)
    torch.manual_seed(5)
    assert first.tolist() == draw_levels(uneven_density(40), 16, None, stratified=True).tolist()


def test_a_kind_that_is_no_word_and_a_parameter_by_its_inner_name_are_refused():
    with pytest.raises(ValueError, match="schedule kind is"):
        schedule_from_dict({"kind": ["power"]})
    with pytest.raises(ValueError, match="psi_value"):
        schedule_from_dict({"kind": "constant", "psi": 1.0, "psi_value": 5.0})


@pytest.mark.parametrize(
    "schedule",
    [
        PowerSchedule(0.3),
        PaperSchedule(2.0, 50),
        ConstantSchedule(psi=2.0, xi=0.5),
        TabulatedSchedule([0, 1], [0, 1], [1, 0]),
    ],
)
def test_each_class_reads_its_own_description_and_no_other(schedule):
    assert type(schedule).from_dict(schedule.to_dict()) == schedule
    other = PaperSchedule if isinstance(schedule, PowerSchedule) else PowerSchedule
    with pytest.raises(ValueError, match=f"which is no {other.__name__}"):
        other.from_dict(schedule.to_dict())
