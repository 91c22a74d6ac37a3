"""The running average: with diffusers' warm-up or the authors' from the start, resumed bit for bit; the authors' other
settings: a τ of retention's own, new classes that begin as the model's first ones, and recipes that say so."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from difftuning_control.errors import UserError
from difftuning_control.families.dit import tables_of
from difftuning_control.families.loading import family_of
from difftuning_control.objective.schedules import PaperSchedule, PowerSchedule, schedule_from_dict
from difftuning_control.recipe.inputs import BankConfig, DataConfig, ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.training import ScheduleConfig, TrainingConfig, TuningConfig
from difftuning_control.training.averaging import running_average
from difftuning_control.training.checkpoint import checkpoints
from difftuning_control.training.loop import TrainingLoop
from difftuning_control.verbs.parse import parse
from difftuning_control.verbs.train import train
from support.tiny_models import tiny_dit

EXAMPLES = Path(__file__).parents[2] / "examples"


def averages(decay: float, warmup: bool, weights: list[float]) -> list[float]:
    """The average of one weight after each step, which gives it these values; it begins at 0."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    average, found = running_average([weight], decay, warmup), []
    for value in weights:
        weight.data.fill_(value)
        average.step([weight])
        found.append(float(average.shadow_params[0]))
    return found


def test_fault_15_23_without_warmup_the_decay_is_the_decay_from_the_first_step_on():
    expected, values = [0.0], [float(k * k + 1) for k in range(12)]
    for value in values:
        expected.append(0.9999 * expected[-1] + 0.0001 * value)  # as the authors' update_ema
    assert averages(0.9999, False, values) == pytest.approx(expected[1:], rel=1e-6)


def test_fault_15_23_with_warmup_the_decay_rises_as_the_recipe_says():
    expected, values = [0.0], [float(k * k + 1) for k in range(300)]
    for step, value in enumerate(values):
        decay = min(0.9, 1 - (1 + step) ** (-2 / 3))
        expected.append(decay * expected[-1] + (1 - decay) * value)
    assert averages(0.9, True, values) == pytest.approx(expected[1:], rel=1e-6)
    figures = [round(1 - (1 + step) ** (-2 / 3), 4) for step in (300, 24_000)]
    assert figures == [0.9777, 0.9988]
    assert "0.978 at 300, 0.9988 at 24,000" in TrainingConfig.__doc__


def test_fault_15_23_a_warmup_of_no_average_is_refused():
    with pytest.raises(UserError, match=r"training.ema_warmup is false, but training.ema_decay is empty"):
        TrainingConfig(ema_warmup=False)


class BrokeOffError(Exception):
    """What ends a run in its middle."""


def break_off():
    raise BrokeOffError


def recipe_of(output: Path, model: Path, pictures: Path, warmup: bool, **training) -> Recipe:
    common = {"max_steps": 4, "batch_size": 5, "checkpoint_every": 2, "validation_size": 2, "sample_every": 0}
    return Recipe(
        "full",
        ModelConfig(str(model)),
        DataConfig(str(pictures), holdout=0.25, cache=str(output.parent / "cache")),
        TuningConfig(),
        BankConfig(size=10, steps=2, batch_size=4),
        training=TrainingConfig(**common, learning_rate=1e-2, ema_decay=0.9, ema_warmup=warmup, **training),
        output=str(output),
    )


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.wide
@pytest.mark.parametrize("warmup", [True, False], ids=["warm-up", "from the start"])
def test_fault_15_23_a_resumed_average_is_bit_equal_with_either_choice(
    tmp_path, model_dir, pictures, warmup, monkeypatch
):
    whole = recipe_of(tmp_path / "whole", model_dir, pictures, warmup)
    train(whole)
    broken = recipe_of(tmp_path / "broken", model_dir, pictures, warmup)

    advance = TrainingLoop.advance
    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "advance", lambda self, k, more: advance(self, k, more) if k < 3 else break_off())
        with pytest.raises(BrokeOffError):
            train(broken)
    (found,) = checkpoints(tmp_path / "broken")
    assert found.name == "checkpoint-2"
    train(replace(broken, training=replace(broken.training, resume=True)))
    torch.testing.assert_close(weights(tmp_path / "broken"), weights(tmp_path / "whole"), atol=0, rtol=0)


@pytest.mark.wide
def test_fault_15_23_the_choice_changes_what_is_saved_and_stands_in_the_recipe(tmp_path, model_dir, pictures):
    found = {}
    for warmup in (True, False):
        output = tmp_path / str(warmup)
        train(recipe_of(output, model_dir, pictures, warmup))
        found[warmup] = weights(output)["conv_in.weight"]
        assert f"ema_warmup: {str(warmup).lower()}" in (output / "recipe.yaml").read_text()
    base = load_file(model_dir / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
    moved = {warmup: float((w - base).norm()) for warmup, w in found.items()}
    assert 0 < moved[False] < moved[True]  # at a decay of 0.9 from the start most of the average is the base


# --- a τ of retention's own ------------------------------------------------------------------------------------------


def test_fault_15_23_retention_may_have_a_tau_of_its_own_as_in_the_authors_code():
    """`i ** prob_scale` for i = 1 … 1000, and `i ** LWF_prob_scale` for i = 1000 … 1."""
    u = torch.arange(1, 1001, dtype=torch.float64) / 1000
    schedule = ScheduleConfig("paper", tau=0.5, retention_tau=2.0).build(1000)
    assert schedule == PaperSchedule(0.5, 1000, 2.0)
    for values, numbers, tau in ((schedule.psi(u), range(1, 1001), 0.5), (schedule.xi(u), range(1000, 0, -1), 2.0)):
        expected = torch.tensor([float(i) ** tau for i in numbers], dtype=torch.float64)
        torch.testing.assert_close(values / values.sum(), expected / expected.sum())
    power = ScheduleConfig("power", tau=0.5, retention_tau=2.0).build(1000)
    torch.testing.assert_close(power.psi(u), u**0.5)
    torch.testing.assert_close(power.xi(u), 1 - u**2)


@pytest.mark.parametrize(
    "schedule",
    [PaperSchedule(0.5, 20, 2.0), PaperSchedule(0.5, 20, psi_value=2.0), PowerSchedule(0.5, 2.0), PowerSchedule(0.5)],
)
def test_fault_15_23_a_tau_of_retentions_own_is_described_and_read_again(schedule):
    found = schedule.to_dict()
    assert schedule_from_dict(json.loads(json.dumps(found))) == schedule
    assert ("retention_tau" in found) == (schedule.retention_tau is not None)
    assert ("psi_value" in found) == (schedule.psi_value is not None)


@pytest.mark.parametrize("kind", ["power", "paper"])
def test_psi_may_be_the_same_at_every_level_where_xi_is_not(kind):
    u = torch.arange(1, 1001, dtype=torch.float64) / 1000
    schedule, flat = (ScheduleConfig(kind, tau=0.3, psi=psi).build(1000) for psi in (None, 2.0))
    torch.testing.assert_close(flat.psi(u), torch.full_like(u, 2.0))
    torch.testing.assert_close(flat.xi(u), schedule.xi(u))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "paper", "retention_tau": 0.0}, "retention_tau is 0.0"),
        ({"kind": "power", "retention_tau": float("inf")}, "retention_tau is inf"),
        ({"kind": "paper", "psi": 0.0}, "psi is 0.0; a paper schedule needs a finite psi above 0"),
        ({"kind": "constant", "retention_tau": 1.0}, "tuning.schedule.retention_tau is given, but a constant schedule"),
    ],
)
def test_fault_15_23_a_tau_of_retentions_own_is_checked(values, said):
    with pytest.raises(UserError, match=said):
        ScheduleConfig(**values)


# --- new classes ------------------------------------------------------------------------------------------------------


def test_fault_15_23_new_classes_may_begin_as_the_models_first_ones():
    family, base = family_of(tiny_dit()), family_of(tiny_dit())
    family.set_classes(["eel", "owl", "yak"], None)
    assert family.encode_prompts(["owl", ""])["class_labels"].tolist() == [1, 1000]
    assert family.trained_whole().keys() == tables_of(family.denoiser).keys()
    for name, table in tables_of(family.denoiser).items():
        assert torch.equal(table, tables_of(base.denoiser)[name])


def test_fault_15_23_where_new_classes_begin_is_for_new_ones():
    with pytest.raises(UserError, match=r"tuning.label_start is first, but tuning.label_space is own"):
        TuningConfig(label_start="first")


# --- the recipes ------------------------------------------------------------------------------------------------------


def example(name: str) -> Recipe:
    return parse(["train", "--config", str(EXAMPLES / name)])[1]


@pytest.mark.parametrize("name", ["paper.yaml", "dit_transfer.yaml"])
def test_fault_15_23_the_examples_are_the_authors_settings(name):
    """The defaults of `train.py` in the authors' repository."""
    recipe = example(name)
    training, tuning = recipe.training, recipe.tuning
    assert (training.ema_decay, training.ema_warmup, training.max_grad_norm) == (0.9999, False, None)
    assert (training.learning_rate, training.lr_scheduler, training.weight_decay) == (1e-4, "constant", 0.0)
    assert (training.batch_size, training.max_steps, training.lr_warmup_steps) == (32, 24_000, 0)
    assert (tuning.estimator, tuning.retention_ratio, tuning.retention_weight) == ("sample", 0.2, 0.1)
    assert (tuning.prompt_dropout, tuning.stratified, tuning.retention_prompts) == (0.1, False, "empty")
    assert tuning.schedule.build(1000) == PaperSchedule(1.0, 1000)
    if name == "dit_transfer.yaml":
        assert (tuning.label_space, tuning.label_start, tuning.variance) == ("new", "first", "hybrid")


def test_fault_15_23_what_stays_different_is_a_table():
    text = (Path(__file__).parents[2] / "docs" / "paper.md").read_text()
    for key in ("ema_warmup", "max_grad_norm", "label_start", "retention_tau", "mixed_precision", "holdout"):
        assert f".{key}" in text, key
