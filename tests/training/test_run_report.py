"""A run leaves its report, an early grid, its resolution and its seconds; a second drawing takes a new folder."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from difftuning_control.cli import main
from difftuning_control.errors import UserError
from difftuning_control.families.fitting import usual_precision
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.requests import VerifyRequest
from difftuning_control.runs.verify import verify
from difftuning_control.system.signals import Interrupted
from difftuning_control.verbs import runners
from difftuning_control.verbs.train import train


@pytest.fixture(scope="module")
def made(tmp_path_factory, model_dir, pictures):
    root = tmp_path_factory.mktemp("reported")
    words = [
        *(
            "train",
            str(pictures),
            "--model",
            str(model_dir),
            "--steps",
            "20",
            "--batch",
            "4",
            "--out",
            str(root / "run"),
        ),
        *("--data.cache", str(root / "cache"), "--bank.size", "6", "--bank.steps", "2", "--data.holdout", "0.25"),
        *("--training.validate_every", "8", "--training.sample_steps", "2", "--training.checkpoint_every", "50"),
    ]
    main(words)
    return root / "run"


def test_a_run_leaves_its_report_and_verifies(made):
    page = (made / "report.html").read_text(encoding="utf-8")
    assert '<small class="complete">' in page
    assert re.findall(r'<th scope="row">([^<]*)</th>', page) == ["pretrained", "step 20", "step 2"]
    for phase in ("load", "encode", "bank", "validation", "training", "sampling", "saving"):
        assert f"<span>{phase}</span>" in page
    assert verify(VerifyRequest(str(made)))["status"] == "same"


def test_the_first_grid_comes_within_a_tenth(made):
    assert sorted(p.name for p in (made / "samples").iterdir()) == ["step-000002.png", "step-000020.png"]


def test_what_was_left_open_is_written_into_the_recipe(made):
    recipe = yaml.safe_load((made / "recipe.yaml").read_text())
    assert recipe["data"]["resolution"] == 16
    assert recipe["training"]["learning_rate"] == 1e-4
    assert recipe["training"]["mixed_precision"] == usual_precision()
    assert recipe["tuning"]["retention_ratio"] == 0.25  # one row of four
    assert json.loads((made / "run.json").read_text())["recipe"] == recipe


@pytest.mark.wide
def test_drawing_again_takes_a_new_folder(made, tmp_path, capsys):
    words = ["sample", str(made), "red 1", "--steps", "1", "--out", str(tmp_path / "drawn")]
    for name in ("drawn", "drawn-2", "drawn-3"):
        main(words)
        assert capsys.readouterr().out == f"done: 1 picture in {tmp_path / name}\n"
        assert (tmp_path / name / "000-red-1.png").is_file()
    (tmp_path / "drawn" / "mine.txt").write_text("kept")
    main(["sample", str(made), "blue 2", *words[3:], "--overwrite"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["drawn", "drawn-2", "drawn-3"]
    assert sorted(p.name for p in (tmp_path / "drawn").iterdir()) == ["000-blue-2.png", "mine.txt", "samples.json"]


def test_a_recipe_without_pictures_is_refused_before_anything(tmp_path):
    recipe = Recipe.from_dict({"output": str(tmp_path / "run")})
    with pytest.raises(UserError, match=r"names no pictures; give data\.path"):
        train(recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("saved", "begun"), [(None, False), (None, True), (3, True)])
def test_what_to_do_after_an_interruption_fits_what_was_written(tmp_path, monkeypatch, capsys, saved, begun):
    def interrupted(command: Recipe) -> None:
        if begun:
            Path(command.output).mkdir()
            (Path(command.output) / "run.json").write_text('{"status": "running"}')
        raise Interrupted(2, saved)

    monkeypatch.setitem(runners.RUNNERS, "train", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main(["train", "embedded/icons", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert ("difftune resume" in said) == begun
    assert ("nothing was written yet" in said) == (not begun)


def test_a_small_step_with_a_named_share_stays_refused(recipe, tmp_path):
    small = replace(recipe, training=replace(recipe.training, batch_size=4))
    with pytest.raises(UserError, match="leaves no row for the bank"):
        train(small)
    assert not Path(recipe.output).exists()
