"""README, docs/ and pages of the examples: links lead somewhere, commands parse, Python compiles, its imports exist."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path

import pytest
import yaml

import difftuning_control
from difftuning_control.pipelines.guiding import GUIDINGS
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.verbs.parse import parse
from support.documents import NAMES, ROOT, anchors, blocks, difftune_commands, links, shell_commands

page = pytest.mark.parametrize("name", NAMES)
WITH_COMMANDS = [name for name, path in NAMES.items() if list(difftune_commands(path.read_text(encoding="utf-8")))]
RUNS = ("runs/power", "runs/mine", "RUN")  # that commands read when they are parsed
HASH = "0" * 64


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working directory as a reader has it: the checkout's examples, recipes, and runs that began."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    recipe = Recipe()
    for path in ("recipe.yaml", *(f"{run}/recipe.yaml" for run in RUNS)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(yaml.safe_dump(recipe.to_dict()))
    for run in RUNS:
        record = {"status": "complete", "recipe": recipe.to_dict()}
        (tmp_path / run / "run.json").write_text(json.dumps(record))
    (tmp_path / "company.yaml").symlink_to(ROOT / "examples" / "company.yaml")
    (tmp_path / "scripts").mkdir()
    for script in ("train_text_to_image_lora.py", "train_controlnet.py"):
        (tmp_path / "scripts" / script).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@page
def test_links_lead_somewhere(name):
    path = NAMES[name]
    for link in links(path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), link
        assert found.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(found.read_text(encoding="utf-8")), link


@pytest.mark.sample("README.md")
@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_commands_parse(name, desk):
    for arguments in difftune_commands(NAMES[name].read_text(encoding="utf-8")):
        words = [HASH if word in ("$HEAD_HASH", "HASH") else word for word in arguments]
        assert parse(words)[0] == words[0]


def test_what_is_no_command_is_told(desk):
    text = "```bash\ndifftune train --data.path x --nothing 1\n```"
    (arguments,) = difftune_commands(text)
    with pytest.raises(difftuning_control.UserError, match="--nothing"):
        parse(arguments)


@page
def test_make_targets_are_there(name):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = NAMES[name].read_text(encoding="utf-8")
    called = [words[1] for words in shell_commands(text) if words[0] == "make"]
    for target in [*called, *re.findall(r"`make ([\w-]+)`", text)]:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@page
def test_python_compiles_and_its_imports_are_there(name):
    for block in blocks(NAMES[name].read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("difftuning_control", "diffusers")):
                there = dir(importlib.import_module(node.module or ""))  # lazy names too, without loading them
                assert [a.name for a in node.names if a.name not in there] == []


@page
def test_yaml_is_a_recipe(name, desk):
    for number, block in enumerate(blocks(NAMES[name].read_text(encoding="utf-8"), "yaml")):
        Path(f"block{number}.yaml").write_text(block, encoding="utf-8")
        assert parse(["train", "--config", f"block{number}.yaml", "--data.path", "embedded/icons"])


def test_the_readme_is_short_and_begins_with_the_two_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    first = "\n".join(lines[:50])
    assert "make demo" in first
    assert "make test" in first


def test_the_api_page_has_every_public_name():
    said = re.findall(
        r"^::: (difftuning_control[\w.]+)", NAMES["docs/api.md"].read_text(encoding="utf-8"), re.MULTILINE
    )
    assert set(difftuning_control.__all__) - {name.rpartition(".")[2] for name in said} == set()
    for name in said:
        assert is_defined(name.split(".")), name


def is_defined(parts: list[str]) -> bool:
    """Whether a dotted name of the package is a function or class of a module, or a method of a class there."""
    depth = next(i for i in range(len(parts), 0, -1) if ROOT.joinpath(*parts[:i]).with_suffix(".py").is_file())
    body = ast.parse(ROOT.joinpath(*parts[:depth]).with_suffix(".py").read_text(encoding="utf-8")).body
    for part in parts[depth:]:
        found = [n for n in body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == part]
        if not found:
            return False
        body = found[0].body
    return len(parts) > depth


@pytest.mark.parametrize("name", ["docs/design.md", "CONTRIBUTING.md"])
def test_the_files_that_it_names_are_there(name):
    package = ROOT / "difftuning_control"
    named = re.findall(r"`([\w/]+\.py)`", NAMES[name].read_text(encoding="utf-8"))
    assert named
    for path in named:
        assert (ROOT / path).exists() or (package / path).exists() or list(package.rglob(path)), path


def test_every_page_is_on_the_site():
    def pages(entry):
        for part in entry if isinstance(entry, list) else entry.values():
            yield from [part] if isinstance(part, str) else pages(part)

    site = yaml.load((ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8"), yaml.SafeLoader)
    listed = list(pages(site["nav"]))
    assert len(listed) == len(set(listed))
    assert {name.removeprefix("docs/") for name in NAMES} == set(listed)
    assert site["theme"]["font"] is False  # nothing comes from elsewhere
    for added in [*site.get("extra_css", []), *site.get("extra_javascript", [])]:
        assert (ROOT / "docs" / added).is_file()


def test_flux_pipelines_without_unconditional_rows_are_named_beside_them():
    (row,) = [line for line in NAMES["docs/pipelines.md"].read_text(encoding="utf-8").splitlines() if "| none:" in line]
    others = {"FluxFill": "FLUX Fill", "FluxControl": "FLUX Control", "Flux2": "FLUX.2 dev"}
    (guiding,) = [guiding for guiding in GUIDINGS if guiding.rows == "none"]
    for name in guiding.classes:
        stem = re.sub("(Img2Img|Inpaint)?Pipeline$", "", name)
        assert name in row or others.get(stem, name) in row, name


def test_the_schedule_that_the_readme_calls_the_papers_is_the_papers():
    (flag,) = re.findall(r"the paper's is `(--[^`]+)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    schedule = parse(["train", "--data.path", "embedded/icons", *flag.split()])[1].tuning.schedule
    assert schedule.build(1000).tau == 1.0
