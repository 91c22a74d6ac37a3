"""A pilot whose sides retain by a teacher, measured like the others on one bank; and what it all took, by phase."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from difftuning_control.errors import UserError
from difftuning_control.recipe.inputs import BankConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import PilotConfig
from difftuning_control.recipe.training import TuningConfig
from difftuning_control.runs.record import read_run
from difftuning_control.verbs.pilot.pilot import Pilot, pilot
from support.feature_models import save_tiny_dinov2
from support.pictures import write_pictures

SIDES = ["plain", "teacher_bank", "teacher_empty", "teacher_own"]


@pytest.fixture
def study(recipe: Recipe, tmp_path: Path) -> Recipe:
    held_out = write_pictures(tmp_path / "held", 12, seed=7)
    return replace(
        recipe,
        data=replace(recipe.data, holdout=0.0, validation_path=str(held_out)),
        bank=BankConfig(steps=1),
        training=replace(recipe.training, max_steps=2, validate_every=0, checkpoint_every=100),
        output=str(tmp_path / "pilot"),
    )


@pytest.mark.wide
def test_sides_with_a_teacher_are_trained_and_measured_on_one_bank(study, tmp_path):
    features = str(save_tiny_dinov2(tmp_path / "features"))
    config = PilotConfig(SIDES, learning_rates=[1e-3], seeds=[0, 1], pictures=6, steps=2, features=features)
    told: list[str] = []
    result = pilot(study, config, "en", False, tell=told.append)
    assert [side["name"] for side in result.sides] == SIDES
    for side in result.sides:
        assert all("bank_loss" in run for run in side["runs"])
        assert side["tuning"]["retention"] == ("samples" if side["name"] == "plain" else "teacher")
    records = [read_run(Path(study.output) / run["folder"]) for side in result.sides for run in side["runs"]]
    assert {record.bank.size for record in records} == {64}  # one bank, as large as what is judged needs it
    assert len({record.fingerprints.bank for record in records}) == 1
    measured = [record.losses["bank"].base.losses for record in records]
    assert all(losses == measured[0] for losses in measured)  # with the same prompts, whatever each side retains under
    phases = result.cost.phases
    assert phases["bank"].forwards == 64 * 1 * 2  # drawn once, by the pilot
    trained = sum(record.phases["training"].forwards for record in records)
    assert phases["training"].forwards == trained == 8 * 2 * 5 + 6 * 2 * 1  # with a row asked of the teacher
    assert any(" in all: " in line for line in told)
    assert "Teacher on the bank" in (Path(study.output) / "report.html").read_text(encoding="utf-8")


def test_what_a_teacher_cannot_do_is_said_before_anything_is_drawn(study, tmp_path):
    hybrid = replace(study, tuning=TuningConfig(variance="hybrid"))
    with pytest.raises(UserError, match=r"tuning\.variance is hybrid"):
        Pilot(hybrid, PilotConfig(SIDES), tmp_path / "pilot")
    assert not (tmp_path / "pilot").exists()
