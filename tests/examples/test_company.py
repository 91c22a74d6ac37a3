"""The recipe of a company: one bank for all deliveries, whatever their captions are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from difftuning_control.data.prepare import prepare_bank
from difftuning_control.families.loading import load_family
from difftuning_control.recipe.inputs import DataConfig
from difftuning_control.recipe.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]


def test_a_second_delivery_takes_the_bank_that_the_first_drew(tmp_path: Path):
    recipe = Recipe.from_dict(yaml.safe_load((ROOT / "examples" / "company.yaml").read_text(encoding="utf-8")))
    config = replace(recipe.bank, size=2, steps=1, path=str(tmp_path / "bank"))
    family, data = load_family("embedded"), DataConfig(cache=str(tmp_path))
    first, second = (prepare_bank(family, config, data, [caption], 64) for caption in ("red apple", "dog face"))
    assert first.fingerprint == second.fingerprint
