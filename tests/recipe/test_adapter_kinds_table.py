"""The table of adapter kinds is what recipes, cards, loading and export know of a kind."""

from __future__ import annotations

import dataclasses
from typing import get_args

import peft
import pytest

from difftuning_control.errors import UserError
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.adapter_kinds import KINDS, Kind, kind_of_peft
from difftuning_control.verbs.parse import parse

each = pytest.mark.parametrize("kind", KINDS)


def test_every_word_has_a_row():
    assert set(KINDS) == set(get_args(Kind))


@each
def test_options_are_keys_of_a_recipe_and_no_others_are_taken(kind):
    keys = {field.name for field in dataclasses.fields(AdapterConfig)} - {"kind", "on"}
    taken = KINDS[kind].options
    assert set(taken) <= keys
    given = {"rank": 6, "min_rank": 2, "alpha": 3.0, "targets": "to_q", "dropout": 0.1, "rslora": True}
    given |= {"init": "gaussian", "factor": 2, "block_size": 2, "text_encoder": True}
    for key, value in given.items():
        if key in taken:
            more = {"rank": 6} if (kind, key) == ("lokr", "alpha") or key == "min_rank" else {}
            assert getattr(AdapterConfig(kind, **more, **{key: value}), key) == value
        else:
            with pytest.raises(UserError, match=f"adapter.{key} is given, but kind {kind}"):
                AdapterConfig(kind, **{key: value})


@each
def test_a_kind_of_peft_s_has_a_class_there(kind):
    name = KINDS[kind].peft
    if name is None:
        assert kind == "difffit"
        return
    config = getattr(peft, f"{name}Config")
    found = kind_of_peft(config().peft_type.value)
    assert KINDS[found].peft == name


@pytest.mark.sample("lora")
@each
def test_the_command_line_offers_it(kind):
    assert parse(["train", "--adapter.kind", kind, "--data.path", "x", "--output", "y"])
