"""A bank as large as its run needs it: what auto comes to, for whom, and which prompts it is drawn for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from difftuning_control.data.bank import KnowledgeBank
from difftuning_control.data.bank_prompts import spread_prompts
from difftuning_control.data.prepare import hold_out, prepare_bank
from difftuning_control.errors import UserError
from difftuning_control.recipe.inputs import BankConfig, DataConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import AnalysisConfig
from difftuning_control.recipe.training import TrainingConfig, TuningConfig
from difftuning_control.verbs.analyze import analyze
from difftuning_control.verbs.train import train
from support.trainings import resumed


@pytest.mark.parametrize(
    ("steps", "rows", "ratio", "size"),
    [
        (6, 5, 0.2, 8),  # 6 are drawn and 2 held out
        (4, 5, 0.2, 8),  # the least
        (10, 5, 0.2, 13),
        (300, 32, 0.2, 32),  # the most
        (300, 32, 0.0, 8),  # drawn for what only measures
    ],
)
def test_auto_is_what_the_run_draws_within_bounds(steps, rows, ratio, size):
    weight = 0.1 if ratio else 0.0
    recipe = Recipe(tuning=TuningConfig(retention_ratio=ratio, retention_weight=weight), training=TrainingConfig(steps))
    assert recipe.bank.size == "auto"
    assert recipe.bank_size(rows) == size
    assert replace(recipe, bank=BankConfig(500)).bank_size(rows) == 500
    assert replace(recipe, method="full").bank_size(rows) == (size if size < 32 else 256)


@pytest.mark.parametrize("draws", range(7, 26))
def test_what_is_left_to_train_on_is_what_is_drawn(draws):
    size = BankConfig().size_for(draws)
    bank = KnowledgeBank(torch.zeros(size, 1, 1, 1), [""] * size)
    assert len(hold_out(bank, 100)[0]) in (draws, draws + 1)


@pytest.mark.parametrize("size", [0, -3, "many"])
def test_other_sizes_are_refused(size):
    with pytest.raises((UserError, TypeError), match=r"bank.size is|not supported"):
        BankConfig(size)


def test_prompts_are_spread_over_a_bank_that_is_smaller_than_their_number():
    prompts = [str(i) for i in range(10)]
    assert spread_prompts(prompts, 4) == ("0", "2", "5", "7")
    assert spread_prompts(prompts, 25) == tuple(prompts)


def test_a_run_draws_what_it_needs_and_keeps_it_when_its_length_is_changed(recipe: Recipe):
    recipe = replace(recipe, bank=BankConfig(steps=2))
    run = train(recipe).record
    assert run.recipe.bank.size == "auto"
    assert (run.bank.size, run.bank.items) == (8, 7)
    assert run.phases["bank"].forwards == 8 * 2 * 2
    longer = train(resumed(recipe, max_steps=20)).record
    assert longer.bank == run.bank
    assert longer.fingerprints.bank == run.fingerprints.bank
    assert longer.phases["bank"].forwards == run.phases["bank"].forwards  # it was drawn once


@pytest.mark.wide
def test_what_a_run_forgot_is_measured_on_its_own_bank(recipe: Recipe):
    recipe = replace(recipe, bank=BankConfig(size=12, steps=2))
    run = train(replace(recipe, bank=BankConfig(steps=2), training=replace(recipe.training, max_steps=10))).record
    folder = Path(run.bank.folder)
    banks = sorted(folder.parent.iterdir())
    found = analyze(Recipe(), AnalysisConfig(rows=4), recipe.output)
    assert "forgetting" in found
    assert sorted(folder.parent.iterdir()) == banks  # no other was drawn


def test_a_bank_that_is_there_is_as_large_as_it_is(family, tmp_path: Path):
    captions = [f"red {i}" for i in range(20)]
    data, place = DataConfig(cache=str(tmp_path / "cache")), str(tmp_path / "bank")

    def prepared(config: BankConfig, size: int) -> KnowledgeBank:
        return prepare_bank(family, config, data, captions, 16, size=size)

    auto = BankConfig(steps=1, path=place)
    first = prepared(auto, 10)
    assert len(first) == 10
    assert first.prompts == list(spread_prompts(captions, 10))
    assert prepared(auto, 30).fingerprint == first.fingerprint
    named = BankConfig(14, steps=1, path=str(tmp_path / "named"))
    explicit = prepared(named, 0)
    assert explicit.prompts == captions[:14]  # in their order, as banks of a size always were
    assert prepared(replace(named, size="auto"), 30).fingerprint == explicit.fingerprint
    with pytest.raises(UserError, match="another steps"):
        prepared(replace(auto, steps=2), 10)
