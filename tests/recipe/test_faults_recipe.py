"""Recipes that lost a section silently, and paths that begin with ~."""

import dataclasses
import os
from pathlib import Path

import pytest

from difftuning_control.errors import UserError
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.system.untrusted import from_json
from difftuning_control.verbs.commands import COMMANDS
from difftuning_control.verbs.parse import parse

# --- 4: keys that stand twice ---------------------------------------------------------------------------------------

TWICE = {
    "a section": ("training: {max_steps: 5}\ndata: {path: a}\ntraining: {seed: 3}\n", "training", 1, 3),
    "a key of a section": ("data:\n  path: a\n  flip: true\n  path: b\n", "path", 2, 4),
    "quoted and not": ('data:\n  path: a\n  "path": b\n', "path", 2, 3),
    "in one line": ("data: {path: a, path: b}\n", "path", 1, 1),
    "in a list": ("training:\n  sample_prompts: [{a: 1, a: 2}]\n", "a", 2, 2),
    "behind an alias": ("model: &m {id: x, id: y}\ndata: *m\n", "id", 1, 1),
}


@pytest.mark.parametrize("verb", ["train", "bank", "analyze", "pilot"])
@pytest.mark.parametrize("case", TWICE)
def test_fault_15_04_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path, verb, case):
    text, key, first, again = TWICE[case]
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"has the key {key} twice, in line {first} and in line {again}, and only one"):
        parse([verb, "--config", str(tmp_path / "r.yaml")])


def test_fault_15_04_the_same_key_in_two_sections_and_merged_ones_are_no_mistake(tmp_path):
    text = "data: &d {path: a, flip: true}\nbank: {path: b}\ncontrol: {path: null}\n"
    (tmp_path / "r.yaml").write_text(text)
    recipe = parse(["train", "--config", str(tmp_path / "r.yaml")])[1]
    assert (recipe.data.path, recipe.bank.path) == ("a", "b")
    (tmp_path / "r.yaml").write_text("data: &d {path: a, flip: true}\n".replace("{", "{<<: {path: c}, "))
    assert parse(["train", "--config", str(tmp_path / "r.yaml")])[1].data.path == "a"


@pytest.mark.parametrize("flag", ["--data={path: a, path: b}", '--control.params={"path": 1, "path": 2}'])
def test_fault_15_04_so_is_one_in_the_value_of_a_flag(flag):
    with pytest.raises(UserError, match=r"has the key path twice, in line 1 and in line 1"):
        parse(["train", flag])


def test_fault_15_04_so_is_one_in_json_and_in_the_head_of_a_table(tmp_path):
    from difftuning_control.data.sources import load_images

    with pytest.raises(ValueError, match=r"the key 'text' stands twice"):
        from_json('{"file_name": "a.png", "text": "one", "text": "two"}')
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one", "text": "two"}')
    with pytest.raises(
        UserError, match=r"metadata.jsonl cannot be read: line 1: the key 'text' stands twice; expected"
    ):
        load_images(str(tmp_path))
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text,text\na.png,one,two\n")
    with pytest.raises(UserError, match=r"metadata.csv cannot be read: the column 'text' stands twice; expected"):
        load_images(str(tmp_path))


# --- 8: ~ -----------------------------------------------------------------------------------------------------------

RECIPE = [
    "model.id",
    "data.path",
    "data.validation_path",
    "data.cache",
    "bank.path",
    "bank.prompts",
    "output",
]
PATHS = {
    "train": [*RECIPE, "gates.features"],
    "bank": RECIPE,
    "analyze": [*RECIPE, "analysis.features"],
    "pilot": [*RECIPE, "pilot.features"],
    "sample": ["run", "control", "output"],
    "evaluate": ["data", "source", "features", "output"],
    "export": ["run", "to", "evaluation"],
    "demo": ["output"],
    "verify": ["run"],
    "runs": ["folder"],
    "bench": ["output"],
    "completion": [],
    "recipes": [],
    "ui": ["folder"],
}
NEEDED = {
    "sample": ["--prompts=[red]"],
    "evaluate": ["--runs=[~/one, two]"],
    "export": ["--run=a", "--to=b"],
    "verify": ["--run=a"],
    "train": ["--gates.kid=1"],
}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    return tmp_path / "home"


def test_fault_15_08_no_verb_is_forgotten():
    assert {*PATHS, "resume"} == set(COMMANDS)


def test_fault_15_08_a_tilde_is_the_home_folder_of_a_run_that_goes_on(home):
    with pytest.raises(UserError, match=f"there is no folder {home}/run to resume"):
        parse(["resume", "~/run"])


@pytest.mark.sample("runs-folder")
@pytest.mark.parametrize(("verb", "key"), [(verb, key) for verb, keys in PATHS.items() for key in keys])
def test_fault_15_08_a_tilde_is_the_home_folder_in_every_path_of_every_verb(home, verb, key):
    needed = [flag for flag in NEEDED.get(verb, []) if not flag.startswith(f"--{key}=")]
    if verb == "sample" and key == "control":
        needed.append("--run=a")
    found = parse([verb, *needed, f"--{key}=~/mine"])[1]
    for name in key.split("."):
        found = getattr(found, name)
    assert found == f"{home}{os.sep}mine".replace(os.sep, "/")


@pytest.mark.wide
def test_fault_15_08_so_it_is_in_lists_in_recipes_and_in_what_python_makes(home):
    home.mkdir()
    (home / "r.yaml").write_text("output: ~/mine\ntuning: {schedule: {kind: constant}}\n")
    assert parse(["train", "--config", "~/r.yaml"])[1].output == f"{home}/mine"
    assert parse(["train", "--config=~/r.yaml"])[1].output == f"{home}/mine"
    assert parse(["pilot", "--config", "~/r.yaml"])[1].output == f"{home}/mine-pilot"
    assert parse(["evaluate", "--runs=[~/one, two]"])[1].runs == [f"{home}/one", "two"]
    assert parse(["verify", "~/one"])[1].run == f"{home}/one"
    (home / "s.json").write_text('{"u": [0.0, 1.0], "psi": [0.0, 1.0], "xi": [1.0, 0.0]}')
    found = parse(["train", "--tuning.schedule={kind: measured, path: ~/s.json}"])[1]
    assert found.tuning.schedule.path == f"{home}/s.json"
    control = "--control={annotator: supplied, bank_condition: blank, path: ~/c, init: ~/i}"
    supplied = parse(["train", "--method=controlnet", control])[1]
    assert (supplied.control.path, supplied.control.init) == (f"{home}/c", f"{home}/i")
    assert dataclasses.replace(Recipe(), output="~/x").output == f"{home}/x"
    (home / "peers").mkdir()
    (home / "peers" / "train_text_to_image_lora.py").write_text("")
    assert parse(["bench", "--parts=[lora]", "--peers=~/peers"])[1].peers == f"{home}/peers"


def test_fault_15_08_a_user_who_is_not_there_is_told_and_names_with_a_tilde_inside_stay():
    with pytest.raises(UserError, match=r"the path ~nobody-here/x begins with ~, and there is no such user; write "):
        parse(["train", "--output=~nobody-here/x"])
    assert parse(["train", "--output=./~/x"])[1].output == "./~/x"
    assert parse(["train", "--output=a~/x"])[1].output == "a~/x"
