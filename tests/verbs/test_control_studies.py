"""Pilot and evaluation of ControlNets, end to end on a tiny model."""

from dataclasses import replace
from pathlib import Path

import pytest

from difftuning_control.errors import UserError
from difftuning_control.evaluation.report.tables import table
from difftuning_control.recipe.inputs import BankConfig, ControlConfig, DataConfig, FidelityConfig, ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import Evaluation, PilotConfig
from difftuning_control.recipe.training import TrainingConfig, TuningConfig
from difftuning_control.verbs.evaluate import evaluate
from difftuning_control.verbs.pilot.pilot import pilot
from difftuning_control.verbs.train import train
from support.feature_models import save_tiny_dinov2
from support.pictures import write_pictures


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_dinov2(tmp_path_factory.mktemp("features") / "tiny"))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, pictures: Path) -> Recipe:
    root = tmp_path_factory.mktemp("study")
    held_out = write_pictures(root / "held", 12, seed=7)
    return Recipe(
        method="controlnet",
        model=ModelConfig(str(model_dir)),
        data=DataConfig(str(pictures), holdout=0.0, validation_path=str(held_out), cache=str(root / "cache")),
        tuning=TuningConfig(retention_ratio=0.4),
        bank=BankConfig(size=12, steps=2, batch_size=6, path=str(root / "bank")),
        control=ControlConfig(fidelity=FidelityConfig(every=2, size=4, steps=2)),
        training=TrainingConfig(
            max_steps=4,
            batch_size=5,
            validate_every=0,
            validation_size=4,
            sample_every=0,
            learning_rate=1e-2,
            lr_scheduler="constant",
        ),
        output=str(root / "run"),
    )


@pytest.fixture(scope="module")
def config(features: str) -> PilotConfig:
    return PilotConfig(
        ["plain", "difftuning_tau1"],
        learning_rates=[1e-2, 1e-3],
        seeds=[0, 1],
        lengths=[2, 4],
        pictures=6,
        steps=2,
        guidance_scale=2.0,
        features=features,
    )


@pytest.fixture(scope="module")
def done(study: Recipe, config: PilotConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("pilot") / "out"
    return folder, pilot(replace(study, output=str(folder)), config, "en", False, tell=lambda text: None)


@pytest.mark.wide
def test_a_pilot_of_controlnets_judges_by_fidelity_and_shows_quality_beside_it(done):
    folder, result = done
    assert result.primary == "f1"
    for side in result.sides:
        assert [(r["seed"], r["steps"]) for r in side["runs"]] == [(0, 2), (0, 4), (1, 2), (1, 4)]
        assert all(isinstance(run[k], float) for run in side["runs"] for k in ("f1", "ssim", "kid", "bank_loss"))
    assert {"f1", "kid"} <= result.base.keys()
    assert "F1" in (folder / "report.html").read_text(encoding="utf-8")


def test_its_learning_rate_and_length_are_those_of_the_highest_fidelity(done):
    for side in done[1].sides:
        assert max(side["search"], key=lambda row: row["f1"])["learning_rate"] == side["learning_rate"]
        found = {n: [r["search"]["f1"] for r in side["runs"] if r["steps"] == n] for n in (2, 4)}
        assert sum(found[side["best_length"]]) == max(sum(values) for values in found.values())


@pytest.mark.wide
def test_a_pilot_goes_on_without_training_again(done, study, config, monkeypatch):
    folder, result = done
    monkeypatch.setattr("difftuning_control.verbs.pilot.side_runs.train", lambda *a, **k: pytest.fail("trained again"))
    again = pilot(replace(study, output=str(folder)), config, "en", False, tell=lambda text: None)
    assert again.sides == result.sides


def test_a_pilot_of_runs_that_stop_by_themselves_is_refused(study, features, tmp_path):
    training = replace(study.training, stop_when="converged")
    recipe = replace(study, training=training, output=str(tmp_path / "p"))
    with pytest.raises(UserError, match="equal length"):
        pilot(recipe, PilotConfig(features=features), "en", False)
    assert not (tmp_path / "p").exists()


@pytest.mark.wide
def test_an_evaluation_draws_controlnets_under_the_held_out_conditions_and_their_base_without(
    study, features, tmp_path
):
    runs = [replace(study, output=str(tmp_path / name)) for name in ("a", "b")]
    runs[1] = replace(runs[1], training=replace(study.training, seed=1))
    for run in runs:
        train(run)
    request = Evaluation(
        [r.output for r in runs],
        features=features,
        pictures=6,
        seeds=[0, 1],
        steps=2,
        guidance_scale=2.0,
        outside=["red 1"],
        output=str(tmp_path / "out"),
    )
    result = evaluate(request)
    assert all("f1" in s["summary"] and "ssim" in s["summary"] for s in (result["base"], *result["sides"]))
    assert "f1" in table(result)
    assert all("forgetting" not in s for s in result["sides"])
    figures = [s["summary"]["ssim"]["mean"] for s in (result["base"], *result["sides"])]
    assert len(set(figures)) == 3
