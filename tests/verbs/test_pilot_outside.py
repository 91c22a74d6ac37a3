"""A pilot that also asks what its sides still draw outside the new domain."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from difftuning_control.data.bank_prompts import OUTSIDE, general_prompts
from difftuning_control.errors import UserError
from difftuning_control.evaluation.report.pilot_steps import next_steps
from difftuning_control.families.loading import load_family
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.requests import VerifyRequest
from difftuning_control.recipe.studies import PilotConfig
from difftuning_control.runs.finished import finished_run
from difftuning_control.runs.verify import verify
from difftuning_control.verbs.commands import only
from difftuning_control.verbs.parse import parse
from difftuning_control.verbs.pilot.pilot import Pilot, pilot
from support.tiny_pilots import tiny_pilot, tiny_study

PROMPTS = ["noto emoji pizza", "noto emoji guitar", "twemoji emoji dog face", "emojione emoji red heart", "a tree"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, pictures: Path) -> Recipe:
    training = {"max_steps": 3, "learning_rate": 1e-3}
    return tiny_study(tmp_path_factory.mktemp("study"), model_dir, pictures, training)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PilotConfig:
    features = tmp_path_factory.mktemp("features") / "tiny"
    sides = ["plain", "difftuning_tau0.3_general_lambda1"]
    return tiny_pilot(features, sides, learning_rates=[1e-3], lengths=[2, 3], outside=PROMPTS)


def run(study: Recipe, config: PilotConfig, folder: Path):
    return pilot(replace(study, output=str(folder)), config, "en", False, tell=lambda text: None)


@pytest.fixture(scope="module")
def done(study: Recipe, config: PilotConfig, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("pilot") / "out"
    return folder, run(study, config, folder)


@pytest.mark.wide
def test_the_base_and_every_side_have_both_figures_of_each_seed(done):
    folder, result = done
    for found in (result.base["outside"], *(side["outside"] for side in result.sides)):
        assert [row["seed"] for row in found["runs"]] == [0, 1]
        assert all(0 <= row["still_drawn"] <= 1 for row in found["runs"])
        assert {"outside_kid", "still_drawn"} <= set(found["summary"])
    assert [side["outside"]["steps"] for side in result.sides] == [side["best_length"] for side in result.sides]
    assert [row.name for row in result.outside.rows] == ["base", "plain", "difftuning_tau0.3_general_lambda1"]
    assert all((folder / file).is_file() for row in result.outside.rows for file in row.files)
    assert verify(VerifyRequest(str(folder), strict=True))["status"] == "same"


@pytest.mark.wide
def test_prompts_that_are_named_later_give_what_they_would_have_given_at_once(study, config, done, tmp_path):
    """Even of a length whose weights are gone, and no figure is made anew."""
    folder = tmp_path / "out"
    before = run(study, replace(config, outside=[]), folder)
    assert before.outside is None
    assert not list(folder.rglob("outside*"))
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("figures.json")}
    after = run(study, config, folder)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("figures.json")} == stamps
    assert [side["outside"] for side in after.sides] == [side["outside"] for side in done[1].sides]
    assert after.base["outside"] == done[1].base["outside"]
    assert not list(folder.rglob(".*-aside"))
    assert verify(VerifyRequest(str(folder), strict=True))["status"] == "same"


@pytest.mark.wide
def test_the_same_command_asks_nothing_again_and_other_prompts_are_asked(study, config, done):
    folder, result = done
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("outside*.json")}
    (before,) = (folder / "base").glob("outside-*.safetensors")  # features of what the base drew
    assert len(stamps) == 2 + 4
    stamp = before.stat().st_mtime_ns
    again = run(study, config, folder)
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert before.stat().st_mtime_ns == stamp
    assert again.sides == json.loads(json.dumps(result.sides))
    other = run(study, replace(config, outside=PROMPTS[::-1]), folder)
    assert all(p.stat().st_mtime_ns != stamps[p] for p in stamps)
    assert other.outside.prompts == PROMPTS[::-1]
    run(study, config, folder)  # as the other tests of this module found it


@pytest.mark.wide
def test_a_model_that_learns_nothing_draws_what_the_base_draws(study, config, done, tmp_path):
    tuned = done[1]
    assert any(
        ours["outside_kid"] != pytest.approx(bases["outside_kid"], abs=1e-6)
        for side in tuned.sides
        for ours, bases in zip(side["outside"]["runs"], tuned.base["outside"]["runs"], strict=True)
    )
    still = run(study, replace(config, learning_rates=[1e-12], lengths=[3]), tmp_path / "out")
    for side in still.sides:
        for ours, bases in zip(side["outside"]["runs"], still.base["outside"]["runs"], strict=True):
            assert ours["outside_kid"] == pytest.approx(bases["outside_kid"], abs=1e-6)


@pytest.mark.wide
def test_the_side_of_general_prompts_retains_a_bank_of_its_own_under_these(study, done):
    folder, result = done
    general = next(side for side in result.sides if side["name"] == "difftuning_tau0.3_general_lambda1")
    assert general["tuning"]["retention_prompts"] == "own"
    asked = [
        json.loads(line)["prompt"] for line in (folder / "bank-general" / "prompts.jsonl").read_text().splitlines()
    ]
    assert asked == general_prompts(load_family(study.model.id))[:12]
    assert "bank" not in general["runs"][0]["losses"]  # others' rise is of other samples
    assert "bank" in result.sides[0]["runs"][0]["losses"]


@pytest.mark.wide
def test_the_command_that_the_report_names_for_it_retains_general_prompts_too(done):
    folder, result = done
    sides = {side["name"]: side for side in result.sides}
    for name, prompts in (("plain", "captions"), ("difftuning_tau0.3_general_lambda1", "general")):
        best = {"code": "best", "side": name, "metric": "kid", "reason": ""}
        command = next(s["command"] for s in next_steps(result, best, sides, False) if s["code"] == "next.train")
        trained = only(Recipe, parse(shlex.split(command)[1:])[1])
        ran = finished_run(folder / sides[name]["runs"][0]["folder"]).recipe
        assert (trained.bank.prompts, trained.bank.path) == (ran.bank.prompts, ran.bank.path)
        assert trained.bank.prompts == prompts
        assert trained.tuning == ran.tuning


@pytest.mark.wide
def test_the_pretrained_models_loss_is_that_of_the_first_side_that_was_measured_on_the_bank(study, config, done):
    """A side of general prompts is not; before, it being the first left the report without that figure."""
    folder, result = done
    turned = replace(config, sides=config.sides[::-1], outside=[])
    again = run(study, turned, folder.parent / "turned")
    assert again.base["bank_loss"] == result.base["bank_loss"]
    assert again.base["target_loss"] == result.base["target_loss"]


@pytest.mark.wide
def test_the_report_says_and_shows_it(done):
    page = (done[0] / "report.html").read_text()
    assert "What else the model still draws" in page
    assert page.count('alt="Pretrained model: noto emoji pizza"') == 1


@pytest.mark.parametrize("prompts", [["a"], ["a", "a", "b", "c", "d"]])
def test_too_few_prompts_or_one_twice_are_refused(config, prompts):
    with pytest.raises(UserError, match=r"pilot\.outside is .*; expected general, at least 5 prompts"):
        replace(config, outside=prompts)


@pytest.mark.wide
def test_general_stands_for_those_that_no_bank_is_drawn_for(study, config, tmp_path):
    general = replace(config, outside="general", sides=["plain", "prior"], lengths=[3])
    result = run(study, general, tmp_path / "out")
    asked = general_prompts(load_family(study.model.id))[-OUTSIDE:]
    assert result.base["outside"]["prompts"] == OUTSIDE
    assert result.outside.prompts == asked[:8]


def test_a_controlnet_is_refused(study, config, tmp_path):
    recipe = replace(study, method="controlnet", output=str(tmp_path))
    with pytest.raises(UserError, match="the denoiser beside a ControlNet is the pretrained one"):
        Pilot(recipe, replace(config, sides=["plain", "prior"]), tmp_path)
