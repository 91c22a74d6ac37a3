"""Pipelines, recipes and examples that come with the package, as a verb and a function give them."""

from __future__ import annotations

import pytest

import difftuning_control
from difftuning_control.cli import main
from difftuning_control.errors import UserError
from difftuning_control.pipelines.registry import DROP_INS
from difftuning_control.system.shipped import Example, examples, near, shipped
from difftuning_control.verbs.parse import parse


def test_recipes_are_listed_with_one_line_each(capsys):
    main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    recipes = sorted(path.stem for path in shipped("examples").glob("*.yaml"))
    assert [line.split()[0] for line in lines if line and line.split()[0] in recipes] == recipes
    assert all(len(one.about) > 20 and one.about.endswith((".", "?")) for one in examples())
    assert max(map(len, lines)) < 170
    assert lines[-1].endswith("difftune recipes sd15_lora > mine.yaml")


@pytest.mark.parametrize("name", ["sd15_lora", "sd15_lora.yaml", "examples/sd15_lora.yaml"])
def test_a_recipe_is_printed_as_it_is(name, capsys):
    main(["recipes", name])
    assert capsys.readouterr().out == (shipped("examples") / "sd15_lora.yaml").read_text(encoding="utf-8")


def test_a_printed_recipe_is_one_that_train_takes(tmp_path, capsys):
    main(["recipes", "sd15_lora"])
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    verb, command = parse(["train", "--config", str(tmp_path / "mine.yaml")])
    assert (verb, command.adapter.kind, command.model.id.rpartition("/")[2]) == (
        "train",
        "lora",
        "stable-diffusion-v1-5",
    )


def test_the_hooks_are_among_them():
    hooks = {one.name: one.about for one in examples() if one.name.startswith("hooks/")}
    scripts = {path.stem for path in shipped("examples").glob("hooks/train_*.txt")}
    assert {f"hooks/{stem}" for stem in scripts} | {"hooks/apply", "hooks/hook_into_your_loop"} == set(hooks)
    assert "examples/controlnet/train_controlnet.py of diffusers" in hooks["hooks/train_controlnet"]


def test_a_recipe_that_is_not_there_is_told_with_near_ones(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["recipes", "sd5_lora"])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "'sd5_lora'" in said.err
    assert "did you mean sd15_lora" in said.err


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ("# One thing.\n#   a command\n# More.\n", "One thing."),
        ("# Is it so,\n# or so? Or else.\nkey: 1\n", "Is it so, or so?"),
        ('"""A script."""\n', "A script."),
        ("script: a.py of b 1\nbank: x\n", "The hook's lines for a.py of b 1."),
    ],
)
def test_an_example_is_told_by_its_first_sentence(tmp_path, text, about):
    (tmp_path / "one").write_text(text)
    assert Example("one", tmp_path / "one").about == about


@pytest.mark.parametrize("drop_in", DROP_INS, ids=lambda row: row.name)
def test_the_path_of_a_pipeline_is_found_by_its_file_and_by_its_class(drop_in):
    path = difftuning_control.pipeline_path(drop_in.file)
    assert isinstance(path, str)  # diffusers takes no other
    assert (
        path == difftuning_control.pipeline_path(drop_in.name) == difftuning_control.pipeline_path(f"{drop_in.file}.py")
    )
    with open(path, encoding="utf-8") as file:
        assert f"import {drop_in.name}" in file.read()


@pytest.mark.parametrize(
    ("name", "said"),
    [("difftuning_sd2", "difftuning_sd"), ("DiffTuningSDPipeline", "DiffTuningPipeline"), ("x", "one of")],
)
def test_a_pipeline_that_is_not_there_is_told_with_near_ones(name, said):
    with pytest.raises(UserError, match=f"no pipeline '{name}'.*{said}"):
        difftuning_control.pipeline_path(name)


def test_near_names_are_at_most_three():
    assert near("ab", ["abc", "abd", "abe", "abf"]).count(" or ") == 2
    assert near("xyz", ["abc"]) == "expected one of abc"
