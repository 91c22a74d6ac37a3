"""The pages of help: at most sixty lines, with options that there are; and the completion of shells."""

import re
from importlib import import_module
from importlib.util import find_spec

import pytest

from difftuning_control.cli import main
from difftuning_control.recipe.reading import keys_of
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.verbs.commands import COMMANDS
from difftuning_control.verbs.help import PAGES, help_page
from difftuning_control.verbs.spelling import SHORT

pages = pytest.mark.parametrize("verb", PAGES)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit, match="0"):
        main([*words])
    return capsys.readouterr().out


@pages
def test_help_is_a_page(capsys, verb):
    lines = printed(capsys, verb, "--help").splitlines()
    assert 10 < len(lines) <= 60
    assert max(map(len, lines)) <= 100
    assert printed(capsys, verb, "-h").splitlines() == lines


@pages
def test_all_of_a_pages_options_exist(verb):
    page = help_page(verb, COMMANDS[verb]) or ""
    known = {*keys_of(COMMANDS[verb]), *SHORT.get(verb, {}), "config", "help-all"}
    options = re.findall(r"--([a-z_.-]+)", page)
    assert len(options) > 4
    assert [o for o in options if o not in known and o != "model"] == []


def test_the_page_of_train_tells_defaults_and_units():
    page = " ".join((help_page("train", COMMANDS["train"]) or "").split())
    for said in (
        "--steps N length of the run, in optimizer steps (as fits the model) [training.max_steps]",
        f"with an adapter and 256 with other methods ({Recipe().bank.size})",
        "folder of the results (runs/difftuning)",
        "in pixels",
    ):
        assert said in page


def test_what_is_no_page_has_its_whole_help(capsys):
    assert "--json" in printed(capsys, "runs", "--help")
    assert len(printed(capsys, "train", "--help-all").splitlines()) > 300


def test_completion_without_its_package_is_a_mistake(capsys, monkeypatch):
    import_module("jsonargparse")  # looks for shtab once, as it is imported
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main(["completion", "bash"])
    assert "needs shtab; run pip install 'difftuning-control[completion]'" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("shtab") is None, reason="completion needs shtab")
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_verbs_options_and_short_names(capsys, shell):
    main(["completion", shell])
    script = capsys.readouterr().out
    for word in ("pilot", "training.max_steps", "lr", "from"):
        assert word in script
