"""Prompts of which the text encoder leaves out the end: said once, with their number, wherever they come from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from difftuning_control.data.prepare import prepare_bank
from difftuning_control.errors import UserError
from difftuning_control.families.loading import load_family
from difftuning_control.families.prompts import cut_note
from difftuning_control.recipe.inputs import BankConfig
from difftuning_control.recipe.studies import PilotConfig
from difftuning_control.verbs.pilot.outside_runs import named_prompts
from difftuning_control.verbs.train import train

LONG = "a red square " * 9


def test_a_note_has_the_number_of_prompts_and_of_tokens(family):
    length, most = family.prompt_tokens(LONG)
    note = cut_note(family, ["red", LONG, LONG, LONG + "blue"], "prompts of a file")
    assert note is not None
    assert note.startswith("note: 2 of 3 prompts of a file have more tokens than the text encoder takes ('a red square")
    assert f"has {length}, it takes {most}); what follows is left out" in note
    assert cut_note(family, ["red"], "prompts") is None


def test_where_the_stock_pipeline_does_not_cut_they_are_refused(family, monkeypatch):
    monkeypatch.setattr(type(family), "cuts_prompts", False)
    with pytest.raises(UserError, match="at most 16 are taken here; shorten it"):
        cut_note(family, ["red", LONG], "prompts")


def test_a_long_line_of_a_bank_s_prompts_is_said(recipe, model_dir, tmp_path):
    file, lines = tmp_path / "prompts.txt", []
    file.write_text(f"red\n{LONG}\nblue\n")
    bank = BankConfig(prompts=str(file), size=3, steps=1)
    prepare_bank(load_family(str(model_dir)), bank, recipe.data, [], 16, tell=lines.append)
    assert [line for line in lines if "1 of 3 prompts of the bank have more tokens" in line] == lines
    assert len(lines) == 1


def test_a_long_prompt_of_the_sample_grids_is_said_once(recipe):
    lines: list[str] = []
    training = replace(recipe.training, sample_prompts=["red", LONG], max_steps=1)
    train(replace(recipe, training=training), tell=lines.append)
    assert sum("1 of 2 prompts of training.sample_prompts have more tokens" in line for line in lines) == 1


def test_a_long_prompt_outside_the_new_domain_is_said(family):
    lines: list[str] = []
    prompts = ["red", "blue", "a dog", "a cat", LONG]
    assert named_prompts(PilotConfig(outside=prompts), family, lines.append) == prompts
    assert len(lines) == 1
    assert "1 of 5 prompts of pilot.outside have more tokens" in lines[0]
