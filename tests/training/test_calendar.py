"""The calendar of a run: what is due, what is still to come, and an early first grid."""

import itertools

import pytest

from difftuning_control.recipe.inputs import ControlConfig, FidelityConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.training import TrainingConfig
from difftuning_control.training.calendar import Calendar


def calendar(steps: int, validate: int, sample: int, kept: list[int], fidelity: int = 0) -> Calendar:
    training = TrainingConfig(max_steps=steps, validate_every=validate, sample_every=sample, save_at=kept)
    control = ControlConfig(fidelity=FidelityConfig(every=fidelity or 50))
    recipe = Recipe("controlnet" if fidelity else "lora", training=training, control=control)
    return Calendar(recipe, bool(fidelity))


@pytest.mark.parametrize(
    ("steps", "sample", "early"), [(300, 100, 30), (800, 100, 80), (300, 30, None), (19, 100, None), (300, 0, None)]
)
def test_the_first_grid_comes_within_a_tenth(steps, sample, early):
    found = calendar(steps, 0, sample, [])
    assert found.early == early
    if sample and steps >= 20:
        assert any(found.samples(step, steps) for step in range(1, steps // 10 + 1))


def test_what_is_to_come_is_what_will_be_due():
    for steps, validate, sample, fidelity in itertools.product((1, 20, 47), (0, 1, 7, 100), (0, 3, 50), (0, 5)):
        kept = [step for step in (3, 14) if step <= steps]
        due = calendar(steps, validate, sample, kept, fidelity)
        for done in range(steps + 1):
            after = range(done + 1, steps + 1)
            counted = {
                "validation": sum(due.validates(step, steps) for step in after),
                "sampling": sum(due.samples(step, steps) for step in after),
                "fidelity": sum(due.measures_fidelity(step, steps) for step in after),
            }
            assert due.to_come(done, steps) == counted, (steps, validate, sample, fidelity, done)


def test_checkpoints_are_not_saved_at_the_very_end():
    due = calendar(200, 0, 0, [])
    assert [step for step in range(1, 201) if due.saves(step, 200)] == [100]
