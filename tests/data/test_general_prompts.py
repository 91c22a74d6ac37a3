"""The general prompts that come with the package: for a bank, and, apart from these, for asking what is still drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from difftuning_control.data.bank_prompts import OUTSIDE, bank_prompts, general_prompts
from difftuning_control.data.prepare import prepare_bank
from difftuning_control.errors import UserError
from difftuning_control.families.loading import load_family
from difftuning_control.recipe.inputs import BankConfig, DataConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.verbs.train import train
from support.tiny_models import tiny_dit


@pytest.fixture(scope="module")
def of_model() -> dict:
    family = load_family("embedded")
    found = {"embedded": general_prompts(family)}
    family.pipe.register_to_config(_name_or_path="somewhere/else")
    return found | {"other": general_prompts(family)}


@pytest.mark.parametrize("model", ["embedded", "other"])
def test_each_prompt_is_there_once_and_those_that_are_asked_later_are_in_no_bank(of_model, model):
    prompts = of_model[model]
    assert len(prompts) == len(set(prompts)) == 96 + OUTSIDE
    assert all(prompt == prompt.strip() and prompt for prompt in prompts)


def test_the_embedded_model_has_its_own_in_each_of_its_styles(of_model):
    styles = [prompt.split()[0] for prompt in of_model["embedded"]]
    assert {style: styles.count(style) for style in styles} == dict.fromkeys(
        ("noto", "twemoji", "emojione", "fxemoji"), len(styles) // 4
    )
    assert not set(of_model["embedded"]) & set(of_model["other"])


def test_a_bank_is_drawn_for_them(tmp_path: Path):
    family = load_family("embedded")
    config = BankConfig(4, prompts="general", steps=1, path=str(tmp_path / "bank"))
    bank = prepare_bank(family, config, DataConfig(cache=str(tmp_path)), ["a cat"], 64, size=4)
    assert bank.prompts == general_prompts(family)[:4]
    assert bank_prompts(family, config, ["a cat"]) == general_prompts(family)[:-OUTSIDE]


def test_a_model_that_is_told_classes_refuses_them(pictures: Path, tmp_path: Path):
    tiny_dit().save_pretrained(tmp_path / "dit")
    recipe = Recipe.from_dict({"model": {"id": str(tmp_path / "dit")}, "data": {"path": str(pictures)}})
    recipe = replace(recipe, bank=replace(recipe.bank, prompts="general"), output=str(tmp_path / "o"))
    with pytest.raises(UserError, match="told classes and no prompts; say classes or both"):
        train(recipe)
    assert not (tmp_path / "o").exists()
