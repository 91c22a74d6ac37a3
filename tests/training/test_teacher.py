"""Retention towards the pretrained model's own prediction: who is asked, on what, and what is learnt from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_of
from difftuning_control.families.loss import compute_loss
from difftuning_control.objective.batch import LatentBatch
from difftuning_control.objective.budget import ForgettingBudget
from difftuning_control.objective.difftuning import DiffTuningObjective
from difftuning_control.objective.schedules import PowerSchedule
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.inputs import ControlConfig, DataConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import PilotConfig
from difftuning_control.recipe.training import ScheduleConfig, TrainingConfig, TuningConfig
from difftuning_control.runs.identity import identity_settings
from difftuning_control.training.inputs import prepare_inputs
from difftuning_control.training.setup import build_objective, make_accelerator
from difftuning_control.training.source import training_source
from difftuning_control.training.teacher import Teacher
from difftuning_control.verbs.pilot.side_tuning import side_tuning
from difftuning_control.verbs.train import train
from support.tiny_models import tiny_flux
from support.tiny_sd import tiny_pipeline
from support.trainings import interrupted_after, record, resumed, rows
from support.tuning import tune

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "dropout": 0.5},
    "pissa": {"kind": "lora", "rank": 2, "init": "pissa"},
    "dora": {"kind": "dora", "rank": 2},
    "tlora": {"kind": "tlora", "rank": 4, "min_rank": 1},
    "loha": {"kind": "loha", "rank": 2},
    "lokr": {"kind": "lokr"},
    "oft": {"kind": "oft", "block_size": 4},
    "boft": {"kind": "boft", "block_size": 4},
    "ia3": {"kind": "ia3"},
    "difffit": {"kind": "difffit"},
}
TEACHER = {"retention": "teacher"}
PICTURES = TEACHER | {"retention_rows": "pictures"}
MODELS: dict[str, Callable[[], Any]] = {
    "epsilon": tiny_pipeline,
    "v": lambda: tiny_pipeline(prediction_type="v_prediction"),
    "flow": tiny_flux,
}


def batch_of(family: Any, roles: list[bool], seed: int = 0) -> tuple[LatentBatch, Tensor]:
    """Random rows under their prompts, and noise."""
    generator = torch.Generator().manual_seed(seed)
    shape = (family.pipe.vae.config.latent_channels, 8, 8)
    latents, noise = torch.randn(2, len(roles), *shape, generator=generator)
    prompts = ["" if role else f"red {number}" for number, role in enumerate(roles)]
    conditioning = {k: v.float() for k, v in family.encode_prompts(prompts).items()}
    return LatentBatch(latents, conditioning, torch.tensor(roles)), noise


def retarget(teacher: Teacher, batch: LatentBatch) -> Any:
    return partial(teacher.retarget, batch=batch, rows=batch.is_retention.nonzero().flatten())


def objective_of(family: Any, **settings: Any) -> DiffTuningObjective:
    return DiffTuningObjective(family.process, PowerSchedule(0.5), **settings)


# --- who is asked ---------------------------------------------------------------------------------------------------


@pytest.mark.sample("lora", "tlora", "difffit")
@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_of_a_tuned_adapter_is_the_base_bit_for_bit(kind: str):
    base, family = (family_of(tiny_pipeline()) for _ in range(2))
    tuning = AdapterTuning(family, AdapterConfig(**KINDS[kind]), seed=3)
    tune(family, tuning, rate=0.05)
    family.denoiser.train()
    batch, _ = batch_of(family, [True] * 3)
    timesteps, teacher = torch.tensor([3, 500, 900]), Teacher(family)
    with torch.no_grad():
        expected = base.predict(base.denoiser.eval(), batch.latents, timesteps, batch.conditioning)
        with teacher.pretrained() as model:
            found = family.predict(model, batch.latents, timesteps, batch.conditioning)
        tuned = family.predict(family.model, batch.latents, timesteps, batch.conditioning)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert (tuned - expected).abs().max() > 1e-3  # it is on again
    assert family.denoiser.training
    assert all(p.requires_grad for p in tuning.parameters().values())


def test_a_tuned_text_encoder_is_switched_off_too():
    base, family = (family_of(tiny_pipeline()) for _ in range(2))
    family.encodes_in_step = True
    tune_config = AdapterConfig(rank=2, text_encoder=True)
    tuning = AdapterTuning(family, tune_config, seed=3)
    with torch.no_grad():
        for parameter in tuning.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    latents, timesteps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])
    prompts = ["red 1", "blue"]
    with torch.no_grad():
        expected = base.predict(base.model, latents, timesteps, base.encode_prompts(prompts))
        with Teacher(family).pretrained() as model:
            found = family.predict(model, latents, timesteps, family.tokenize(prompts))
        tuned = family.predict(family.model, latents, timesteps, family.tokenize(prompts))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (tuned - expected).abs().max() > 1e-3


# --- what is learnt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_before_the_first_step_of_a_lora_the_teachers_loss_is_exactly_zero(model: str):
    family = family_of(MODELS[model]())
    AdapterTuning(family, AdapterConfig(rank=2, init="gaussian"), seed=3)
    objective, levels = objective_of(family), torch.tensor([5, 400, 900])
    batch, noise = batch_of(family, [True, True, True])
    losses = compute_loss(
        family, family.model, objective, batch, noise, levels, retarget(Teacher(family), batch)
    ).detach()
    assert losses.tolist() == [0.0, 0.0, 0.0]
    batch, noise = batch_of(family, [False, True, False])
    losses = compute_loss(family, family.model, objective, batch, noise, levels, retarget(Teacher(family), batch))
    plain = compute_loss(family, family.model, objective, batch, noise, levels)
    assert losses[1] < 1e-10  # a forward of fewer rows may round otherwise
    assert losses[[0, 2]].tolist() == plain[[0, 2]].tolist()
    assert plain[1] > 0.1


@pytest.mark.parametrize("model", MODELS)
def test_the_gradient_is_that_of_the_distance_between_two_forwards(model: str):
    family, base = (family_of(MODELS[model]()) for _ in range(2))
    tuning = AdapterTuning(family, AdapterConfig(rank=2), seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuning.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    objective = objective_of(family, retention_weight=0.3, estimator="weight")
    batch, noise = batch_of(family, [False, True, False, True])
    levels = torch.tensor([900, 5, 30, 400])
    losses = compute_loss(family, family.model, objective, batch, noise, levels, retarget(Teacher(family), batch))
    objective.combine(losses, levels, batch.is_retention).backward()
    found = {name: p.grad.clone() for name, p in tuning.parameters().items()}

    process = family.process
    noisy, timesteps = process.add_noise(batch.latents, noise, levels), process.timesteps[levels]
    told = dict(batch.conditioning)
    with torch.no_grad():
        original = base.predict(base.denoiser.eval(), noisy, timesteps, told)
    predicted = family.predict(family.model, noisy, timesteps, told)
    true, u = process.target(batch.latents, noise, levels), process.u[levels]

    def distance(row: int, to: Tensor) -> Tensor:
        return (predicted[row] - to[row]).square().mean()

    target = sum(u[i] ** 0.5 * distance(i, true) for i in (0, 2)) / 2
    retained = sum((1 - u[i] ** 0.5) * distance(i, original) for i in (1, 3)) / 2
    for parameter in tuning.parameters().values():
        parameter.grad = None
    (target + 0.3 * retained).backward()
    for name, parameter in tuning.parameters().items():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4)
    assert sum(g.abs().sum() for g in found.values()) > 0


def test_a_budget_reads_the_distance_as_what_the_loss_rose_by():
    budgets = [ForgettingBudget([0.1] * 5, [0.0, 1.0], [0.5, 1.5], 0.1) for _ in range(2)]
    u = torch.tensor([0.1, 0.5, 0.9])
    base = torch.tensor([0.6, 1.0, 1.4])
    distances = torch.tensor([0.3, 0.05, 0.0])
    budgets[0].update(base + distances, u)
    budgets[1].update(distances, u, from_teacher=True)
    assert budgets[1].rise[[0, 2, 4]].tolist() == pytest.approx([0.5, 0.05, 0.0], abs=1e-6)
    assert budgets[0].multipliers.tolist() == pytest.approx(budgets[1].multipliers.tolist())
    assert budgets[1].multipliers[0] > 0.1 > budgets[1].multipliers[4]  # over and under what is allowed


# --- whole runs -----------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "on the bank": {"tuning": TEACHER},
    "on pictures": {"tuning": PICTURES, "data": {"flip": True}},
    "on pictures, their prompts, with a budget": {
        "tuning": PICTURES | {"retention_prompts": "own", "forgetting_budget": 0.1, "retention_ratio": 0.4}
    },
    "all weights": {"method": "full", "tuning": TEACHER, "training": {"ema_decay": 0.9}},
}


@pytest.fixture
def make(tmp_path: Path, recipe: Recipe) -> Callable[..., Recipe]:
    def made(name: str = "run", method: str = "lora", **sections: dict[str, Any]) -> Recipe:
        return replace(
            recipe,
            method=method,
            tuning=TuningConfig(**sections.get("tuning", {})),
            data=replace(recipe.data, **sections.get("data", {})),
            training=replace(recipe.training, **{"learning_rate": 1e-3, **sections.get("training", {})}),
            control=ControlConfig(**sections.get("control", {})),
            output=str(tmp_path / name),
        )

    return made


def weights(recipe: Recipe) -> dict[str, Tensor]:
    name = {"lora": "pytorch_lora_weights", "full": "pipeline/unet/diffusion_pytorch_model"}[recipe.method]
    return load_file(Path(recipe.output) / f"{name}.safetensors")


@pytest.mark.sample("on pictures, their prompts, with a budget")
@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_ends_as_an_undisturbed_one(make, name):
    whole, broken = make("whole", **RUNS[name]), make("broken", **RUNS[name])
    train(whole)
    with interrupted_after(4), pytest.raises(KeyboardInterrupt):
        train(broken)
    train(resumed(broken))
    torch.testing.assert_close(weights(broken), weights(whole), atol=0, rtol=0)
    assert rows(broken) == rows(whole)
    values = [row["teacher_loss"] for row in rows(whole) if "teacher_loss" in row]
    assert len(values) == 6
    assert values[0] < 1e-10 < min(values[1:])  # before the first step nothing is forgotten
    found = record(whole)["recipe"]["tuning"]
    assert (found["retention"], found["retention_rows"]) == (
        "teacher",
        RUNS[name]["tuning"].get("retention_rows", "bank"),
    )
    assert Recipe.from_dict(record(whole)["recipe"]).tuning == whole.tuning


def test_without_a_bank_none_is_drawn_and_that_is_said(make, tmp_path):
    told: list[str] = []
    recipe = make(**RUNS["on pictures"])
    run = train(recipe, tell=told.append).record
    assert run.bank is None
    assert "bank" not in run.losses
    assert run.phases["bank"].forwards == 0
    assert not (tmp_path / "cache" / "banks").exists()
    assert any(line.startswith("no bank is drawn") for line in told)


@pytest.mark.wide
def test_with_a_bank_at_hand_it_is_what_forgetting_is_measured_on_and_not_trained_on(make, tmp_path):
    recipe = make(**RUNS["on pictures"])
    run = train(replace(recipe, bank=replace(recipe.bank, path=str(tmp_path / "bank")))).record
    assert run.bank.items == 8  # and 2 are held out
    assert "bank" in run.losses
    alone = make("alone", **RUNS["on pictures"])
    train(alone)
    torch.testing.assert_close(weights(recipe), weights(alone), atol=0, rtol=0)


def test_weights_that_do_not_train_stay_as_they_were(make):
    recipe = make(**RUNS["all weights"])
    made = Teacher.of(recipe, family := family_of(tiny_pipeline()))
    assert made.source is not None
    before = {name: value.clone() for name, value in made.source.state_dict().items()}
    with torch.no_grad():
        for parameter in family.denoiser.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(dict(made.source.state_dict()), before, atol=0, rtol=0)
    assert not any(p.requires_grad for p in made.source.parameters())


@pytest.mark.parametrize("prompts", ["empty", "own"])
def test_rows_of_pictures_are_those_that_are_tuned_on_under_the_prompt_that_is_asked(make, prompts):
    recipe = make(tuning=PICTURES | {"retention_prompts": prompts, "retention_ratio": 0.4, "prompt_dropout": 1.0})
    family = family_of(tiny_pipeline())
    accelerator, objective = make_accelerator(recipe), build_objective(recipe, family.process)
    inputs = prepare_inputs(recipe, family, objective, accelerator)
    source = training_source(recipe, family, objective, inputs, accelerator)
    captions = dict(zip(inputs.targets.names, inputs.targets.captions))
    seen = []
    for step in range(12):
        found = source.rows(step)
        retained = found.batch.is_retention
        assert found.counts == (3, 2)
        assert retained.tolist() == [False] * 3 + [True] * 2
        names = found.batch.ids[3:]
        seen += names
        wanted = [captions[name] if prompts == "own" else "" for name in names]
        expected = inputs.embeddings.rows(wanted)["prompt_embeds"]
        torch.testing.assert_close(found.batch.conditioning["prompt_embeds"][3:], expected)
    assert set(seen) == set(captions)  # every picture has its turn


def test_pictures_in_buckets_are_retained_in_the_bucket_of_their_step(make, tmp_path):
    recipe = make(tuning=PICTURES, data={"buckets": True, "bucket_step": 8})
    run = train(recipe).record
    assert run.is_complete
    assert run.phases["training"].forwards == 6 * (5 + 1)  # five rows trained, one of them asked of the teacher


# --- what does not go together --------------------------------------------------------------------------------------


def test_an_earlier_recipe_is_the_same_run_as_before():
    values = identity_settings(Recipe())["tuning"]
    assert "retention" not in values
    assert "retention_rows" not in values
    taught = identity_settings(Recipe(tuning=TuningConfig(**PICTURES)))["tuning"]
    assert (taught["retention"], taught["retention_rows"]) == ("teacher", "pictures")


@pytest.mark.parametrize(
    ("make_recipe", "message"),
    [
        (
            lambda: TuningConfig(retention_rows="pictures"),
            "retention_rows is pictures, which with tuning.retention samp",
        ),
        (lambda: TuningConfig(**TEACHER, retention_ratio=0, retention_weight=0), "retention_ratio is 0, so no row"),
        (lambda: TuningConfig(**TEACHER, variance="hybrid"), "tuning.variance is hybrid"),
        (lambda: TuningConfig(ScheduleConfig("auto"), **PICTURES), "retention_rows is pictures; say bank"),
        (lambda: TuningConfig(**PICTURES, retention_prompts="own", label_space="new"), "does not know the classes"),
        (
            lambda: Recipe(data=DataConfig(stream=True), tuning=TuningConfig(**PICTURES)),
            "retention_rows pictures is given",
        ),
        (
            lambda: Recipe("full", tuning=TuningConfig(**TEACHER), training=TrainingConfig(shard=True)),
            "needs a second model whole on each",
        ),
        (lambda: Recipe("controlnet", tuning=TuningConfig(**PICTURES)), "whose conditions a ControlNet is to follow"),
        (lambda: Recipe("controlnet", tuning=TuningConfig(**TEACHER)), "say --control.bank_condition blank"),
    ],
)
def test_what_a_teacher_cannot_do_is_refused_in_a_sentence(make_recipe, message):
    with pytest.raises(UserError, match=message):
        make_recipe()


# --- ControlNets ----------------------------------------------------------------------------------------------------


def test_a_new_controlnet_is_taught_by_the_model_without_control(make):
    recipe = make(method="controlnet", tuning=TEACHER, control={"bank_condition": "blank", "fidelity": {"every": 0}})
    family = family_of(tiny_pipeline())
    family.controlnet = family.new_controlnet(0)
    teacher = Teacher.of(recipe, family)
    batch, noise = batch_of(family, [False, True])
    batch.conditioning["control"] = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    levels = torch.tensor([700, 300])
    family.controlnet.train()
    told = retarget(teacher, batch)
    assert compute_loss(family, family.model, objective_of(family), batch, noise, levels, told)[1] < 1e-10
    with torch.no_grad():
        for parameter in family.controlnet.parameters():
            parameter.add_(0.1)
    noised = objective_of(family).add_noise(batch.latents, noise, levels)
    alone = {k: v[1:] for k, v in batch.conditioning.items() if k != "control"}
    with torch.no_grad():
        expected = family.predict(family.denoiser, noised.noisy_model_input[1:], noised.timesteps[1:], alone)
    torch.testing.assert_close(told(noised).target[1:], expected, atol=1e-6, rtol=0)
    assert compute_loss(family, family.model, objective_of(family), batch, noise, levels, told)[1] > 1e-6


def test_a_controlnet_that_was_trained_before_is_taught_by_itself_as_it_was(make, tmp_path):
    family = family_of(tiny_pipeline())
    family.controlnet = family.new_controlnet(0)
    with torch.no_grad():
        for parameter in family.controlnet.parameters():
            parameter.add_(0.05)
    recipe = make(method="controlnet", tuning=TEACHER, control={"init": str(tmp_path), "fidelity": {"every": 0}})
    teacher = Teacher.of(recipe, family)
    batch, noise = batch_of(family, [True, True])
    batch.conditioning["control"] = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    noised = objective_of(family).add_noise(batch.latents, noise, torch.tensor([700, 300]))
    with torch.no_grad():
        expected = family.predict(family.model, noised.noisy_model_input, noised.timesteps, batch.conditioning)
        for parameter in family.controlnet.parameters():
            parameter.add_(0.1)
    torch.testing.assert_close(retarget(teacher, batch)(noised).target, expected, atol=0, rtol=0)


# --- pilots ---------------------------------------------------------------------------------------------------------


def test_the_sides_of_a_pilot_differ_in_retention_alone():
    base = TuningConfig(retention_weight=0.5, forgetting_budget=0.2)
    found = {side: side_tuning(side, base, Path("s.json")) for side in ("teacher_bank", "teacher_empty", "teacher_own")}
    assert found == {
        "teacher_bank": replace(base, retention="teacher"),
        "teacher_empty": replace(base, retention="teacher", retention_rows="pictures"),
        "teacher_own": replace(base, retention="teacher", retention_rows="pictures", retention_prompts="own"),
    }
    taught = found["teacher_own"]
    for side in ("plain", "prior", "difftuning_tau1", "difftuning_budget"):
        assert side_tuning(side, taught, Path("s.json")).retention == "samples"
    measured = side_tuning("teacher_bank", TuningConfig(ScheduleConfig("auto")), Path("s.json"))
    assert measured.schedule == ScheduleConfig("measured", path="s.json")
    PilotConfig(["plain", *found])
    with pytest.raises(UserError, match="teacher_bank, teacher_empty or teacher_own"):
        PilotConfig(["plain", "teacher"])
