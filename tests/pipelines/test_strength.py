"""A strength over u: what is taken for one, its values, and what is refused."""

import copy
import math
import pickle

import pytest
import torch

from difftuning_control.errors import UserError
from difftuning_control.objective.schedules import ConstantSchedule, PaperSchedule, PowerSchedule, TabulatedSchedule
from difftuning_control.pipelines.strength import Strength, as_strength, check_u, stored

U = [0.0, 0.1, 0.25, 0.5, 0.75, 1.0]
MEASURED = TabulatedSchedule([0.1, 0.5, 0.9], [0.2, 0.4, 0.8], [1.0, 0.5, 0.1])


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.0])
def test_a_power_is_u_to_the_tau(tau):
    strength = as_strength({"kind": "power", "tau": tau})
    assert [strength(u) for u in U] == pytest.approx([u**tau for u in U], abs=1e-9)


@pytest.mark.parametrize("schedule", [PowerSchedule(0.3), PaperSchedule(1.0), ConstantSchedule(0.5), MEASURED])
def test_a_schedule_gives_its_psi_from_0_to_1(schedule):
    """ψ over its largest value, so that full strength is where the run learnt most."""
    strength = as_strength(schedule)
    psi = schedule.psi(torch.tensor(U, dtype=torch.float64))
    assert [strength(u) for u in U] == pytest.approx((psi / psi.max()).tolist(), abs=1e-9)
    again = as_strength(stored(strength))
    assert [again(u) for u in U] == [strength(u) for u in U]


def test_a_table_is_linear_between_its_points():
    strength = as_strength({"kind": "table", "u": [0, 0.5, 1], "strength": [1, 0.2, 0.6]})
    assert [strength(u) for u in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx([1, 0.6, 0.2, 0.4, 0.6])
    assert as_strength(stored(strength))(0.3) == strength(0.3)


def test_a_step_in_a_table_is_kept():
    strength = as_strength({"kind": "table", "u": [0, 0.4999, 0.5, 1], "strength": [0, 0, 1, 1]})
    assert [strength(u) for u in (0, 0.499, 0.5, 0.9)] == [0, 0, 1, 1]


def test_a_function_is_asked_and_not_stored():
    strength = as_strength(lambda u: 1 - u)
    assert strength(0.25) == 0.75
    assert stored(strength) is None
    assert as_strength(strength) is strength
    assert stored(None) is None


@pytest.mark.parametrize("given", [{"kind": "power", "tau": 0.5}, {"kind": "table", "u": [0, 1], "strength": [1, 0]}])
def test_a_strength_can_be_pickled_and_copied(given):
    strength = as_strength(given)
    for other in (pickle.loads(pickle.dumps(strength)), copy.deepcopy(strength)):
        assert [other(u) for u in U] == [strength(u) for u in U]
        assert stored(other) == stored(strength)
    assert pickle.loads(pickle.dumps(Strength(math.sin)))(0.5) == math.sin(0.5)


@pytest.mark.parametrize("value", [1.01, -0.1, math.nan, None, "1"])
def test_a_function_out_of_its_range_is_told_where(value):
    with pytest.raises(UserError, match=r"at u = 0\.500; expected a number from 0 to 1"):
        Strength(lambda u: value)(0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "table", "u": [0.1, 1], "strength": [0, 1]}, "covers u from 0.1 to 1; expected 0 to 1"),
        ({"kind": "table", "u": [0, 0.9], "strength": [0, 1]}, "covers u from 0 to 0.9; expected 0 to 1"),
        ({"kind": "table", "u": [0, 1.5], "strength": [0, 1]}, "u is .0, 1.5.; expected a list of numbers from 0 to 1"),
        ({"kind": "table", "u": [0, 1], "strength": [0, 2]}, "strength is .0, 2.; expected a list"),
        ({"kind": "table", "u": [0, 1], "strength": [0, math.nan]}, "strength is .*; expected a list"),
        ({"kind": "table", "u": [0, 0.5, 0.5, 1], "strength": [0, 1, 1, 1]}, "must rise"),
        ({"kind": "table", "u": [0, 1], "strength": [1]}, "as long as its strength, 1 values"),
        ({"kind": "table", "u": [0], "strength": [1]}, "must rise"),
        ({"kind": "table", "u": [0, 1]}, "the keys kind, u; expected kind, u and strength"),
        ({"kind": "powr", "tau": 1}, "kind is 'powr'; expected one of power, paper, constant, measured, table"),
        ({"kind": "power", "tau": -1}, "tau is -1"),
        ({"kind": "power", "sigma": 1}, "cannot be used"),
        (3.5, "the schedule is 3.5; expected a power"),
        ("no/such/run", "there is no folder no/such/run"),
    ],
)
def test_what_is_no_strength_is_told(given, message):
    with pytest.raises(UserError, match=message):
        as_strength(given)


@pytest.mark.wide
def test_a_run_gives_the_psi_that_it_was_trained_with(recipe):
    from dataclasses import replace

    from difftuning_control.recipe.training import ScheduleConfig
    from difftuning_control.verbs.train import train

    power = replace(recipe, tuning=replace(recipe.tuning, schedule=ScheduleConfig("power", tau=0.7)))
    train(power)
    assert as_strength(power.output)(0.5) == pytest.approx(0.5**0.7)
    longer = replace(recipe.training, max_steps=30, batch_size=20)
    tuning = replace(recipe.tuning, schedule=ScheduleConfig("auto"))
    auto = replace(recipe, output=recipe.output + "-auto", tuning=tuning, training=longer)
    record = train(auto).record
    measured = as_strength(auto.output)
    assert measured.values["psi"] == record.schedule.psi
    assert as_strength(f"{auto.output}/schedule.json")(0.4) == pytest.approx(measured(0.4))


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, "0.5", True, None])
def test_a_noise_level_out_of_its_range_is_told(value):
    with pytest.raises(UserError, match=r"^hand_over is .*; expected 0 to 1\.$"):
        check_u(value, "hand_over")
