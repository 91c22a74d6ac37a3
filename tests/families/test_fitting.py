"""What a recipe leaves open becomes what fits family, method and device; what it names stays."""

import shlex

import pytest
import torch

from difftuning_control.errors import UserError
from difftuning_control.evaluation.report.commands import train_command
from difftuning_control.families import fitting
from difftuning_control.families.fit import EMBEDDED
from difftuning_control.families.fitting import fitted
from difftuning_control.families.loading import FAMILIES, SINCE, family_class
from difftuning_control.recipe.inputs import DataConfig
from difftuning_control.recipe.recipe import FITTED, Recipe
from difftuning_control.recipe.training import ScheduleConfig, TrainingConfig, TuningConfig
from difftuning_control.system.durable import write_json
from difftuning_control.system.installed import at_least
from difftuning_control.verbs.commands import only
from difftuning_control.verbs.parse import parse


def of(text: dict, **sections: dict) -> Recipe:
    return Recipe.from_dict({"data": {"path": "pics"}, "model": text, **sections})


@pytest.mark.parametrize(("method", "rate"), [("lora", 1e-4), ("full", 1e-5), ("controlnet", 1e-5)])
def test_a_stable_diffusion_gets_its_familys_values(model_dir, method, rate):
    said: list[str] = []
    recipe = fitted(of({"id": str(model_dir)}, method=method), said.append)
    training = recipe.training
    assert (training.learning_rate, training.batch_size) == (rate, 5)
    assert training.max_steps == (20000 if method == "controlnet" else 800)
    assert len(said) == 1
    assert f"learning_rate {rate:g}" in said[0]
    assert str(model_dir) in said[0]
    assert recipe.left_open == ()


def test_the_embedded_model_keeps_the_defaults_of_the_dataclass():
    recipe = fitted(of({"id": "embedded"}, tuning={"schedule": {"kind": "power"}}))
    assert recipe == of({"id": "embedded"})
    full = fitted(of({"id": "embedded"}, method="full"))
    assert full.training.learning_rate == EMBEDDED.learning_rate["full"] == 3e-4


def test_what_is_named_stays(model_dir):
    named = {"learning_rate": 3e-3, "max_steps": 2, "batch_size": 7, "mixed_precision": "no"}
    named |= {"gradient_checkpointing": False}
    drawn = {"steps": 9, "guidance_scale": 2.0}
    recipe = of(
        {"id": str(model_dir)},
        training=named | {"sample_steps": 9, "sample_guidance_scale": 2.0},
        tuning={
            "retention_ratio": 0.4,
            "retention_weight": 0.2,
            "retention_prompts": "own",
            "schedule": {"kind": "power"},
        },
        bank=drawn | {"prompts": "captions"},
        control={"fidelity": drawn},
        gates=drawn | {"kid": 0.1},
        method="controlnet",
    )
    assert recipe.left_open == ()
    assert fitted(recipe) is recipe


def test_a_recipe_made_of_dataclasses_is_whole():
    assert fitted(Recipe()) == Recipe()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_values_for_every_method(tmp_path, name):
    write_json(tmp_path / "model_index.json", {"_class_name": name})
    if not at_least("diffusers", SINCE.get(name, "0")):
        pytest.skip(f"needs diffusers {SINCE[name]} or newer")
    assert family_class(str(tmp_path)).fit.batch_size >= 2
    for method in ("lora", "full", "controlnet"):
        training = fitted(of({"id": str(tmp_path)}, method=method)).training
        assert 1e-6 < training.learning_rate < 1e-2
        assert training.max_steps >= 300


def test_dit_follows_the_papers_settings(tmp_path):
    write_json(tmp_path / "model_index.json", {"_class_name": "DiTPipeline"})
    training = fitted(of({"id": str(tmp_path)}, method="full")).training
    assert (training.learning_rate, training.max_steps, training.batch_size) == (1e-4, 24000, 32)


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("StableDiffusionPipeline", {"full", "controlnet"}),
        ("StableDiffusionXLPipeline", {"lora", "full", "controlnet"}),
        ("FluxPipeline", {"lora", "full", "controlnet"}),
        ("DiTPipeline", {"full"}),
    ],
)
def test_on_a_gpu_activations_are_computed_again_where_the_rows_would_not_fit(tmp_path, monkeypatch, name, methods):
    write_json(tmp_path / "model_index.json", {"_class_name": name})

    def found(**training: bool) -> set[str]:
        recipes = {m: of({"id": str(tmp_path)}, method=m, training=training) for m in ("lora", "full", "controlnet")}
        return {m for m, recipe in recipes.items() if fitted(recipe).training.gradient_checkpointing}

    monkeypatch.setattr(fitting, "best_device", lambda: torch.device("cpu"))
    assert found() == set()
    monkeypatch.setattr(fitting, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(fitting, "usual_precision", lambda: "bf16")
    assert found() == methods
    assert found(gradient_checkpointing=False) == set()


def test_weights_in_float8_have_no_copies_kept_for_the_backward_pass(tmp_path):
    write_json(tmp_path / "model_index.json", {"_class_name": "FluxPipeline"})
    said: list[str] = []
    recipe = fitted(of({"id": str(tmp_path), "quantization": "float8"}), said.append)
    assert recipe.training.gradient_checkpointing
    assert "gradient_checkpointing True" in said[0]
    named = of({"id": str(tmp_path), "quantization": "float8"}, training={"gradient_checkpointing": False})
    assert not fitted(named).training.gradient_checkpointing


@pytest.mark.parametrize(("batch", "share"), [(2, 1 / 2), (3, 1 / 3), (4, 1 / 4), (5, 0.2), (32, 0.2)])
def test_a_small_batch_has_one_row_of_the_bank(batch, share):
    recipe = fitted(of({"id": "embedded"}, training={"batch_size": batch}))
    assert recipe.tuning.retention_ratio == share
    assert int(batch * recipe.tuning.retention_ratio) == max(1, batch // 5)


def test_a_share_that_is_named_is_not_changed():
    recipe = fitted(of({"id": "embedded"}, training={"batch_size": 4}, tuning={"retention_ratio": 0.2}))
    assert recipe.tuning.retention_ratio == 0.2


@pytest.mark.parametrize(
    ("method", "tuning", "expected"),
    [
        ("lora", {}, ScheduleConfig("constant", xi=1.0)),
        ("full", {}, ScheduleConfig("constant", xi=1.0)),
        ("full", {"schedule": {"kind": "power"}}, ScheduleConfig("power")),
        ("controlnet", {}, ScheduleConfig("power", tau=1.0)),
        ("controlnet", {"schedule": {"kind": "power"}}, ScheduleConfig("power")),
        ("controlnet", {"schedule": {"tau": 0.5}}, ScheduleConfig("power", tau=0.5)),
        ("lora", {"schedule": {"kind": "power"}}, ScheduleConfig("power")),
        ("lora", {"schedule": {"tau": 0.5}}, ScheduleConfig("power", tau=0.5)),
        ("lora", {"retention_ratio": 0.0, "retention_weight": 0.0}, ScheduleConfig("constant", xi=1.0)),
    ],
)
def test_a_schedule_that_is_not_named_fits_the_method(method, tuning, expected):
    assert fitted(of({"id": "embedded"}, method=method, tuning=tuning)).tuning.schedule == expected


@pytest.mark.parametrize(
    "schedule", [ScheduleConfig(), ScheduleConfig("power", tau=0.3), ScheduleConfig("constant", xi=1.0)]
)
def test_the_command_that_a_report_gives_keeps_the_schedule(schedule):
    recipe = Recipe(data=DataConfig("pics"), tuning=TuningConfig(schedule))
    command = parse(shlex.split(train_command(recipe.to_dict()))[1:])[1]
    assert fitted(only(Recipe, command)).tuning == recipe.tuning


RETAINED = ("general", "own", 0.3)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, RETAINED),
        ({"adapter": {"kind": "dora"}, "training": {"max_steps": 9}, "bank": {"size": 8}}, RETAINED),
        ({"bank": {"prompts": "captions"}}, None),
        ({"bank": {"path": "mine"}}, None),
        ({"tuning": {"retention_weight": 0.2}}, None),
        ({"tuning": {"retention_prompts": "both"}}, None),
        ({"tuning": {"schedule": {"kind": "power"}}}, None),
        ({"tuning": {"schedule": {"tau": 1.0}}}, None),
        ({"tuning": {"retention": "teacher"}}, None),
        ({"tuning": {"forgetting_budget": 0.1}}, None),
        ({"tuning": {"retention_ratio": 0.0, "retention_weight": 0.0}}, None),
        ({"method": "full"}, None),
        ({"method": "controlnet"}, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_lora_with_a_trigger_retains_general_prompts_unless_its_recipe_says_what(sections, expected):
    recipe = of({"id": "embedded"}, **sections)
    recipe.data.trigger = "zbx"
    said: list[str] = []
    found = fitted(recipe, said.append)
    kept = recipe.bank.prompts, recipe.tuning.retention_prompts, recipe.tuning.retention_weight
    assert (found.bank.prompts, found.tuning.retention_prompts, found.tuning.retention_weight) == (expected or kept)
    told = "retention_prompts own, retention_weight 0.3" in said[0] and "bank.prompts general" in said[0]
    assert told == (expected is not None)


def test_the_command_that_a_report_gives_keeps_what_a_trigger_retains():
    recipe = Recipe(data=DataConfig("pics", trigger="zbx"), tuning=TuningConfig(ScheduleConfig("constant", xi=1.0)))
    command = parse(shlex.split(train_command(recipe.to_dict()))[1:])[1]
    again = fitted(only(Recipe, command))
    assert (again.bank.prompts, again.tuning) == ("captions", recipe.tuning)


def test_the_command_that_a_report_gives_names_what_is_null_and_is_not_by_default():
    recipe = Recipe(data=DataConfig("pics"), training=TrainingConfig(max_grad_norm=None))
    assert "--training.max_grad_norm null" in train_command(recipe.to_dict())
    command = parse(shlex.split(train_command(recipe.to_dict()))[1:])[1]
    assert command.training.max_grad_norm is None


def test_a_model_that_is_told_classes_keeps_the_papers_powers(tmp_path):
    write_json(tmp_path / "model_index.json", {"_class_name": "DiTPipeline"})
    assert fitted(of({"id": str(tmp_path)})).tuning.schedule == ScheduleConfig()


def test_a_kind_that_is_chosen_over_a_recipe_leaves_out_the_constants(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("tuning: {schedule: {kind: constant, xi: 1.0}}")
    words = ["train", "--config", str(recipe), "--data.path", "pics", "--tuning.schedule.kind", "power"]
    assert parse(words)[1].tuning.schedule == ScheduleConfig("power")


@pytest.mark.parametrize("verb", ["train", "bank", "pilot", "analyze"])
def test_what_a_command_names_and_leaves_open(verb):
    command = parse([verb, "--data.path", "pics", "--lr", "1e-4", "--training", "{max_steps: 3}"])[1]
    assert command.left_open == FITTED[2:]
    assert only(Recipe, command).left_open == FITTED[2:]


def test_a_model_that_is_not_there_is_a_mistake():
    with pytest.raises(UserError, match="does not exist"):
        fitted(of({"id": "./gone"}))


@pytest.mark.parametrize(
    ("device", "supported", "precision"), [("cuda", True, "bf16"), ("cuda", False, "no"), ("cpu", True, "no")]
)
def test_the_usual_precision_is_bf16_where_the_device_computes_in_it(monkeypatch, device, supported, precision):
    def supports(including_emulation=True):
        return supported or including_emulation

    monkeypatch.setattr(fitting, "best_device", lambda: torch.device(device))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supports)
    assert fitting.usual_precision() == precision
