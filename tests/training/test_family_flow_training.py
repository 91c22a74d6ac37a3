"""The families of 2025 and 2026 through our trainer: what trains moves, the rest stays, what is saved reloads."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from difftuning_control.data.framing import Framing
from difftuning_control.data.sources import load_images
from difftuning_control.evaluation.drawing import sample_pictures
from difftuning_control.families.loading import load_base, load_family
from difftuning_control.recipe.requests import ExportRequest
from difftuning_control.recipe.studies import PilotConfig
from difftuning_control.recipe.training import ScheduleConfig
from difftuning_control.runs.finished import tuned_model
from difftuning_control.verbs.export.export import export
from difftuning_control.verbs.pilot.pilot import pilot
from difftuning_control.verbs.train import train
from support.drawing import generators
from support.family_runs import (
    assert_buckets_have_shapes_that_fit,
    assert_checkpointed_it_trains_to_the_weights_of,
    assert_every_factor_moves_and_nothing_else,
    assert_interrupted_it_ends_as,
    assert_measured_and_judged,
    recipe_maker,
)
from support.feature_models import save_tiny_dinov2
from support.flow_families import STOCK, need, recorded, shorten
from support.marks import needs_bitsandbytes
from support.pictures import write_pictures
from support.tensors import differing
from support.trainings import rows, run_record, trained_once
from support.tuned_pictures import PROMPTS, opened

SAMPLING = {"seed": 3, "steps": 2, "guidance_scale": 3.0}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch):
    shorten(monkeypatch)


@pytest.fixture(params=STOCK)
def name(request):
    need(request.param)
    return request.param


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow")
    write_pictures(folder / "pictures", 8, 64)
    return folder


def model_of(root: Path, name: str) -> Path:
    """The tiny model's directory, made on first use."""
    place = root / "models" / name
    if not place.exists():
        STOCK[name].make().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def make(root):
    return recipe_maker(root, lambda family: model_of(root, family), lambda family: STOCK[family].side)


@pytest.fixture(scope="module")
def finished(make):
    return trained_once(make)


def stock_pictures(pipe, name: str) -> torch.Tensor:
    """(3, 3, H, W) in [0, 1]: the differences that four steps make are smaller than 8 bits show."""
    return recorded(STOCK[name], pipe, 2, 3.0, PROMPTS)[1]


def tuned_pictures(recipe) -> torch.Tensor:
    with tuned_model(load_family(recipe.model.id), recipe.output, run_record(recipe)) as tuned:
        noise = generators(*range(len(PROMPTS)))
        latents = tuned.sample(PROMPTS, noise, steps=2, guidance_scale=3.0, resolution=recipe.data.resolution)
        return tuned.decode(latents) / 2 + 0.5


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.sample("z_image")
def test_a_lora_reloads_in_the_stock_pipeline_and_draws_the_same(finished, name):
    recipe = finished({"family": name})
    base = DiffusionPipeline.from_pretrained(recipe.model.id)
    before = stock_pictures(base, name)
    base.load_lora_weights(recipe.output)
    assert "pipe.load_lora_weights" in (Path(recipe.output) / "README.md").read_text()
    after = stock_pictures(base, name)
    assert_same(after, tuned_pictures(recipe))
    assert (after - before).abs().max() > 1e-3


@pytest.mark.wide
def test_full_weights_reload_in_the_stock_pipeline_and_draw_the_same(finished, name):
    recipe = finished({"family": name, "method": "full"})
    pipe, base = (DiffusionPipeline.from_pretrained(p) for p in (f"{recipe.output}/pipeline", recipe.model.id))
    assert type(pipe) is type(base)
    assert_same(stock_pictures(pipe, name), tuned_pictures(recipe))
    changed = {
        part: differing(module.state_dict(), getattr(base, part).state_dict())
        for part, module in pipe.components.items()
        if isinstance(module, torch.nn.Module)
    }
    trained = load_family(recipe.model.id)
    trained.freeze_unused()
    assert changed.pop("transformer") == {n for n, p in trained.denoiser.named_parameters() if p.requires_grad}
    assert not any(changed.values())


@pytest.mark.wide
def test_every_factor_of_a_lora_moves_and_nothing_else(make, name, tmp_path, monkeypatch):
    recipe = make("", name, tuning={"estimator": "weight"})
    assert_every_factor_moves_and_nothing_else(recipe, tmp_path, monkeypatch)


@pytest.mark.wide
def test_gradient_checkpointing_and_a_second_encoding_change_no_weight(make, finished, name, tmp_path):
    spared = make("", name, training={"gradient_checkpointing": True}, model={"offload": True})
    assert_checkpointed_it_trains_to_the_weights_of(spared, finished({"family": name}), tmp_path)


@pytest.mark.wide
@pytest.mark.parametrize("quantization", [None, "float8", pytest.param("nf4", marks=needs_bitsandbytes)])
def test_a_run_in_bf16_and_in_fewer_bits_is_one_whose_loss_is_near(make, finished, name, quantization, tmp_path):
    model = {} if quantization is None else {"quantization": quantization}
    recipe = replace(make("", name, model=model, training={"mixed_precision": "bf16"}), output=str(tmp_path))
    run = train(recipe).record
    found, expected = (rows(r)[0]["target_loss"] for r in (recipe, finished({"family": name})))
    assert found != expected
    assert abs(found / expected - 1) < (0.1 if quantization is None else 0.3)
    family = load_base(recipe)
    assert family.fingerprints == run.fingerprints.base
    before = sample_pictures(family, PROMPTS, **SAMPLING, resolution=recipe.data.resolution)
    with tuned_model(family, recipe.output, run) as tuned:
        after = sample_pictures(tuned, PROMPTS, **SAMPLING, resolution=recipe.data.resolution)
    assert [a.tobytes() for a in before] != [a.tobytes() for a in after]


# --- resuming, judging, exporting -----------------------------------------------------------------------------------


@pytest.mark.wide
def test_an_interrupted_run_ends_bit_by_bit_as_an_undisturbed_one(make, finished, name, tmp_path):
    assert_interrupted_it_ends_as(make("", name), finished({"family": name}), tmp_path)


@pytest.mark.wide
def test_a_schedule_is_measured_and_a_run_judged(make, name, root, tmp_path):
    assert_measured_and_judged(make, name, root, tmp_path)


@pytest.mark.wide
def test_a_pilot_compares_plain_and_diff_tuning(make, name, root, tmp_path):
    features = str(save_tiny_dinov2(root / "features" / name))
    held_out = write_pictures(tmp_path / "held", 12, 64, seed=9)
    recipe = make("", name, training={"max_steps": 2})
    data = replace(recipe.data, holdout=0.0, validation_path=str(held_out))
    recipe = replace(recipe, data=data, output=str(tmp_path / "pilot"))
    config = PilotConfig(
        ["plain", "difftuning_tau1"],
        seeds=[0, 1],
        learning_rates=[1e-2],
        pictures=6,
        steps=2,
        guidance_scale=2.0,
        features=features,
    )
    result = pilot(recipe, config, "en", False, tell=lambda text: None)
    assert [side["name"] for side in result.sides] == config.sides
    figures = [[row["kid"] for row in side["runs"]] for side in result.sides]
    assert [len(kids) for kids in figures] == [2, 2]
    assert np.isfinite(figures).all()
    assert figures[0] != figures[1]


@pytest.mark.sample("z_image-separate")
@pytest.mark.parametrize("adapter", ["separate", "fused"])
def test_an_exported_lora_draws_the_same_by_the_lines_of_its_card(finished, name, adapter, tmp_path):
    recipe = finished({"family": name})
    folder = export(ExportRequest(recipe.output, str(tmp_path / "export"), pipeline="stock", adapter=adapter))
    assert_same(stock_pictures(opened(folder), name), tuned_pictures(recipe))


@pytest.mark.wide
def test_buckets_have_shapes_that_the_transformer_takes(make, name, tmp_path):
    assert_buckets_have_shapes_that_fit(make, name, STOCK[name].side, tmp_path)


# --- what it is for -------------------------------------------------------------------------------------------------


def flow_loss(family, transformer, latents: torch.Tensor, captions: list[str]) -> float:
    """Of a pipeline's own transformer, at fixed noise and levels."""
    conditioning, generator, losses = family.encode_prompts(captions), torch.Generator().manual_seed(11), []
    for level in (100, 300, 500, 700, 900):
        noise, levels = torch.randn(latents.shape, generator=generator), torch.full((len(latents),), level)
        sigma = family.process.sigmas[level]
        noisy = (1 - sigma) * latents + sigma * noise
        out = family.predict(transformer, noisy, family.process.timesteps[levels], conditioning)
        losses.append((out - (noise - latents)).square().mean())
    return float(torch.stack(losses).mean())


@pytest.mark.wide
def test_training_lowers_the_loss_of_what_the_stock_pipeline_calls(make, name, tmp_path):
    training = {"max_steps": 40, "learning_rate": 2e-3, "lr_scheduler": "constant", "checkpoint_every": 100}
    plain = {"retention_ratio": 0.0, "retention_weight": 0.0, "schedule": ScheduleConfig("constant")}
    recipe = make("", name, "full", training=training, tuning=plain)
    recipe = replace(recipe, data=replace(recipe.data, holdout=0.0), output=str(tmp_path))
    train(recipe)
    base, tuned = (DiffusionPipeline.from_pretrained(p) for p in (recipe.model.id, f"{recipe.output}/pipeline"))
    family, examples = load_family(recipe.model.id), load_images(recipe.data.path).examples
    with torch.no_grad():
        pixels = torch.cat([Framing(recipe.data.resolution).pixels(e) for e in examples])
        latents, captions = family.scale_latents(family.encode_moments(pixels)[0]), [e.caption for e in examples]
        before, after = (flow_loss(family, p.transformer, latents, captions) for p in (base, tuned))
    assert after < 0.95 * before
