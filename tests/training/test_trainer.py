"""A run follows from its recipe alone: repeated, interrupted, killed or spread over processes, it ends the same."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.data.bank import BankRequest, KnowledgeBank
from difftuning_control.errors import NonFiniteLossError, UserError
from difftuning_control.evaluation.losses import BandValidator
from difftuning_control.families.hub import best_device
from difftuning_control.families.loading import load_family
from difftuning_control.families.sd import StableDiffusion
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.inputs import BankConfig, DataConfig, ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.training import TrainingConfig, TuningConfig
from difftuning_control.runs.folder import OutputFolder, refuse_places
from difftuning_control.runs.identity import write_recipe
from difftuning_control.system.digests import digest_of_file
from difftuning_control.system.durable import write_json
from difftuning_control.training.checkpoint import checkpoints
from difftuning_control.training.inputs import prepare_inputs
from difftuning_control.training.setup import build_objective, make_accelerator
from difftuning_control.verbs.train import train
from support.pictures import write_pictures
from support.trainings import PLAIN, interrupted_after, recomputed, record, resumed, rows, run_record, trained_once

STEPS = 6
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full, averaged": {"method": "full", "training": {"ema_decay": 0.9}},
    "adapter averaged, with a budget": {
        "tuning": {"forgetting_budget": 0.02, "retention_ratio": 0.4},
        "training": {"ema_decay": 0.9},
    },
    "accumulated": {"training": {"gradient_accumulation_steps": 2}},
    "everything drawn": {
        "data": {"flip": True},
        "tuning": {"prompt_dropout": 0.4, "retention_prompts": "own", "estimator": "weight"},
        "adapter": {"rank": 2, "alpha": 4.0, "dropout": 0.5},
        "training": {"lr_warmup_steps": 2, "gradient_checkpointing": True, "mixed_precision": "bf16"},
    },
}

Maker = Callable[..., Recipe]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, pictures: Path) -> Maker:
    """Makes recipes that train the tiny model for six steps, with one cache for all: `make(name, training={…})`."""
    root = tmp_path_factory.mktemp("trainer")
    training = {
        "max_steps": STEPS,
        "batch_size": 5,
        "checkpoint_every": 2,
        "validate_every": 3,
        "validation_size": 2,
        "sample_every": 0,
        "learning_rate": 1e-2,
    }

    def recipe(name: str, method: str = "lora", **sections: dict[str, Any]) -> Recipe:
        return Recipe(
            method,
            ModelConfig(str(model_dir)),
            DataConfig(
                **{"path": str(pictures), "holdout": 0.25, "cache": str(root / "cache"), **sections.get("data", {})}
            ),
            TuningConfig(**sections.get("tuning", {})),
            BankConfig(**{"size": 10, "steps": 2, "batch_size": 4, **sections.get("bank", {})}),
            AdapterConfig(**sections.get("adapter", {})),
            training=TrainingConfig(**{**training, **sections.get("training", {})}),
            output=str(root / name),
        )

    return recipe


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    return VARIANTS[request.param]


@pytest.fixture(scope="module")
def finished(make: Maker) -> Callable[..., Recipe]:
    return trained_once(make)


def weights(recipe: Recipe) -> dict[str, Tensor]:
    """What a finished run trained."""
    output = Path(recipe.output)
    name = "diffusion_pytorch_model"
    file = {"lora": "pytorch_lora_weights", "full": f"pipeline/unet/{name}", "controlnet": f"controlnet/{name}"}
    return load_file(output / f"{file[recipe.method]}.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same_run(found: Recipe, expected: Recipe) -> None:
    torch.testing.assert_close(weights(found), weights(expected), atol=0, rtol=0)
    assert rows(found) == rows(expected)
    assert record(found)["losses"] == record(expected)["losses"]


# --- the same run on every way --------------------------------------------------------------------------------------


@pytest.mark.wide
def test_two_runs_of_a_recipe_are_bit_equal(make, finished, variant, tmp_path):
    again = replace(make("", **variant), output=str(tmp_path))
    train(again)
    assert_same_run(again, finished(variant))


@pytest.mark.wide
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("lora", 1),
        ("lora", 6),
        ("full, averaged", 4),
        ("full, averaged", 6),
        ("accumulated", 4),
        ("everything drawn", 4),
    ],
)
def test_an_interrupted_run_that_is_resumed_is_bit_equal(make, finished, tmp_path, name, steps):
    recipe = replace(make("", **VARIANTS[name]), output=str(tmp_path))
    with interrupted_after(steps), pytest.raises(KeyboardInterrupt):
        train(recipe)
    assert record(recipe)["status"] == "running"
    with interrupted_after(STEPS + 1) as taken:
        train(resumed(recipe))
    assert len(taken) == STEPS - (steps - 1) // 2 * 2
    assert_same_run(recipe, finished(VARIANTS[name]))
    assert not checkpoints(tmp_path)


def test_metrics_that_were_lost_are_told_and_the_weights_are_the_same(make, finished, tmp_path, capsys):
    recipe = replace(make(""), output=str(tmp_path))
    with interrupted_after(3), pytest.raises(KeyboardInterrupt):
        train(recipe)
    (tmp_path / "metrics.jsonl").unlink()
    capsys.readouterr()
    train(resumed(recipe))
    assert re.search(r"note: .*metrics\.jsonl lacks \d+ of \d+ lines of before", capsys.readouterr().out)
    assert rows(recipe)[0]["step"] == 3
    ours, theirs = weights(recipe), weights(finished(VARIANTS["lora"]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.wide
@pytest.mark.parametrize("name", ["lora", "full, averaged"])
def test_a_run_that_broke_off_while_saving_its_result_can_be_resumed(make, finished, tmp_path, monkeypatch, name):
    recipe = replace(make("", **VARIANTS[name]), output=str(tmp_path))

    def break_off(*_: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("difftuning_control.runs.manifest.model_card", break_off)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    assert weights(recipe)
    assert record(recipe)["status"] == "running"
    train(resumed(recipe))
    assert_same_run(recipe, finished(VARIANTS[name]))


KILLED_WHILE_WRITING_CHECKPOINT_4 = """
import os, signal, sys
from difftuning_control import cli
from difftuning_control.training import checkpoint

write_json = checkpoint.write_json

def deadly(path, values):
    if values["step"] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    write_json(path, values)

checkpoint.write_json = deadly
cli.main(["train", "--config", sys.argv[1]])
"""


@pytest.mark.wide
def test_a_run_killed_while_it_writes_a_checkpoint_and_resumed_is_bit_equal(make, finished, tmp_path):
    recipe = replace(make(""), output=str(tmp_path / "run"))
    write_recipe(tmp_path, recipe)
    command = [sys.executable, "-c", KILLED_WHILE_WRITING_CHECKPOINT_4, str(tmp_path / "recipe.yaml")]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert {p.name for p in Path(recipe.output).glob("*checkpoint*")} == {"checkpoint-2", ".checkpoint-4.partial"}
    train(resumed(recipe))
    assert_same_run(recipe, finished({}))
    assert not list(Path(recipe.output).glob("*checkpoint*"))


@pytest.mark.wide
@pytest.mark.parametrize(
    "watching",
    [
        {"checkpoint_every": 5},
        {"validate_every": 0},
        {"validate_every": 1},
        {"save_at": [2, 6]},
        {"sample_every": 2, "sample_steps": 2, "sample_prompts": ["red 9"]},
    ],
    ids=str,
)
def test_what_only_watches_changes_no_weight_and_not_the_runs_identity(make, finished, tmp_path, watching):
    recipe = replace(make("", training=watching), output=str(tmp_path))
    run = train(recipe).record
    torch.testing.assert_close(weights(recipe), weights(finished({})), atol=0, rtol=0)
    assert run.identity == record(finished({}))["identity"]


@pytest.mark.wide
def test_gradient_checkpointing_changes_nothing_but_rounding(make, finished, tmp_path):
    recipe = replace(make("", "full", training={"gradient_checkpointing": True}), output=str(tmp_path))
    with recomputed() as again:
        train(recipe)
    assert "Linear" in again
    torch.testing.assert_close(weights(recipe), weights(finished({"method": "full"})), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trackers": ["wandb"]}, r"trackers names wandb, which is not installed; run pip install .*\[wandb\]"),
        ({"optimizer": "adamw8bit"}, "optimizer is adamw8bit, which needs bitsandbytes; run pip install"),
        ({"mixed_precision": "fp16"}, "mixed_precision is fp16, which needs a GPU; use bf16 or no on a CPU"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_this_machine_has_not_is_refused(monkeypatch, settings, message):
    monkeypatch.setattr("difftuning_control.training.setup.find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        make_accelerator(Recipe(training=TrainingConfig(**settings)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "tuning"),
    [("lora", {}), ("full", {}), ("controlnet", {}), ("lora", {"forgetting_budget": 0.1, "retention_ratio": 0.4})],
)
def test_two_processes_train_as_one_with_a_batch_twice_as_large(make, tmp_path, method, tuning):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launchers = {1: [sys.executable], 2: [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]}
    recipes = {}
    for processes, launcher in launchers.items():
        training = {"batch_size": 10 // processes, "learning_rate": 1e-3}
        cache = {"cache": str(tmp_path / f"cache-{processes}")}
        recipe = replace(
            make("", method, training=training, data=cache, tuning=tuning), output=str(tmp_path / str(processes))
        )
        write_recipe(tmp_path, recipe)
        command = [*launcher, "-m", "difftuning_control.cli", "train", "--config", str(tmp_path / "recipe.yaml")]
        subprocess.run(command, check=True, timeout=300, env=environment)
        recipes[processes] = recipe
    assert record(recipes[2])["processes"] == 2
    torch.testing.assert_close(weights(recipes[2]), weights(recipes[1]), atol=1e-5, rtol=1e-4)
    for one, two in zip(rows(recipes[1]), rows(recipes[2]), strict=True):
        assert two == pytest.approx(one, abs=1e-4)


# --- resuming -------------------------------------------------------------------------------------------------------


def test_a_finished_run_that_is_resumed_is_returned_without_a_step(finished):
    recipe = finished({})
    before = contents(Path(recipe.output))
    with interrupted_after(1) as taken:
        result = train(resumed(recipe))
    assert result.record == run_record(recipe)
    assert (result.history, result.output) == (rows(recipe), Path(recipe.output))
    assert not taken
    assert contents(Path(recipe.output)) == before


@pytest.mark.wide
def test_a_resume_without_an_earlier_run_starts_from_the_beginning(make, finished, tmp_path):
    recipe = replace(make(""), output=str(tmp_path / "new"))
    train(resumed(recipe))
    assert_same_run(recipe, finished({}))


CHANGES: dict[str, Callable[[Recipe], Recipe]] = {
    "seed": lambda r: replace(r, training=replace(r.training, seed=1)),
    # bank items that validation keeps for itself are not trained on
    "validation size": lambda r: replace(r, training=replace(r.training, validation_size=1)),
    "rank": lambda r: replace(r, adapter=AdapterConfig(rank=4)),
    "weight": lambda r: replace(r, tuning=replace(r.tuning, retention_weight=0.2)),
    "bank": lambda r: replace(r, bank=replace(r.bank, steps=3)),
}


@pytest.mark.sample("interrupted-validation size", "interrupted-rank")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("complete", [True, False], ids=["finished", "interrupted"])
def test_a_resume_with_another_recipe_is_refused_and_nothing_is_lost(
    make, finished, tmp_path_factory, change, complete
):
    recipe = finished({}) if complete else interrupted(make, tmp_path_factory)
    before = contents(Path(recipe.output))
    with pytest.raises(UserError, match="another recipe, base or data"):
        train(change(resumed(recipe)))
    assert contents(Path(recipe.output)) == before


def interrupted(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = replace(make(""), output=str(tmp_path_factory.getbasetemp() / "interrupted"))
    if not Path(recipe.output).exists():
        with interrupted_after(3), pytest.raises(KeyboardInterrupt):
            train(recipe)
    return recipe


def other_picture(folder: Path) -> None:
    (folder / "1.png").write_bytes((folder / "2.png").read_bytes())


def other_caption(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text((folder / "metadata.jsonl").read_text().replace("red 1", "blue 1"))


@pytest.mark.sample("other_caption")
@pytest.mark.parametrize("change", [other_picture, other_caption])
def test_a_resume_after_the_data_changed_in_place_is_refused(make, tmp_path, change):
    folder = write_pictures(tmp_path / "data")
    recipe = replace(make("", **PLAIN, data={"path": str(folder)}), output=str(tmp_path / "run"))
    with interrupted_after(3), pytest.raises(KeyboardInterrupt):
        train(recipe)
    change(folder)
    with pytest.raises(UserError, match="another recipe, base or data"):
        train(resumed(recipe))


@pytest.mark.wide
def test_an_earlier_run_is_replaced_only_when_asked(make, finished, tmp_path):
    recipe = replace(make(""), output=str(tmp_path))
    with interrupted_after(3), pytest.raises(KeyboardInterrupt):
        train(recipe)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"already holds a run \(running\)"):
        train(recipe)
    assert contents(tmp_path) == before
    train(recipe, overwrite=True)
    assert_same_run(recipe, finished({}))


def with_source(recipe: Recipe, role: str, place: Path) -> Recipe:
    if role == "training.begin_from":
        return replace(recipe, training=replace(recipe.training, begin_from=str(place)))
    return replace(recipe, model=replace(recipe.model, id=str(place)))


@pytest.mark.parametrize(
    ("role", "place", "by_a_run"),
    [
        ("training.begin_from", "", True),
        ("training.begin_from", "step-000002", True),
        ("model.id", "pipeline", True),
        ("model.id", "earlier/pipeline", False),  # which a run did not write, and leaves alone
    ],
)
def test_what_a_run_begins_from_is_not_cleared_away_for_it(make, role, place, by_a_run, tmp_path):
    folder = tmp_path / "run"
    (folder / place).mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    recipe = with_source(replace(make(""), output=str(folder)), role, folder / place)
    said = rf"{role} .* lies in the output .*, which --overwrite clears first"
    with pytest.raises(UserError, match=said) if by_a_run else nullcontext():
        refuse_places(recipe, overwrite=True)
    with pytest.raises(UserError, match=said):
        refuse_places(recipe, overwrite=True, clears_all=True)  # a pilot
    refuse_places(replace(recipe, output=str(tmp_path / "other")), overwrite=True, clears_all=True)
    refuse_places(resumed(recipe), overwrite=True)  # of which nothing is cleared
    with pytest.raises(UserError, match=said):
        refuse_places(resumed(recipe), overwrite=True, clears_all=True)  # a pilot never goes on so


@pytest.mark.wide
def test_a_folder_that_another_run_writes_into_is_refused_and_left_alone(make, tmp_path):
    recipe = replace(make("", training={"max_steps": 1}), output=str(tmp_path))
    with interrupted_after(1), pytest.raises(KeyboardInterrupt):
        train(recipe)
    other = OutputFolder(tmp_path, resume=True, overwrite=False)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="in use by another run"):
        train(recipe, overwrite=True)
    assert contents(tmp_path) == before
    other.release()
    assert train(recipe, overwrite=True).record.status == "complete"


# --- a loss that is not finite --------------------------------------------------------------------------------------


@pytest.mark.sample("2")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer_and_names_step_and_row(
    make, model_dir, tmp_path, accumulation
):
    """Item 3 of a bank of six is NaN; an item is drawn once in every five rows from the bank."""
    request = BankRequest(size=6, steps=1, resolution=16)
    folder = KnowledgeBank.build(load_family(str(model_dir)), tmp_path / "bank", request).folder
    shard = folder / "bank-00000.safetensors"
    latents = load_file(shard)["latents"]
    latents[3] = torch.nan
    save_file({"latents": latents}, shard)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["digest"]
    write_json(folder / "manifest.json", manifest | {"shards": {shard.name: digest_of_file(shard)}})

    bank = {"path": str(folder), "size": 6, "steps": 1, "prompts": "empty"}
    training = {"checkpoint_every": 1, "max_steps": 20, "gradient_accumulation_steps": accumulation}
    recipe = replace(make("", bank=bank, training=training), output=str(tmp_path / "run"))
    with interrupted_after(99) as taken, pytest.raises(NonFiniteLossError) as error:
        train(recipe)
    done = len(taken) - (best_device().type == "cuda")  # there the last was begun, and moved nothing
    assert f"at step {done + 1} (rows: bank item 3)" in str(error.value)
    assert 0 < done <= 5
    assert len([r for r in rows(recipe) if "loss" in r]) == done
    (checkpoint,) = checkpoints(tmp_path / "run")
    assert checkpoint.name == f"checkpoint-{done}"
    assert all(w.isfinite().all() for w in load_file(checkpoint / "weights.safetensors").values())
    assert (record(recipe)["status"], record(recipe)["error"]) == ("failed", str(error.value))


# --- what is measured and written -----------------------------------------------------------------------------------


@pytest.mark.sample("adapter averaged, with a budget")
def test_the_record_says_what_ran_and_what_came_of_it(finished, variant):
    recipe = finished(variant)
    run, output = record(recipe), Path(recipe.output)
    assert run["status"] == "complete"
    resolved = replace(recipe, data=replace(recipe.data, resolution=16))  # the model's own, where the recipe names none
    assert run["recipe"] == json.loads(json.dumps(resolved.to_dict()))
    assert set(run["versions"]) >= {"python", "torch", "diffusers", "peft", "accelerate", "difftuning-control"}
    assert set(run["fingerprints"]["base"]) == {"denoiser", "vae", "text_encoder", "tokenizer"}
    assert all(run["fingerprints"][name] for name in ("data", "held_out", "bank"))
    assert (run["data"]["pictures"], run["data"]["held_out"], run["bank"]["items"]) == (6, 2, 8)
    for role in ("target", "bank"):
        for when in ("base", "tuned"):
            assert len(run["losses"][role][when]["loss"]) == 5
        assert run["losses"][role]["base"] != run["losses"][role]["tuned"]
    assert run["steps_per_second"] > 0
    assert set(run["timings"]) == {"preparation", "training"}
    assert run["outputs"] == {n: digest_of_file(output / n) for n in run["outputs"]}
    result = "pytorch_lora_weights.safetensors" if recipe.method == "lora" else "pipeline"
    written = {
        "README.md",
        "metrics.jsonl",
        "recipe.yaml",
        "run.json",
        "inputs.jsonl",
        "audit.jsonl",
        "report.html",
        result,
    }
    assert {p.name for p in output.iterdir()} == written
    assert not [p for p in output.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]


@pytest.mark.sample("everything drawn")
def test_every_step_is_logged_with_the_loss_of_each_role(finished, variant):
    steps = [r for r in rows(finished(variant)) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    keys = {"step", "loss", "target_loss", "bank_loss", "learning_rate"}
    if "forgetting_budget" in variant.get("tuning", {}):
        keys |= {f"multiplier/{band}" for band in range(5)}
    assert all(r.keys() == keys for r in steps)
    assert steps[-1]["learning_rate"] == pytest.approx(0, abs=1e-9)


def validators_of(recipe: Recipe) -> tuple[StableDiffusion, dict[str, BandValidator]]:
    family = load_family(recipe.model.id)
    objective = build_objective(recipe, family.process)
    return family, prepare_inputs(recipe, family, objective, make_accelerator(recipe)).validation


def test_validation_is_the_same_for_the_same_weights(finished):
    base = record(finished({}))["losses"]
    assert record(finished(VARIANTS["full, averaged"]))["losses"]["target"]["base"] == base["target"]["base"]
    family, validators = validators_of(finished({}))
    for role, validator in validators.items():
        again = validator.measure(family.denoiser)
        if best_device().type == "cpu":
            assert again.to_dict() == base[role]["base"]
        assert again.losses == pytest.approx(base[role]["base"]["loss"], rel=1e-4)
        by_one = replace(validator, batch_size=1).measure(family.denoiser)
        assert by_one.losses == pytest.approx(base[role]["base"]["loss"], rel=1e-4)


def test_validation_switches_dropout_off_while_it_measures(finished):
    family, validators = validators_of(finished({}))
    for name, parameter in AdapterTuning(family, AdapterConfig(rank=2, dropout=0.9)).parameters().items():
        parameter.data.add_(0.5 if ".lora_B" in name else 0.0)
    measured = []
    for training in (True, False):
        family.denoiser.train(training)
        measured.append(validators["target"].measure(family.denoiser))
        assert family.denoiser.training is training
    assert measured[0] == measured[1]


@pytest.mark.parametrize("name", ["lora", "full, averaged"])
def test_what_is_saved_is_what_was_validated(finished, name):
    recipe = finished(VARIANTS[name])
    family, validators = validators_of(recipe)
    if recipe.method == "lora":
        family.pipe.load_lora_weights(recipe.output, weight_name="pytorch_lora_weights.safetensors")
    else:
        family = load_family(f"{recipe.output}/pipeline")
    for role, validator in validators.items():
        tuned = record(recipe)["losses"][role]["tuned"]["loss"]
        assert validator.measure(family.denoiser).losses == pytest.approx(tuned, rel=1e-5)


@pytest.mark.wide
def test_plain_fine_tuning_draws_no_bank(make, tmp_path):
    recipe = make("", **PLAIN, data={"cache": str(tmp_path / "cache")})
    run = train(replace(recipe, output=str(tmp_path / "run"))).record
    assert run.bank is None
    assert set(run.losses) == {"target"}
    assert not (tmp_path / "cache" / "banks").exists()


@pytest.mark.wide
def test_plain_fine_tuning_only_validates_on_a_bank_that_is_named(make, finished, tmp_path):
    bank = {"path": record(finished({}))["bank"]["folder"]}
    recipe = replace(make("", **PLAIN, bank=bank), output=str(tmp_path))
    run = train(recipe).record
    assert set(run.losses) == {"target", "bank"}
    assert not any("bank_loss" in r for r in rows(recipe))
    torch.testing.assert_close(weights(recipe), weights(finished(PLAIN)), atol=0, rtol=0)


@pytest.mark.wide
def test_overfitting_four_pictures_lowers_the_loss_in_every_noise_band(make, pictures, tmp_path):
    data = {"limit": 4, "validation_path": str(pictures)}
    training = {"max_steps": 60, "batch_size": 16, "checkpoint_every": 100, "validate_every": 0}
    recipe = replace(make("", "full", **PLAIN, data=data, training=training), output=str(tmp_path))
    losses = train(recipe).record.losses["target"]
    assert all(tuned < base for tuned, base in zip(losses.tuned.losses, losses.base.losses))
    logged = [r["target_loss"] for r in rows(recipe) if "loss" in r]
    assert sum(logged[-10:]) < 0.9 * sum(logged[:10])


@pytest.mark.wide
@pytest.mark.parametrize("method", ["lora", "full"])
def test_bfloat16_trains_float32_weights(make, finished, tmp_path, method):
    recipe = replace(make("", method, training={"mixed_precision": "bf16"}), output=str(tmp_path))
    run = train(recipe).record
    assert {w.dtype for w in weights(recipe).values()} == {torch.float32}
    exact = record(finished({"method": method}))
    for role, losses in run.losses.items():
        for when in ("base", "tuned"):
            assert getattr(losses, when).losses == pytest.approx(exact["losses"][role][when]["loss"], rel=0.05)
    assert not all(torch.equal(w, weights(finished({"method": method}))[n]) for n, w in weights(recipe).items())


def test_tensorboard_gets_figures_and_grids(make, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    drawn = {"sample_every": 2, "sample_steps": 1, "sample_prompts": ["red 1"]}
    result = train(
        replace(make("", training={"trackers": ["tensorboard"], "max_steps": 2, **drawn}), output=str(tmp_path))
    )
    events = EventAccumulator(str(tmp_path / "logs" / "difftuning-control"))
    events.Reload()
    figures = {(row["step"], round(row["loss"], 6)) for row in result.history if "loss" in row}
    assert {(event.step, round(event.value, 6)) for event in events.Scalars("loss")} == figures
    (sent,) = events.Images("samples")
    with (
        Image.open(io.BytesIO(sent.encoded_image_string)) as shown,
        Image.open(tmp_path / "samples" / "step-000002.png") as kept,
    ):
        assert (sent.step, shown.tobytes()) == (2, kept.convert("RGB").tobytes())


@pytest.mark.wide
def test_sample_grids_are_drawn_when_asked(make, tmp_path):
    training = {"sample_every": 2, "sample_steps": 1, "max_steps": 3, "sample_prompts": ["red 1", "six"]}
    train(replace(make("", training=training), output=str(tmp_path)))
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-000002.png", "step-000003.png"]
