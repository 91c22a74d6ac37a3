"""A pilot that also tries ordinary and Domain Guidance at several scales."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from difftuning_control.errors import UserError
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.inputs import ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.requests import VerifyRequest
from difftuning_control.recipe.studies import PilotConfig
from difftuning_control.runs.verify import verify
from difftuning_control.training.result import TrainingResult
from difftuning_control.verbs.pilot.guidance_search import best_way
from difftuning_control.verbs.pilot.pilot import Pilot, pilot
from difftuning_control.verbs.train import train
from support.tiny_models import tiny_flux
from support.tiny_pilots import tiny_pilot, tiny_study

SCALES = [2.0, 3.5]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, pictures: Path) -> Recipe:
    training = {"max_steps": 3, "learning_rate": 1e-3}
    return tiny_study(tmp_path_factory.mktemp("study"), model_dir, pictures, training, method="full")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PilotConfig:
    features = tmp_path_factory.mktemp("features") / "tiny"
    return tiny_pilot(features, ["plain", "difftuning_tau1"], learning_rates=[1e-3], guidance_scales=SCALES)


@pytest.fixture(scope="module")
def done(study: Recipe, config: PilotConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("pilot") / "out"
    return folder, pilot(replace(study, output=str(folder)), config, "en", False, tell=lambda text: None)


@pytest.mark.wide
def test_each_way_gets_the_scale_that_was_best_in_its_search(done):
    for side in done[1].sides:
        searched = side["guidance"]["search"]
        assert [(row["way"], row["scale"]) for row in searched] == [
            (way, scale) for way in ("ordinary", "domain") for scale in SCALES
        ]
        for way, found in side["guidance"]["ways"].items():
            assert not {"way", "scale", "strength"} & found["summary"].keys()
            best = min((row for row in searched if row["way"] == way), key=lambda row: row["kid"])
            assert (found["scale"], best["seeds"]) == (best["scale"], 2)
            assert [row["seed"] for row in found["runs"]] == [0, 1]


@pytest.mark.wide
def test_ordinary_guidance_at_the_pilots_own_scale_gives_the_pilots_own_figures(study, config, done, tmp_path):
    alone = replace(config, guidance_scales=[config.guidance_scale])
    result = pilot(replace(study, output=str(tmp_path / "out")), alone, "en", False, tell=lambda text: None)
    for side, kept in zip(result.sides, done[1].sides):
        ways = side["guidance"]["ways"]
        assert [r["kid"] for r in ways["ordinary"]["runs"]] == [r["kid"] for r in side["runs"]]
        assert [r["kid"] for r in ways["domain"]["runs"]] != [r["kid"] for r in side["runs"]]
        assert [r["kid"] for r in side["runs"]] == [r["kid"] for r in kept["runs"]]  # the search changes nothing else


@pytest.mark.wide
def test_whole_models_of_later_seeds_go_when_they_are_judged(done):
    folder, result = done
    for side in result.sides:
        first, second = (folder / run["folder"] for run in side["runs"])
        assert (first / "pipeline").is_dir()
        assert not (second / "pipeline").exists()
        assert (second / "guidance.json").is_file()


@pytest.mark.wide
def test_the_same_command_draws_nothing_again(done, study, config):
    folder, result = done
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("guidance.json")}
    again = pilot(replace(study, output=str(folder)), config, "ja", False, tell=lambda text: None)
    assert len(stamps) == 4
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("guidance.json")} == stamps
    assert again.sides == json.loads(json.dumps(result.sides))


@pytest.mark.wide
def test_a_side_and_a_seed_that_are_added_later_give_what_all_at_once_would(done, study, config, tmp_path):
    more = replace(config, sides=["plain", "prior", "difftuning_tau1"], seeds=[0, 1, 2])
    folder = tmp_path / "out"
    shutil.copytree(done[0], folder)
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("figures.json")}
    added = pilot(replace(study, output=str(folder)), more, "en", False, tell=lambda text: None)
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    fresh = pilot(replace(study, output=str(tmp_path / "fresh")), more, "en", False, tell=lambda text: None)
    assert [side["name"] for side in added.sides] == more.sides
    for ours, theirs in zip(added.sides, fresh.sides):
        assert len(ours["runs"]) == 3
        assert [row["kid"] for row in ours["runs"]] == [row["kid"] for row in theirs["runs"]]
        for summary in (ours["summary"]["3"], theirs["summary"]["3"]):
            summary.pop("seconds")
        assert ours["summary"] == theirs["summary"]
        assert ours["guidance"] == theirs["guidance"]
    assert verify(VerifyRequest(str(folder), strict=True))["status"] == "same"


@pytest.mark.wide
def test_guidance_that_was_lost_is_judged_again_with_the_same_result(done, study, config):
    """Of a later seed, whose weights are gone: they are trained again."""
    folder, result = done
    (folder / result.sides[0]["runs"][1]["folder"] / "guidance.json").unlink()
    again = pilot(replace(study, output=str(folder)), config, "en", False, tell=lambda text: None)
    assert again.sides[0]["guidance"] == json.loads(json.dumps(result.sides[0]["guidance"]))
    assert again.sides[0]["runs"] == json.loads(json.dumps(result.sides[0]["runs"]))


@pytest.mark.wide
def test_guidance_trains_nothing_again_where_several_lengths_were_judged(study, config, tmp_path, monkeypatch):
    """The weights of the best length are there until then, and of no length but the last afterwards."""
    trained: list[str] = []

    def counting(recipe: Recipe, **kwargs: bool) -> TrainingResult:
        trained.append(recipe.output)
        return train(recipe, **kwargs)

    monkeypatch.setattr("difftuning_control.verbs.pilot.side_runs.train", counting)
    several = replace(config, sides=["plain", "prior"], lengths=[2, 3], guidance_scales=[2.0])
    result = pilot(replace(study, output=str(tmp_path / "out")), several, "en", False, tell=lambda text: None)
    assert len(trained) == len(set(trained)) == 4
    assert [len(side["guidance"]["ways"]["domain"]["runs"]) for side in result.sides] == [2, 2]
    for side in result.sides:
        assert side["guidance"]["steps"] == side["best_length"]
        at_best = [run["kid"] for run in side["runs"] if run["steps"] == side["best_length"]]
        assert [run["kid"] for run in side["guidance"]["ways"]["ordinary"]["runs"]] == at_best  # both at the scale 2
    assert not list((tmp_path / "out").rglob("step-*"))


def test_the_report_shows_it(done):
    page = (done[0] / "report.html").read_text()
    assert "Guidance in sampling" in page or "サンプリング時のガイダンス" in page
    assert page.count("Domain Guidance</td>") == len(done[1].sides)


@pytest.mark.parametrize("scales", [[0.5], [2.0, 2.0], [float("inf")]])
def test_scales_that_are_none_are_refused(config, scales):
    with pytest.raises(UserError, match=r"pilot\.guidance_scales is .* different finite numbers of at least 1"):
        replace(config, guidance_scales=scales)


def test_a_controlnet_is_refused(study, config, tmp_path):
    recipe = replace(study, method="controlnet", output=str(tmp_path))
    with pytest.raises(UserError, match="a ControlNet's denoiser is the pretrained one"):
        Pilot(recipe, config, tmp_path)


def test_a_family_without_domain_guidance_is_refused_before_any_work(study, config, tmp_path):
    tiny_flux().save_pretrained(tmp_path / "flux")
    recipe = replace(study, model=ModelConfig(str(tmp_path / "flux")), output=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"not for a FluxPipeline; leave out pilot\.guidance_scales"):
        Pilot(recipe, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.wide
def test_a_mixture_that_is_added_is_a_third_way_and_changes_no_other(study, config, tmp_path):
    tuned = replace(study, method="lora", output=str(tmp_path / "out"))
    two = pilot(tuned, config, "en", False, tell=lambda text: None)
    half = replace(config, unconditional_strength=0.5)
    three = pilot(tuned, half, "en", False, tell=lambda text: None)
    for before, after in zip(two.sides, three.sides):
        ways, figures = after["guidance"]["ways"], {}
        assert list(ways) == ["ordinary", "domain", "mixture"]
        assert after["runs"] == before["runs"]
        for way in ("ordinary", "domain"):
            assert ways[way] == before["guidance"]["ways"][way]
        for way, drawn in ways.items():
            figures[way] = [row["kid"] for row in drawn["runs"]]
        assert figures["mixture"] not in (figures["ordinary"], figures["domain"])
    other = pilot(tuned, replace(config, unconditional_strength=0.2), "en", False, tell=lambda text: None)
    for before, after in zip(three.sides, other.sides):
        assert {r["strength"] for r in after["guidance"]["ways"]["mixture"]["runs"]} == {0.2}
        assert after["guidance"]["ways"]["domain"] == before["guidance"]["ways"]["domain"]
    assert "mixture" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_the_best_way_is_that_of_the_best_scale_with_all_seeds():
    rows = [("ordinary", 1.5, 1, 3.0), ("ordinary", 2.0, 3, 5.0), ("domain", 1.5, 3, 4.0), ("domain", 2.0, 3, 6.0)]
    search = [{"way": way, "scale": scale, "seeds": seeds, "kid": kid} for way, scale, seeds, kid in rows]
    ways = {"ordinary": {"scale": 2.0}, "domain": {"scale": 1.5}}
    assert best_way({"search": search, "ways": ways}) == ("domain", 1.5)


@pytest.mark.parametrize(("strength", "scales"), [(0.0, SCALES), (1.0, SCALES), (0.5, [])])
def test_a_mixture_that_is_none_or_has_no_scale_is_refused(config, strength, scales):
    with pytest.raises(UserError, match=r"pilot\.unconditional_strength is .* expected a number between 0 and 1"):
        replace(config, unconditional_strength=strength, guidance_scales=scales)


@pytest.mark.parametrize(("method", "kind"), [("full", "lora"), ("lora", "ia3")])
def test_a_mixture_of_what_has_no_strength_is_refused_before_any_work(study, config, method, kind, tmp_path):
    recipe = replace(study, method=method, adapter=AdapterConfig(kind=kind), output=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"pilot\.unconditional_strength takes a part of an adapter's strength"):
        Pilot(recipe, replace(config, unconditional_strength=0.5), tmp_path / "out")
    assert not (tmp_path / "out").exists()
