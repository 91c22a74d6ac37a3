"""What the recipes need on a GPU: their first lines are read, each case is a command that is understood, and all of it
runs at tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from difftuning_control.errors import UserError
from difftuning_control.verbs.bench.sides import Timed
from support.scripts import loaded


@pytest.fixture(scope="module")
def recipes() -> ModuleType:
    return loaded(Path(__file__).with_name("recipes.py"))


def test_every_recipe_of_a_case_says_what_it_needs(recipes):
    said = {case.recipe: recipes.said(case.recipe) for case in recipes.CASES}
    assert said.pop(None) is None
    assert all(isinstance(gigabytes, int) and gigabytes < 24 for gigabytes in said.values()), said
    assert {case.model for case in recipes.CASES} == recipes.MODELS.keys()
    assert len({case.name for case in recipes.CASES}) == len(recipes.CASES)


def test_what_fails_is_a_row_and_what_was_measured_before_stays(recipes, tmp_path, monkeypatch):
    calls: list[list[str]] = []

    def run(command: list[str], folder: Path, threads: int | None) -> Timed:
        calls.append(command)
        if "sample" in command:
            raise UserError("ended with code 1\n(out of memory)")
        return Timed([1.0, 3.0, 2.0], [1.0], 4.0, 60.0, 1, 1.0, device_peak=11_100_000_000)

    monkeypatch.setattr(recipes, "run", run)
    case = next(case for case in recipes.CASES if case.name == "sdxl_lora")
    found = recipes.measured(case, tmp_path / "model", tmp_path, small=True)
    end = "11.1 GB |  | 2.00 | 60 s failed: ended with code 1 (out of memory) |"
    assert recipes.table([found]).splitlines()[-1] == f"| sdxl_lora | {recipes.said('sdxl_lora')} GB | {end}"
    assert [command[2] for command in calls] == ["train", "sample"]


@pytest.mark.slow
def test_all_cases_run_at_tiny_sizes(recipes, tmp_path, capsys):
    recipes.main(["--small", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "recipes.json")])
    found = json.loads((tmp_path / "recipes.json").read_text())
    assert [one["name"] for one in found] == [case.name for case in recipes.CASES]
    assert [one for one in found if "failed" in one] == []
    assert list((tmp_path / "work").glob("*/model_index.json")) == []
    assert "| z_image_lora, float8 |" in capsys.readouterr().out
