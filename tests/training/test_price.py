"""The price of a run before it starts is what the run then takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.errors import UserError
from difftuning_control.families.loading import base_dtype, embedded_model, family_of, load_family
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.inputs import DataConfig, ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.training import ScheduleConfig
from difftuning_control.runs.record import read_run
from difftuning_control.training.price import price_of
from difftuning_control.training.sizes import memory_of
from difftuning_control.verbs.train import train
from support.flow_families import STOCK, need


def forwards(record) -> dict[str, int]:
    return {name: cost.forwards for name, cost in record.phases.items() if cost.forwards}


def test_the_price_is_what_the_run_takes(recipe, tmp_path):
    recipe = replace(
        recipe,
        output=str(tmp_path / "run"),
        training=replace(recipe.training, max_steps=3, validate_every=2, sample_every=2, sample_steps=2, save_at=[1]),
    )
    asked = price_of(recipe)
    record = train(recipe).record
    assert asked.forwards == forwards(record)
    assert (asked.pictures.tuned, asked.pictures.held_out) == (record.data.pictures, record.data.held_out)
    assert (asked.seconds.keys(), asked.bank_is_kept) == ({"load", *asked.forwards}, False)  # a small model is timed
    assert all(seconds > 0 for seconds in asked.seconds.values())
    again = price_of(recipe, [record])
    assert again.bank_is_kept
    assert "bank" not in again.forwards
    assert again.seconds["training"] == pytest.approx(record.phases["training"].seconds, rel=0.2)


@pytest.mark.wide  # each trains
@pytest.mark.parametrize("kind", ["teacher", "auto", "full", "plain", "budget"])
def test_the_price_of_other_settings_is_theirs(recipe, tmp_path, kind):
    tuning, training = recipe.tuning, replace(recipe.training, max_steps=8, validate_every=0, sample_every=0)
    if kind == "teacher":
        tuning = replace(tuning, retention="teacher")
    elif kind == "auto":
        tuning, training = replace(tuning, schedule=ScheduleConfig("auto")), replace(training, max_steps=110)
    elif kind == "plain":
        tuning = replace(tuning, retention_ratio=0.0, retention_weight=0.0)
    elif kind == "budget":
        tuning = replace(tuning, forgetting_budget=0.05)
    recipe = replace(recipe, tuning=tuning, training=training, output=str(tmp_path / "run"))
    recipe = replace(recipe, method="full") if kind == "full" else recipe
    asked = price_of(recipe)
    train(recipe)
    record = read_run(tmp_path / "run")
    assert asked.forwards == forwards(record)


def test_the_memory_of_weights_is_that_of_the_loaded_model():
    family, recipe = load_family("embedded"), Recipe(data=DataConfig("embedded/flat"))
    found = memory_of(recipe, "StableDiffusionPipeline")
    assert found is not None
    size = sum(p.numel() for p in family.denoiser.parameters())
    assert found.denoiser == 4 * size
    assert found.others == 4 * sum(
        p.numel() for m in (family.pipe.text_encoder, family.pipe.vae) for p in m.parameters()
    )
    full = memory_of(replace(recipe, method="full"), "StableDiffusionPipeline")
    assert full is not None
    assert (full.trained, full.training) == (size, 12 * size)


def test_a_model_that_is_not_here_has_no_memory_yet(tmp_path):
    assert embedded_model().is_dir()
    recipe = Recipe(data=DataConfig("embedded/flat"))
    recipe = replace(recipe, model=replace(recipe.model, id="nobody/nothing"))
    assert memory_of(recipe, "StableDiffusionPipeline") is None


def test_pictures_that_training_refuses_have_no_price(recipe, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError):
        price_of(replace(recipe, data=replace(recipe.data, path=str(tmp_path / "none"))))


@pytest.mark.parametrize("name", ["flux2", "krea2", "ideogram4"])
def test_what_trains_by_a_models_configuration_is_counted_before_it_is_loaded(name, tmp_path):
    """Targets that depend on the number of layers, and a second transformer beside the first."""
    need(name)
    pipe = STOCK[name].make()
    pipe.save_pretrained(tmp_path)
    recipe = Recipe(model=ModelConfig(str(tmp_path)), data=DataConfig("x"), adapter=AdapterConfig(rank=2))
    found = memory_of(recipe, STOCK[name].pipeline)
    assert found is not None
    width = base_dtype(recipe).itemsize
    others = [m for part, m in pipe.components.items() if isinstance(m, torch.nn.Module) and part != "transformer"]
    weights = sum(p.numel() for module in others for p in module.parameters())
    assert found.others == pytest.approx(width * weights, rel=1e-3)  # files have a few running means too
    tuning = AdapterTuning(family_of(pipe), recipe.adapter)
    assert found.trained == sum(p.numel() for p in tuning.parameters().values())
