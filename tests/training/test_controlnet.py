"""A ControlNet is taught beside a model that stays as it was; what is saved draws in stock diffusers as here."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from difftuning_control.adapters.tuning import ControlNetTuning, merged
from difftuning_control.cli import main
from difftuning_control.data.batches import BatchSource, TrainingRows
from difftuning_control.data.control_spec import Conditioner, ControlSpec
from difftuning_control.data.images import to_images
from difftuning_control.data.sources import load_images
from difftuning_control.errors import UserError
from difftuning_control.evaluation.convergence import has_settled
from difftuning_control.evaluation.drawing import sample_pictures, save_grid
from difftuning_control.evaluation.fidelity import FidelityProbe
from difftuning_control.families.control import ControlledDenoiser
from difftuning_control.families.hub import best_device
from difftuning_control.families.loading import family_of, load_controlnet, load_family
from difftuning_control.families.sd import StableDiffusion
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.inputs import BankConfig, ControlConfig, DataConfig, FidelityConfig, ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.training import TrainingConfig, TuningConfig
from difftuning_control.runs import manifest
from difftuning_control.runs.card import model_card
from difftuning_control.runs.finished import tuned_model
from difftuning_control.runs.identity import write_recipe
from difftuning_control.runs.record_sections import Fingerprints
from difftuning_control.system.digests import digest_of_file
from difftuning_control.system.seeds import step_seed
from difftuning_control.system.tensors import digest_of_module, digest_of_tensors
from difftuning_control.training.checkpoint import checkpoints
from difftuning_control.training.inputs import prepare_inputs
from difftuning_control.training.loop import TrainingLoop
from difftuning_control.training.setup import build_objective, check_frozen, make_accelerator
from difftuning_control.verbs.parse import parse
from difftuning_control.verbs.train import train
from support.command_line import flags, settings
from support.controls import OUTLINE, prepared, rows_of, write_photos
from support.tensors import differing
from support.tiny_sd import tiny_pipeline
from support.trainings import PLAIN, interrupted_after, record, resumed, rows, run_record, trained_once

STEPS = 6
FILE = "diffusion_pytorch_model.safetensors"
PROMPTS = ["red 1", "a blue square", "six"]
LORA = {"adapter": {"on": "controlnet", "rank": 2, "alpha": 4.0}}
VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "lora": LORA,
    "averaged": {"training": {"ema_decay": 0.9}},
    "everything drawn": {
        "data": {"flip": True, "crops": 2},
        "tuning": {"prompt_dropout": 0.4, "retention_prompts": "own", "estimator": "weight"},
        "adapter": {**LORA["adapter"], "dropout": 0.5},
        "control": {"dropout": 0.4, "bank_condition": "blank"},
        "training": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "mixed_precision": "bf16"},
    },
}

Maker = Callable[..., Recipe]
Finished = Callable[..., Recipe]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("controlnet")


@pytest.fixture(scope="module")
def photos(root: Path) -> Path:
    return write_photos(root / "photos")


@pytest.fixture(scope="module")
def annotator(root: Path) -> Iterator[str]:
    (root / "outlines.py").write_text(OUTLINE)
    sys.path.insert(0, str(root))
    yield "outlines:outline"
    sys.path.remove(str(root))
    sys.modules.pop("outlines", None)


@pytest.fixture(scope="module")
def make(root: Path, model_dir: Path, photos: Path, annotator: str) -> Maker:
    """Makes recipes of a tiny ControlNet that trains for six steps, with one cache for all."""
    training = {
        "max_steps": STEPS,
        "batch_size": 5,
        "checkpoint_every": 2,
        "validate_every": 0,
        "validation_size": 2,
        "sample_every": 0,
        "learning_rate": 1e-2,
    }
    fidelity = {"every": 2, "size": 2, "steps": 2}

    def recipe(name: str = "", method: str = "controlnet", **sections: dict[str, Any]) -> Recipe:
        control = {"annotator": annotator, "fidelity": fidelity, **sections.get("control", {})}
        control["fidelity"] = FidelityConfig(**control["fidelity"])
        data = {"path": str(photos), "holdout": 0.25, "cache": str(root / "cache"), **sections.get("data", {})}
        return Recipe(
            method,
            ModelConfig(str(model_dir)),
            DataConfig(**data),
            TuningConfig(**sections.get("tuning", {})),
            BankConfig(**{"size": 10, "steps": 2, "batch_size": 4, **sections.get("bank", {})}),
            AdapterConfig(**sections.get("adapter", {})),
            ControlConfig(**control) if method == "controlnet" else ControlConfig(),
            TrainingConfig(**{**training, **sections.get("training", {})}),
            str(root / name),
        )

    return recipe


@pytest.fixture(scope="module")
def finished(make: Maker) -> Finished:
    return trained_once(make)


def weights(recipe: Recipe) -> dict[str, Tensor]:
    return load_file(Path(recipe.output) / "controlnet" / FILE)


def untrained(recipe: Recipe) -> dict[str, Tensor]:
    """The ControlNet that a recipe starts from, if it names none."""
    return load_family(recipe.model.id).new_controlnet(recipe.training.seed).state_dict()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(found), dict(expected), atol=0, rtol=0)


def assert_same_run(found: Recipe, expected: Recipe) -> None:
    """Equal weights byte by byte, and everything that was measured."""
    files = [Path(r.output) / "controlnet" / FILE for r in (found, expected)]
    assert digest_of_file(files[0]) == digest_of_file(files[1])
    for name in ("losses", "fidelity", "steps", "identity", "frozen", "control"):
        assert record(found)[name] == record(expected)[name], name
    curves = [(Path(r.output) / "fidelity.json").read_bytes() for r in (found, expected)]
    assert curves[0] == curves[1]
    assert rows(found) == rows(expected)


def generators(seed: int = 0, amount: int = len(PROMPTS)) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(step_seed(seed, i)) for i in range(amount)]


def stock(recipe: Recipe) -> StableDiffusionControlNetPipeline:
    """The result in stock diffusers, as a user would load it."""
    controlnet = ControlNetModel.from_pretrained(f"{recipe.output}/controlnet")
    return StableDiffusionControlNetPipeline.from_pretrained(recipe.model.id, controlnet=controlnet)


def assert_same_pictures(found: list[Image.Image], expected: list[Image.Image]) -> None:
    assert len(found) == len(expected)
    levels = 0 if best_device().type == "cpu" else 2  # of 255, by rounding
    for a, b in zip(found, expected):
        assert a.size == b.size
        assert np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() <= levels


# --- before the first step ------------------------------------------------------------------------------------------


def with_factor(factor: int) -> StableDiffusion:
    """The tiny model with an autoencoder that brings pictures down by so much."""
    pipe, levels = tiny_pipeline(), factor.bit_length()
    vae = AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8 * factor,
        mid_block_add_attention=False,
        scaling_factor=0.7,
    )
    components = {**pipe.components, "vae": vae}
    return family_of(StableDiffusionPipeline(**components, requires_safety_checker=False))


@pytest.mark.sample("4")
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_new_controlnet_reads_conditions_at_the_autoencoders_factor_and_adds_exactly_nothing(factor):
    family = with_factor(factor)
    controlnet = family.controlnet = family.new_controlnet(0)
    family.check_controlnet(controlnet, "of its own")
    assert len(controlnet.config.conditioning_embedding_out_channels) == factor.bit_length()
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    control = torch.randint(0, 256, (2, 3, 8 * factor, 8 * factor), generator=generator, dtype=torch.uint8)
    embeds = family.encode_prompts(["red", ""])
    assert family.encode_moments(control / 127.5 - 1)[0].shape == latents.shape
    with torch.no_grad():
        alone = family.predict(family.denoiser, latents, torch.tensor([3, 800]), embeds)
        without = family.predict(family.model, latents, torch.tensor([3, 800]), embeds)
        beside = family.predict(family.model, latents, torch.tensor([3, 800]), embeds | {"control": control})
        assert torch.equal(alone, without)
        assert torch.equal(alone, beside)
        for block in controlnet.controlnet_down_blocks:
            block.weight.fill_(0.1)
        assert not torch.equal(
            alone, family.predict(family.model, latents, torch.tensor([3, 800]), embeds | {"control": control})
        )


def test_a_new_controlnet_is_a_copy_of_the_encoder_drawn_from_the_seed(family):
    encoder, one = family.denoiser.state_dict(), family.new_controlnet(1).state_dict()
    shared = [name for name in one if name in encoder]
    assert len(shared) > 50
    assert all(torch.equal(one[name], encoder[name]) for name in shared)
    random = torch.get_rng_state()
    assert_equal(family.new_controlnet(1).state_dict(), one)
    assert torch.equal(torch.get_rng_state(), random)
    changed = differing(family.new_controlnet(2).state_dict(), one)
    assert changed
    assert all(name.startswith("controlnet_cond_embedding.") for name in changed)
    own = [name for name in one if name.startswith(("controlnet_down_blocks", "controlnet_mid_block"))]
    assert not any(one[name].any() for name in own)


def test_the_model_beside_its_controlnet_trains_the_controlnet_alone(family):
    family.controlnet = family.new_controlnet(0)
    tuning = ControlNetTuning(family, ControlSpec(resolution=16))
    model = family.model
    assert isinstance(model, ControlledDenoiser)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"controlnet.{name}" for name in tuning.parameters()}
    assert set(tuning.parameters()) == set(family.controlnet.state_dict())


# --- what trains ----------------------------------------------------------------------------------------------------

ZERO = ("controlnet_down_blocks.", "controlnet_mid_block.")


@pytest.mark.wide
def test_first_the_zero_convolutions_move_and_then_all_weights(make, tmp_path):
    training = {"weight_decay": 0.0, "save_at": [1, 4], "max_steps": 4, "lr_scheduler": "constant"}
    recipe = replace(make(training=training, control={"fidelity": {"every": 0}}), output=str(tmp_path))
    run = train(recipe).record
    start = untrained(recipe)
    first, last = (load_file(tmp_path / f"step-{step:06d}" / FILE) for step in (1, 4))
    zero = {name for name in start if name.startswith(ZERO)}
    assert differing(first, start) == zero
    assert differing(last, start) == set(start)
    assert_equal(weights(recipe), last)
    assert ControlSpec.load(tmp_path / "step-000001") == ControlSpec.load(tmp_path / "controlnet")
    assert set(run.losses["target"].tuned.to_dict()) == {"u", "loss"}


@pytest.mark.wide
@pytest.mark.parametrize("name", ["whole", "lora"])
def test_the_denoiser_stays_bit_by_bit_as_it_was_and_the_record_says_so(make, tmp_path, monkeypatch, name):
    loaded: list[StableDiffusion] = []

    def load(*args: Any, **options: Any) -> StableDiffusion:
        loaded.append(load_family(*args, **options))
        return loaded[-1]

    monkeypatch.setattr("difftuning_control.families.loading.load_family", load)
    recipe = replace(make(**VARIANTS[name]), output=str(tmp_path))
    run = train(recipe).record
    (family,) = loaded
    base = load_family(recipe.model.id)
    for part in ("unet", "vae", "text_encoder"):
        assert_equal(getattr(family.pipe, part).state_dict(), getattr(base.pipe, part).state_dict())
    digest = digest_of_module(base.denoiser)
    assert (run.frozen.denoiser_before, run.frozen.denoiser_after) == (digest, digest)
    assert run.fingerprints.base["denoiser"] == digest


def test_a_denoiser_that_did_change_is_not_passed_over(family):
    fingerprints = Fingerprints(base=dict(family.fingerprints))
    assert check_frozen(family, fingerprints).denoiser_after == fingerprints.base["denoiser"]
    next(family.denoiser.parameters()).data[0] += 1e-6
    with pytest.raises(RuntimeError, match="the frozen denoiser changed"):
        check_frozen(family, fingerprints)


def trained_by_lora(name: str) -> bool:
    wrapped = tuple(f"{target}.weight" for target in StableDiffusion.lora_targets)
    return name.endswith(wrapped) or name.startswith(StableDiffusion.controlnet_whole)


@pytest.mark.wide
def test_a_lora_changes_its_targets_the_condition_embedding_and_the_zero_convolutions_only(finished):
    recipe = finished(LORA)
    start = untrained(recipe)
    changed = differing(weights(recipe), start)
    assert changed == {name for name in start if trained_by_lora(name)}
    assert 0 < len(changed) < len(start)


@pytest.mark.parametrize("init", ["gaussian", "pissa"])
def test_what_a_lora_saves_is_the_weights_and_its_update_together(family, tmp_path, init):
    family.controlnet = family.new_controlnet(0)
    start = {name: value.clone() for name, value in family.controlnet.state_dict().items()}
    adapter = AdapterConfig(on="controlnet", rank=2, alpha=6.0, init=init)
    tuning = ControlNetTuning(family, ControlSpec(resolution=16), adapter, 3)
    starts = {name: tensor.clone() for name, tensor in tuning.state().items() if name.endswith(".start")}
    assert (len(starts) > 0) == (init == "pissa")
    generator = torch.Generator().manual_seed(4)
    for name, parameter in tuning.parameters().items():
        if ".lora_B" in name or name.startswith(ZERO):
            parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    adapted = family.controlnet.state_dict()
    expected = dict(start)
    for name in start:
        module, _, kind = name.rpartition(".")
        if f"{module}.lora_A.default.weight" in adapted and kind == "weight":
            a, b = (adapted[f"{module}.lora_{part}.default.weight"] for part in "AB")
            expected[name] = start[name] + 6.0 / 2 * b @ a
            if init == "pissa":
                a, b = (starts[f"{module}.lora_{part}.default.start"] for part in "AB")
                expected[name] = expected[name] + 6.0 / 2 * b @ a
        elif name.startswith(ZERO):
            expected[name] = adapted[name]
    assert any(not torch.equal(expected[n], start[n]) for n in start if ".to_q." in n)
    found = merged(family.controlnet)
    assert isinstance(found, ControlNetModel)
    torch.testing.assert_close(dict(found.state_dict()), expected, atol=1e-6, rtol=0)
    untouched = [name for name in start if not trained_by_lora(name)]
    assert all(torch.equal(found.state_dict()[name], start[name]) for name in untouched)

    tuning.save(tmp_path)
    inputs = (torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([9, 700]), torch.randn(2, 16, 16))
    picture = torch.rand(2, 3, 16, 16, generator=generator)
    plain = ControlNetModel.from_pretrained(tmp_path)
    with torch.no_grad():
        here, there = (m.eval()(*inputs, picture, return_dict=False) for m in (family.controlnet, plain))
    assert here[1].any()
    torch.testing.assert_close(there, here, atol=1e-5, rtol=1e-5)
    assert ControlSpec.load(tmp_path) == tuning.spec


# --- the result in stock diffusers ----------------------------------------------------------------------------------


@pytest.mark.wide
@pytest.mark.parametrize("name", ["whole", "lora", "averaged"])
def test_the_stock_pipeline_draws_bit_by_bit_what_is_drawn_here(finished, photos, name):
    recipe = finished(VARIANTS[name])
    conditioner = Conditioner(ControlSpec.load(f"{recipe.output}/controlnet"))
    conditions = [conditioner.prepare(Image.open(photos / f"{i}.png")) for i in range(3)]
    family, drawing = load_family(recipe.model.id), {"seed": 7, "steps": 3, "guidance_scale": 2.5, "resolution": 16}
    base = sample_pictures(family, PROMPTS, **drawing)
    with tuned_model(family, recipe.output, run_record(recipe)) as tuned:
        ours = sample_pictures(tuned, PROMPTS, **drawing, control=rows_of(conditions))
    theirs = stock(recipe)(
        PROMPTS, image=conditions, num_inference_steps=3, guidance_scale=2.5, generator=generators(7)
    )
    assert_same_pictures(ours, theirs.images)
    assert not any(np.array_equal(a, b) for a, b in zip(ours, base))
    assert family.controlnet is None
    assert_same_pictures(sample_pictures(family, PROMPTS, **drawing), base)


@pytest.fixture(scope="module")
def command(root: Path, model_dir: Path, annotator: str) -> tuple[Path, str]:
    """A run of the command line with a picture on which nothing is found, and what it printed."""
    photos = write_photos(root / "photos-command")
    for i in range(3):
        Image.new("RGB", (20, 20), (i, 90, 90)).save(photos / f"{i}.png")
    changes = {
        "method": "controlnet",
        "control.annotator": annotator,
        "control.fidelity.every": 2,
        "control.fidelity.steps": 1,
        "training.learning_rate": 1e-2,
        "training.sample_every": 2,
        "training.sample_steps": 1,
        "output": root / "command",
    }
    printed = io.StringIO()
    with redirect_stdout(printed):
        main(["train", *flags(settings(model_dir, photos, root, **changes))])
    return root / "command", printed.getvalue()


SAMPLE = ["sample", "--steps", "2", "--guidance_scale", "3", "--seed", "5", "--prompts", json.dumps(PROMPTS)]


def sampled(folder: Path) -> list[Image.Image]:
    return [Image.open(p).convert("RGB") for p in sorted(folder.glob("00*.png"))]


@pytest.mark.sample("16")
@pytest.mark.parametrize("resolution", [16, 32])
def test_sample_draws_under_a_photo_what_the_stock_pipeline_draws(command, model_dir, photos, tmp_path, resolution):
    run, photo = command[0], photos / "0.png"
    words = [*SAMPLE, "--run", str(run), "--control", str(photo), "--resolution", str(resolution)]
    main([*words, "--output", str(tmp_path / "samples"), "--compare"])
    spec = ControlSpec.load(run / "controlnet")
    condition = Conditioner(spec).prepare(Image.open(photo), resolution, resolution)
    controlnet = ControlNetModel.from_pretrained(run / "controlnet")
    pipe = StableDiffusionControlNetPipeline.from_pretrained(model_dir, controlnet=controlnet)
    theirs = pipe(
        PROMPTS, image=[condition] * 3, num_inference_steps=2, guidance_scale=3.0, generator=generators(5)
    ).images
    assert_same_pictures(sampled(tmp_path / "samples"), theirs)
    assert np.array_equal(Image.open(tmp_path / "samples" / "condition.png"), condition)
    values = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert (values["control"], values["control_ready"], values["resolution"]) == (str(photo), False, resolution)

    drawing = {"seed": 5, "steps": 2, "guidance_scale": 3.0, "resolution": resolution}
    base = sample_pictures(load_family(str(model_dir)), PROMPTS, **drawing)
    save_grid(tmp_path / "grid.png", {"condition": [condition] * 3, "base": base, "tuned": theirs}, PROMPTS)
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "samples" / "grid.png").read_bytes()
    main([*words, "--output", str(tmp_path / "samples"), "--overwrite"])
    assert not (tmp_path / "samples" / "grid.png").exists()  # of other pictures than those that are there now

    ready = ["--control", str(tmp_path / "samples" / "condition.png"), "--control_ready"]
    main([*words, *ready, "--output", str(tmp_path / "ready")])
    assert_same_pictures(sampled(tmp_path / "ready"), theirs)
    assert json.loads((tmp_path / "ready" / "samples.json").read_text())["control_ready"] is True
    assert not (tmp_path / "ready" / "grid.png").exists()
    main([*words, *ready[:2], "--output", str(tmp_path / "edges of edges")])
    assert not np.array_equal(Image.open(tmp_path / "edges of edges" / "condition.png"), condition)


def test_a_training_tells_of_pictures_without_a_condition_and_of_fidelity(command):
    run, printed = command
    values = json.loads((run / "run.json").read_text())
    blank = values["control"]["blank"]
    assert 0 < len(blank) <= 3
    assert set(blank) <= {"0.png", "1.png", "2.png"}
    assert f"note: the annotator found nothing on {len(blank)} of 6 pictures: {', '.join(blank)}\n" in printed
    without, after = values["fidelity"]["without"]["ssim"], values["fidelity"]["figures"]["ssim"][-1]
    assert f"(similarity, ssim): without control {without:.3f}, after 2 steps {after:.3f}; no convergence" in printed


def test_a_controlnet_leaves_the_files_that_the_design_names(command):
    run = command[0]
    assert {p.name for p in run.iterdir()} == {
        "controlnet",
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "fidelity.json",
        "README.md",
        "report.html",
        "samples",
        "inputs.jsonl",
        "audit.jsonl",
    }
    assert {p.name for p in (run / "controlnet").iterdir()} == {"config.json", "control_spec.json", FILE}
    values = json.loads((run / "run.json").read_text())
    assert values["outputs"] == {n: digest_of_file(run / n) for n in values["outputs"]}
    assert len(values["outputs"]) == 3
    assert values["control"]["spec"] == json.loads(json.dumps(asdict(ControlSpec.load(run / "controlnet"))))
    assert [p.name for p in (run / "samples").iterdir()] == ["step-000002.png"]


# --- the model card -------------------------------------------------------------------------------------------------


def code_of(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


@pytest.mark.wide
@pytest.mark.parametrize("name", ["whole", "lora"])
def test_the_model_card_prepares_a_condition_and_draws(finished, photos, tmp_path, monkeypatch, name):
    recipe = finished(VARIANTS[name])
    card = (Path(recipe.output) / "README.md").read_text()
    assert "ControlSpec.load(" in card
    assert ".prepare(Image.open(" in card
    assert "- controlnet\n" in card
    assert "Compared as similarity." in card
    (tmp_path / "photo.png").write_bytes((photos / "0.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(compile(code_of(card), "README.md", "exec"), found)
    assert found["image"].size == (16, 16)
    spec = ControlSpec.load(f"{recipe.output}/controlnet")
    assert np.array_equal(found["condition"], Conditioner(spec).prepare(Image.open("photo.png")))


def test_the_model_cards_code_is_valid_whatever_the_caption(finished):
    recipe = finished({})
    for prompt in ('a "red"\nsquare', "back\\slash", "{brace}", "żółw\ttab"):
        compile(code_of(model_card(recipe, replace(run_record(recipe), prompts=[prompt]))), "README.md", "exec")


# --- the same run on every way --------------------------------------------------------------------------------------


@pytest.mark.wide
@pytest.mark.parametrize(
    ("name", "steps"),
    [("whole", 4), ("whole", 6), ("lora", 4), ("averaged", 3), ("everything drawn", 4)],
)
def test_an_interrupted_run_that_is_resumed_is_bit_equal(make, finished, tmp_path, name, steps):
    recipe = replace(make(**VARIANTS[name]), output=str(tmp_path))
    with interrupted_after(steps), pytest.raises(KeyboardInterrupt):
        train(recipe)
    assert (record(recipe)["status"], len(checkpoints(tmp_path))) == ("running", 1)
    train(resumed(recipe))
    assert_same_run(recipe, finished(VARIANTS[name]))
    assert not checkpoints(tmp_path)


@pytest.mark.wide
def test_a_run_interrupted_before_its_first_checkpoint_and_resumed_has_the_same_metrics(make, finished, tmp_path):
    recipe = replace(make(), output=str(tmp_path))
    with interrupted_after(1), pytest.raises(KeyboardInterrupt):
        train(recipe)
    train(resumed(recipe))
    assert_equal(weights(recipe), weights(finished({})))
    assert_same_run(recipe, finished({}))


@pytest.mark.wide
@pytest.mark.parametrize("name", ["whole", "lora"])
def test_a_run_that_broke_off_while_saving_its_result_can_be_resumed(make, finished, tmp_path, monkeypatch, name):
    recipe = replace(make(**VARIANTS[name]), output=str(tmp_path))

    def break_off(*_: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "model_card", break_off)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    train(resumed(recipe))
    assert_same_run(recipe, finished(VARIANTS[name]))


@pytest.mark.wide
@pytest.mark.parametrize(
    "watching",
    [
        {"control": {"fidelity": {"every": 0}}},
        {"control": {"fidelity": {"every": 5, "size": 1, "steps": 1, "guidance_scale": 2.0}, "workers": 1}},
        {"training": {"sample_every": 3, "sample_steps": 1, "validate_every": 4, "checkpoint_every": 5}},
    ],
    ids=["no fidelity", "another fidelity", "grids"],
)
def test_what_only_watches_changes_no_weight_and_not_the_runs_identity(make, finished, tmp_path, watching):
    recipe = replace(make(**watching), output=str(tmp_path))
    run = train(recipe).record
    assert_equal(weights(recipe), weights(finished({})))
    assert run.identity == record(finished({}))["identity"]
    assert (tmp_path / "fidelity.json").exists() == (watching.get("control", {}).get("fidelity") != {"every": 0})
    grids = sorted(p.name for p in tmp_path.glob("samples/*"))
    assert grids == (["step-000003.png", "step-000006.png"] if "training" in watching else [])


@pytest.mark.wide
def test_the_recipe_that_a_run_writes_repeats_it(make, finished, tmp_path):
    recipe = finished(VARIANTS["everything drawn"])
    recipe = replace(recipe, data=replace(recipe.data, resolution=16))  # the model's own, which it did not name
    _, command = parse(["train", "--config", f"{recipe.output}/recipe.yaml"])
    assert {k: v for k, v in command.to_dict().items() if k != "overwrite"} == recipe.to_dict()
    assert run_record(recipe).recipe == recipe
    stopping = make(control={"params": {"least": 20, "name": "żółw"}}, training=STOPPING["training"])
    write_recipe(tmp_path, stopping)
    _, command = parse(["train", "--config", str(tmp_path / "recipe.yaml")])
    assert {k: v for k, v in command.to_dict().items() if k != "overwrite"} == stopping.to_dict()


def test_a_run_that_was_made_before_there_were_controlnets_is_still_read(make):
    recipe = make(method="lora")
    values = recipe.to_dict()
    del values["control"], values["adapter"]["on"], values["training"]["stop_when"], values["training"]["stop_after"]
    assert Recipe.from_dict(values) == recipe


CHANGES: dict[str, Callable[[Recipe], Recipe]] = {
    "annotator's parameters": lambda r: replace(r, control=replace(r.control, params={"least": 31})),
    "dropout": lambda r: replace(r, control=replace(r.control, dropout=0.5)),
    "bank condition": lambda r: replace(r, control=replace(r.control, bank_condition="blank")),
    "adapter": lambda r: replace(r, adapter=AdapterConfig(on="controlnet")),
    "start": lambda r: replace(r, control=replace(r.control, init=f"{r.output}/controlnet")),
}


@pytest.mark.sample("start")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_resume_with_another_control_is_refused(finished, change):
    recipe = finished({})
    with pytest.raises(UserError, match="another recipe, base or data"):
        train(change(resumed(recipe)))
    assert train(resumed(recipe)).record == run_record(recipe)


# --- fidelity and when to stop --------------------------------------------------------------------------------------


def curve_of(recipe: Recipe) -> dict[str, Any]:
    return json.loads((Path(recipe.output) / "fidelity.json").read_text())


@pytest.mark.sample("2-*")
@pytest.mark.parametrize(("every", "steps"), [(2, [0, 2, 4, 6]), (4, [0, 4, 6])])
def test_the_record_the_curve_and_the_metrics_say_the_same(finished, every, steps):
    recipe = finished({} if every == 2 else {"control": {"fidelity": {"every": 4, "size": 2, "steps": 2}}})
    curve = curve_of(recipe)
    assert record(recipe)["fidelity"] == curve
    assert (curve["steps"], curve["kind"], curve["main"], curve["higher_is_better"]) == (
        steps,
        "similarity",
        "ssim",
        True,
    )
    logged = [(r["step"], r["fidelity/ssim"]) for r in rows(recipe) if "fidelity/ssim" in r]
    assert logged == list(zip(steps, curve["figures"]["ssim"]))
    assert set(curve["without"]) == set(curve["figures"]) == {"ssim"}
    assert curve["figures"]["ssim"][0] == curve["without"]["ssim"]  # a new ControlNet adds nothing
    assert curve["figures"]["ssim"][-1] != curve["without"]["ssim"]


@pytest.mark.sample("lora")
@pytest.mark.parametrize("name", ["whole", "lora", "averaged"])
def test_the_fidelity_that_is_told_is_that_of_the_weights_that_are_saved(finished, name):
    recipe = finished(VARIANTS[name])
    family, _, inputs = prepared(recipe)
    family.controlnet = None
    with tuned_model(family, recipe.output, run_record(recipe)) as tuned:
        assert inputs.control.probe.measure(tuned) == pytest.approx(
            {"ssim": curve_of(recipe)["figures"]["ssim"][-1]}, abs=1e-5
        )


RISE = [0.1, 0.11, 0.1, 0.8, 0.81, 0.8, 0.81, 0.8, 0.8, 0.81, 0.8, 0.81, 0.8]
STOPPING = {
    "control": {"fidelity": {"every": 1, "size": 1, "steps": 1}},
    "training": {"max_steps": 12, "stop_when": "converged", "stop_after": 2, "validate_every": 4},
}


def plant(patch: pytest.MonkeyPatch, values: list[float], measured: int = 0) -> None:
    """Fidelity is what `values` say, one a measurement, of which so many were made before."""
    places = count(measured)

    def measure(probe: FidelityProbe, family: StableDiffusion, controlled: bool = True) -> dict[str, float]:
        return {"ssim": values[next(places)] if controlled else 0.1}

    patch.setattr(FidelityProbe, "measure", measure)


@pytest.fixture(scope="module")
def stopped(make: Maker) -> Recipe:
    """A run that ends two steps after its planted curve has settled."""
    recipe = make("stopped", **STOPPING)
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, RISE)
        train(recipe)
    return recipe


@pytest.mark.wide
def test_a_run_stops_so_many_steps_after_its_curve_has_settled(make, stopped, tmp_path):
    settled = has_settled(range(len(RISE)), RISE)
    assert settled == 6
    assert record(stopped)["steps"] == settled + 2
    assert curve_of(stopped)["steps"] == list(range(9))
    assert curve_of(stopped)["convergence"]["step"] == 2.5
    assert [r["step"] for r in rows(stopped) if "loss" in r] == list(range(1, 9))
    on = replace(make(**STOPPING), output=str(tmp_path))
    on = replace(on, training=replace(on.training, stop_when=None, stop_after=0, save_at=[7, 8]))
    run = train(on).record
    assert run.steps == 12
    assert_equal(weights(stopped), load_file(tmp_path / "step-000008" / FILE))
    assert differing(weights(stopped), load_file(tmp_path / "step-000007" / FILE))
    assert differing(weights(stopped), weights(on))
    assert f"for {settled + 2} steps" in (Path(stopped.output) / "README.md").read_text()
    assert not checkpoints(Path(stopped.output))


@pytest.mark.wide
@pytest.mark.parametrize("steps", [3, 8])
def test_a_run_that_stops_is_bit_equal_when_it_was_interrupted(make, stopped, tmp_path, monkeypatch, steps):
    recipe = replace(make(**STOPPING), output=str(tmp_path))
    with monkeypatch.context() as patch:
        plant(patch, RISE)
        with interrupted_after(steps), pytest.raises(KeyboardInterrupt):
            train(recipe)
    done = (steps - 1) // 2 * 2
    plant(monkeypatch, RISE, measured=done + 1)
    train(resumed(recipe))
    assert_same_run(recipe, stopped)


@pytest.mark.wide
def test_a_run_that_stops_and_breaks_off_while_saving_is_resumed_with_the_same_metrics(
    make, stopped, tmp_path, monkeypatch
):
    recipe = replace(make(**STOPPING), output=str(tmp_path))

    def break_off(*_: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        plant(patch, RISE)
        patch.setattr(manifest, "model_card", break_off)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    (checkpoint,) = checkpoints(tmp_path)
    plant(monkeypatch, RISE, measured=int(checkpoint.name.split("-")[1]) + 1)
    train(resumed(recipe))
    assert_equal(weights(recipe), weights(stopped))
    assert rows(recipe) == rows(stopped)


def test_a_run_that_stops_validates_its_last_step_once(stopped):
    validated = [r["step"] for r in rows(stopped) if any(name.startswith("validation/") for name in r)]
    assert validated == [4, 8]


@pytest.mark.wide
def test_a_run_whose_curve_never_settles_goes_on_to_the_end(make, tmp_path, monkeypatch):
    plant(monkeypatch, [0.1] * 9)
    recipe = make(**{**STOPPING, "training": {**STOPPING["training"], "max_steps": 8, "stop_after": 0}})
    run = train(replace(recipe, output=str(tmp_path))).record
    assert (run.steps, run.fidelity.convergence, run.fidelity.steps) == (8, None, list(range(9)))


def test_how_fidelity_is_measured_decides_a_run_that_stops_by_it(make, stopped):
    other = replace(stopped.control, fidelity=replace(stopped.control.fidelity, every=2))
    with pytest.raises(UserError, match="another recipe, base or data"):
        train(resumed(replace(stopped, control=other)))


# --- what a batch holds ---------------------------------------------------------------------------------------------


def loop_of(recipe: Recipe) -> TrainingLoop:
    """The loop of a recipe before its first step."""
    if recipe.method == "controlnet":
        family, _, inputs = prepared(recipe)
    else:
        family = load_family(recipe.model.id)
        inputs = prepare_inputs(recipe, family, build_objective(recipe, family.process), make_accelerator(recipe))
    objective = build_objective(recipe, family.process)
    return TrainingLoop(recipe, family, objective, inputs, make_accelerator(recipe), "identity")


VIEWS = {"data": {"flip": True, "crops": 2}, "tuning": {"retention_ratio": 0.4}}


@pytest.fixture(scope="module")
def loop(make: Maker) -> TrainingLoop:
    return loop_of(make(**VIEWS))


def views_of(source: BatchSource, step: int, row: int, latents: Tensor, item: int) -> list[int]:
    """The views of a picture that a row's latents may have been drawn from: one, or several that are equal."""
    moments = source.targets.moments
    noise = source._noise(step, row, moments.mean.shape[2:])[0]
    drawn = [moments.draw(torch.tensor(item), torch.tensor(view), noise) for view in range(moments.views)]
    return [v for v, found in enumerate(drawn) if torch.equal(source.family.scale_latents(found), latents)]


def test_a_target_row_has_the_condition_of_its_own_view_and_a_bank_row_that_of_its_item(loop):
    source, control = loop.source, loop.inputs.control
    assert control.blank == []
    conditioner, names = control.conditioner, source.targets.names
    decoded = to_images(loop.family.decode(source.bank.latents[:]))
    views = set()
    for step in range(5):
        batch = source.rows(step).batch
        asked = batch.conditioning["control"]
        assert (asked.shape, asked.dtype) == ((5, 3, 16, 16), torch.uint8)
        for row, name in enumerate(batch.ids):
            if batch.is_retention[row]:
                item = int(name.removeprefix("bank item "))
                expected = torch.from_numpy(conditioner.condition(np.asarray(decoded[item])).copy()).permute(2, 0, 1)
            else:
                item = names.index(name)
                drawn = views_of(source, step, row, batch.latents[row], item)
                views.update(drawn if len(drawn) == 1 else [])
                expected = source.targets.conditions.row(item, drawn[0])
            assert torch.equal(asked[row], expected)
            assert expected.any()
    assert views == {0, 1, 2, 3}


def test_bank_rows_are_blank_when_the_recipe_says_so(make, loop):
    source = loop_of(make(**VIEWS, control={"bank_condition": "blank"})).source
    for step in range(3):
        batch, own = source.rows(step).batch, loop.source.rows(step).batch
        control = batch.conditioning["control"]
        assert not control[batch.is_retention].any()
        assert torch.equal(control[~batch.is_retention], own.conditioning["control"][~batch.is_retention])


@pytest.mark.sample("0.0-0-0")
@pytest.mark.parametrize(("dropout", "low", "high"), [(0.0, 0, 0), (0.5, 0.35, 0.65), (1.0, 1, 1)])
def test_target_rows_are_blank_at_the_rate_that_is_asked_for_and_nothing_else_changes(loop, dropout, low, high):
    source, blank, total = replace(loop.source, condition_dropout=dropout), 0, 0
    for step in range(40):
        batch, whole = source.rows(step).batch, loop.source.rows(step).batch
        asked, own = batch.conditioning["control"], whole.conditioning["control"]
        for row in range(len(batch)):
            if batch.is_retention[row] or asked[row].any():
                assert torch.equal(asked[row], own[row])
            else:
                blank += 1
        total += int((~batch.is_retention).sum())
        assert torch.equal(batch.latents, whole.latents)
        assert torch.equal(batch.conditioning["prompt_embeds"], whole.conditioning["prompt_embeds"])
    assert low <= blank / total <= high


def test_the_dropout_of_a_recipe_reaches_its_batches(make):
    recipe = make(control={"dropout": 1.0})
    batch = loop_of(recipe).source.rows(0).batch
    assert not batch.conditioning["control"][~batch.is_retention].any()
    assert batch.conditioning["control"][batch.is_retention].any()


def assert_same_but_control(found: TrainingRows, expected: TrainingRows) -> None:
    assert torch.equal(found.batch.latents, expected.batch.latents)
    assert torch.equal(found.batch.conditioning["prompt_embeds"], expected.batch.conditioning["prompt_embeds"])
    assert torch.equal(found.batch.is_retention, expected.batch.is_retention)
    assert torch.equal(found.noise, expected.noise)
    assert torch.equal(found.levels, expected.levels)
    assert (found.batch.ids, found.counts) == (expected.batch.ids, expected.counts)


def test_the_batches_of_a_lora_are_those_of_a_controlnet_without_its_conditions(make, loop):
    lora = loop_of(make(method="lora", **VIEWS)).source
    without = replace(loop.source, targets=replace(loop.source.targets, conditions=None))
    for step in (0, 1, 7):
        for source in (lora, without):
            found = source.rows(step)
            assert set(found.batch.conditioning) == {"prompt_embeds"}
            assert_same_but_control(found, loop.source.rows(step))


def test_processes_together_hold_the_conditions_of_one(loop):
    one = replace(loop.source, size=10, condition_dropout=0.3)
    for index in range(2):
        part = replace(one, size=5, process_index=index, num_processes=2).rows(3).batch
        assert torch.equal(part.conditioning["control"], one.rows(3).batch.conditioning["control"][index::2])


# --- other starts, other data, other precisions ---------------------------------------------------------------------


@pytest.mark.wide
@pytest.mark.parametrize("name", ["whole", "lora"])
def test_a_run_can_start_from_an_earlier_controlnet_and_starts_with_exactly_its_weights(make, finished, tmp_path, name):
    earlier = finished({})
    place = Path(earlier.output) / "controlnet"
    variant = {**VARIANTS[name], "control": {"init": str(place)}, "training": {"max_steps": 2}}
    recipe = replace(make(**variant), output=str(tmp_path))
    run = train(recipe).record
    assert run.fingerprints.controlnet == digest_of_tensors(weights(earlier))
    assert run.losses["target"].base.losses == pytest.approx(
        record(earlier)["losses"]["target"]["tuned"]["loss"], rel=1e-5
    )
    assert run.fidelity.figures["ssim"][0] == pytest.approx(curve_of(earlier)["figures"]["ssim"][-1], abs=1e-5)
    changed = differing(weights(recipe), weights(earlier))
    assert changed == {n for n in weights(earlier) if name == "whole" or trained_by_lora(n)}


MISFITS: dict[str, tuple[Any, str]] = {
    "cross_attention_dim": (32, "its cross_attention_dim is 32, the model's 16;"),
    "block_out_channels": ((8, 32), "its block_out_channels is [8, 32], the model's [8, 16];"),
    "layers_per_block": (2, "its layers_per_block is 2, the model's 1;"),
    "in_channels": (9, "its in_channels is 9, the model's 4;"),
    "conditioning_embedding_out_channels": (
        (16, 32, 96, 256),
        "it brings conditions down by 8, the autoencoder pictures by 2;",
    ),
}


@pytest.mark.sample("conditioning_embedding_out_channels")
@pytest.mark.parametrize("key", MISFITS)
def test_a_controlnet_for_another_model_is_refused_with_the_two_numbers_that_differ(family, make, tmp_path, key):
    value, expected = MISFITS[key]
    config = dict(family.new_controlnet(0).config) | {key: value}
    ControlNetModel.from_config(config).save_pretrained(tmp_path / "other")
    for load in (
        lambda: load_controlnet(family, str(tmp_path / "other")),
        lambda: train(replace(make(control={"init": str(tmp_path / "other")}), output=str(tmp_path / "run"))),
    ):
        with pytest.raises(UserError) as error:
            load()
        assert f"the ControlNet {tmp_path / 'other'} does not fit this model: {expected}" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_controlnet_of_bgr_pictures_says_so_in_its_spec(family, make, tmp_path):
    config = dict(family.new_controlnet(0).config) | {"controlnet_conditioning_channel_order": "bgr"}
    ControlNetModel.from_config(config).save_pretrained(tmp_path / "bgr")
    recipe = make(control={"init": str(tmp_path / "bgr"), "fidelity": {"every": 0}}, training={"max_steps": 1})
    train(replace(recipe, output=str(tmp_path / "run")))
    assert ControlSpec.load(tmp_path / "run" / "controlnet").channel_order == "bgr"


@pytest.mark.wide
def test_bfloat16_trains_float32_weights_beside_a_bfloat16_model(make, finished, tmp_path):
    recipe = replace(make(training={"mixed_precision": "bf16"}), output=str(tmp_path))
    run = train(recipe).record
    assert {w.dtype for w in weights(recipe).values()} == {torch.float32}
    assert run.dtype == "torch.bfloat16"
    assert run.frozen.denoiser_before == run.frozen.denoiser_after
    exact = record(finished({}))
    for role, losses in run.losses.items():
        for when in ("base", "tuned"):
            assert getattr(losses, when).losses == pytest.approx(exact["losses"][role][when]["loss"], rel=0.05)
    assert differing(weights(recipe), weights(finished({})))


def test_supplied_conditions_train_beside_a_bank_with_blank_ones(make, photos, tmp_path):
    folder = tmp_path / "conditions"
    folder.mkdir()
    for path in photos.glob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(folder / path.name)
    control = {"annotator": "supplied", "path": str(folder), "bank_condition": "blank", "resize": "box"}
    recipe = replace(make(control=control, data={"flip": True}), output=str(tmp_path / "run"))
    loop = loop_of(recipe)
    batch = loop.source.rows(0).batch
    assert batch.conditioning["control"][~batch.is_retention].flatten(1).any(1).all()
    assert not batch.conditioning["control"][batch.is_retention].any()
    run = train(recipe).record
    assert (run.status, run.fidelity.kind, run.fidelity.main) == ("complete", "edges", "f1")
    assert ControlSpec.load(tmp_path / "run" / "controlnet") == ControlSpec("supplied", resolution=16, resize="box")
    probe = loop.inputs.control.probe
    truth = [e.load() for e in loop.inputs.held_out.examples]
    canny = Conditioner(ControlSpec("canny", resolution=16))
    assert torch.equal(probe.asked, rows_of([canny.prepare(picture) for picture in truth]))
    assert not torch.equal(probe.asked, probe.control)


def test_supplied_conditions_of_a_validation_folder_belong_to_its_pictures(make, photos, tmp_path):
    held = write_photos(tmp_path / "held", 4, seed=9)
    control = {
        "annotator": "supplied",
        "path": str(photos),
        "validation_path": str(held),
        "bank_condition": "blank",
        "fidelity": {"every": 0},
    }
    recipe = make(control=control, data={"validation_path": str(held), "holdout": 0.0})
    _, conditioner, inputs = prepared(replace(recipe, training=replace(recipe.training, validation_size=4)))
    expected = rows_of([conditioner.prepare(e.load()) for e in load_images(str(held)).examples])
    assert torch.equal(inputs.validation["target"].batch.conditioning["control"], expected)


@pytest.mark.wide
def test_plain_training_needs_no_bank(make, tmp_path):
    recipe = make(**PLAIN, data={"cache": str(tmp_path / "cache")}, control={"fidelity": {"every": 0}})
    run = train(replace(recipe, output=str(tmp_path / "run"))).record
    assert (run.status, run.bank, set(run.losses)) == ("complete", None, {"target"})
    assert not (tmp_path / "cache" / "banks").exists()
    assert not any("bank_loss" in r for r in rows(replace(recipe, output=str(tmp_path / "run"))))


@pytest.mark.wide
def test_overfitting_four_pictures_lowers_the_loss_in_every_noise_band(make, photos, tmp_path):
    data = {"limit": 4, "validation_path": str(photos)}
    training = {"max_steps": 40, "batch_size": 16, "checkpoint_every": 100}
    recipe = make(**PLAIN, data=data, training=training, control={"fidelity": {"every": 0}})
    losses = train(replace(recipe, output=str(tmp_path))).record.losses["target"]
    assert all(tuned < base for tuned, base in zip(losses.tuned.losses, losses.base.losses))
