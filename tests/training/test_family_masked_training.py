"""PixArt, Sana and Lumina2 through our trainer: what trains moves, what does not stays, and what is saved reloads."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from safetensors.torch import load_file

from difftuning_control import load_adapter
from difftuning_control.data.framing import Framing
from difftuning_control.data.sources import load_images
from difftuning_control.evaluation.drawing import sample_pictures
from difftuning_control.families.loading import load_family
from difftuning_control.families.lumina2 import Lumina2
from difftuning_control.families.masked import MaskedTransformer
from difftuning_control.families.sana import Sana
from difftuning_control.recipe.requests import ExportRequest
from difftuning_control.recipe.training import ScheduleConfig
from difftuning_control.runs.finished import tuned_model
from difftuning_control.verbs.export.export import export
from difftuning_control.verbs.train import train
from support.drawing import SIDES, exact
from support.family_runs import (
    assert_buckets_have_shapes_that_fit,
    assert_checkpointed_it_trains_to_the_weights_of,
    assert_every_factor_moves_and_nothing_else,
    assert_interrupted_it_ends_as,
    assert_measured_and_judged,
    recipe_maker,
)
from support.pictures import write_pictures
from support.tensors import differing
from support.tiny_models import tiny_lumina2, tiny_pixart, tiny_sana
from support.trainings import rows, run_record, trained_once
from support.tuned_pictures import PROMPTS, assert_same_pictures, generators, opened

MODELS = {"pixart": tiny_pixart, "sana": tiny_sana, "lumina2": tiny_lumina2}
SAMPLING = {"seed": 3, "steps": 2, "guidance_scale": 3.0}


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch):
    """Fewer tokens of padding, which saves time."""
    monkeypatch.setattr(MaskedTransformer, "text_length", 24)
    monkeypatch.setattr(Lumina2, "text_length", 256)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    write_pictures(folder / "pictures", 8, 64)
    for name, make in MODELS.items():
        make().save_pretrained(folder / "models" / name)
    return folder


@pytest.fixture(scope="module")
def make(root):
    return recipe_maker(root, lambda family: root / "models" / family, SIDES.__getitem__)


@pytest.fixture(scope="module")
def finished(make):
    return trained_once(make)


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def stock_pictures(pipe, family: str):
    size = {"height": SIDES[family], "width": SIDES[family], "max_sequence_length": 256 if family == "lumina2" else 24}
    return pipe(
        PROMPTS, num_inference_steps=2, guidance_scale=3.0, generator=generators(), **size, **exact(pipe)
    ).images


def tuned_pictures(recipe):
    with tuned_model(load_family(recipe.model.id), recipe.output, run_record(recipe)) as tuned:
        return sample_pictures(tuned, PROMPTS, **SAMPLING, resolution=recipe.data.resolution)


@pytest.mark.wide
def test_a_lora_reloads_in_the_stock_pipeline_and_draws_the_same(finished, name):
    recipe = finished({"family": name})
    base = DiffusionPipeline.from_pretrained(recipe.model.id)
    before = stock_pictures(base, name)
    card = (Path(recipe.output) / "README.md").read_text()
    if name == "pixart":
        load_adapter(base, recipe.output)
        assert "load_adapter(pipe" in card
        assert "load_lora_weights" not in card
    else:
        base.load_lora_weights(recipe.output, weight_name="pytorch_lora_weights.safetensors")
        assert "pipe.load_lora_weights" in card
    after = stock_pictures(base, name)
    assert_same_pictures(after, tuned_pictures(recipe))
    assert any(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() > 3 for a, b in zip(before, after))


@pytest.mark.wide
def test_full_weights_reload_in_the_stock_pipeline_and_draw_the_same(finished, name):
    recipe = finished({"family": name, "method": "full"})
    pipe, base = (DiffusionPipeline.from_pretrained(p) for p in (f"{recipe.output}/pipeline", recipe.model.id))
    assert type(pipe) is type(base)
    assert_same_pictures(stock_pictures(pipe, name), tuned_pictures(recipe))
    changed = {
        part: differing(module.state_dict(), getattr(base, part).state_dict())
        for part, module in pipe.components.items()
        if isinstance(module, torch.nn.Module)
    }
    assert changed.pop("transformer") == {n for n, _ in base.transformer.named_parameters()}
    assert not any(changed.values())


@pytest.mark.sample("pixart")
def test_every_factor_of_a_lora_moves_and_nothing_else(make, name, tmp_path, monkeypatch):
    recipe = make("", name, tuning={"estimator": "weight"})
    assert_every_factor_moves_and_nothing_else(recipe, tmp_path, monkeypatch)


@pytest.mark.wide
def test_gradient_checkpointing_and_a_second_encoding_change_no_weight(make, finished, name, tmp_path):
    spared = make("", name, training={"gradient_checkpointing": True}, model={"offload": True})
    assert_checkpointed_it_trains_to_the_weights_of(spared, finished({"family": name}), tmp_path)


@pytest.mark.wide
def test_a_run_in_bf16_is_one_whose_loss_is_near(make, finished, name, tmp_path):
    recipe = replace(make("", name, training={"mixed_precision": "bf16"}), output=str(tmp_path))
    train(recipe)
    found, expected = (rows(r)[0]["target_loss"] for r in (recipe, finished({"family": name})))
    assert found != expected
    assert abs(found / expected - 1) < 0.1


def test_the_variance_of_pixart_trains_where_that_is_asked_for(finished):
    fixed, hybrid = (
        load_file(f"{finished({'family': 'pixart', 'method': 'full', **more}).output}/pipeline/transformer/{FILE}")
        for more in ({}, {"tuning": {"variance": "hybrid"}})
    )
    rows = torch.arange(2 * 2 * 8) % 8 >= 4  # of v, in the last layer
    start = tiny_pixart().transformer.state_dict()["proj_out.weight"]
    assert torch.equal(fixed["proj_out.weight"][rows], start[rows])
    assert not torch.equal(hybrid["proj_out.weight"][rows], start[rows])


FILE = "diffusion_pytorch_model.safetensors"


# --- resuming, judging, exporting -----------------------------------------------------------------------------------


@pytest.mark.wide
def test_an_interrupted_run_ends_bit_by_bit_as_an_undisturbed_one(make, finished, name, tmp_path):
    assert_interrupted_it_ends_as(make("", name), finished({"family": name}), tmp_path)


@pytest.mark.wide
def test_a_schedule_is_measured_and_a_run_judged(make, name, root, tmp_path, monkeypatch):
    monkeypatch.setattr(Sana, "instructions", {"complex_human_instruction": None})  # which saves time
    assert_measured_and_judged(make, name, root, tmp_path)


@pytest.mark.sample("pixart-fused")
@pytest.mark.parametrize("adapter", ["separate", "fused"])
def test_an_exported_lora_draws_the_same_by_the_lines_of_its_card(finished, name, adapter, tmp_path):
    recipe = finished({"family": name})
    folder = export(ExportRequest(recipe.output, str(tmp_path / "export"), pipeline="stock", adapter=adapter))
    assert_same_pictures(stock_pictures(opened(folder), name), tuned_pictures(recipe))


@pytest.mark.sample("pixart")
def test_buckets_have_shapes_that_the_transformer_takes(make, name, tmp_path):
    assert_buckets_have_shapes_that_fit(make, name, SIDES[name], tmp_path)


# --- what it is for -------------------------------------------------------------------------------------------------


def stock_loss(pipe, family: str, latents: torch.Tensor, captions: list[str]) -> float:
    """ε of PixArt, the flow of the others, at fixed noise and levels, with a pipeline's own modules."""
    generator, found = torch.Generator().manual_seed(11), []
    more = {"complex_human_instruction": None} if family == "sana" else {}
    length = 256 if family == "lumina2" else 24
    embeds, mask, _, _ = pipe.encode_prompt(captions, False, device="cpu", max_sequence_length=length, **more)
    told = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
    for level in (0.1, 0.3, 0.5, 0.7, 0.9):
        noise = torch.randn(latents.shape, generator=generator)
        if family == "pixart":
            timesteps = torch.full((len(latents),), int(1000 * level))
            noisy = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(latents, noise, timesteps)
            size = {"resolution": None, "aspect_ratio": None}
            out = pipe.transformer(noisy, timestep=timesteps, added_cond_kwargs=size, **told).sample
            found.append((out.chunk(2, 1)[0] - noise).square().mean())
            continue
        shift = 3.0 if family == "sana" else 6.0
        sigma = shift * level / (1 + (shift - 1) * level)
        noisy = (1 - sigma) * latents + sigma * noise
        time, sign = (1000 * sigma, 1) if family == "sana" else (1 - sigma, -1)
        out = pipe.transformer(noisy, timestep=torch.full((len(latents),), time), **told, return_dict=False)[0]
        found.append((sign * out - (noise - latents)).square().mean())
    return float(torch.stack(found).mean())


@pytest.mark.wide
def test_a_model_trained_here_lowers_the_loss_of_the_stock_formulas(make, name, tmp_path, monkeypatch):
    monkeypatch.setattr(Sana, "instructions", {"complex_human_instruction": None})
    training = {"max_steps": 40, "learning_rate": 1e-2, "lr_scheduler": "constant", "checkpoint_every": 100}
    plain = {"retention_ratio": 0.0, "retention_weight": 0.0, "schedule": ScheduleConfig("constant")}
    recipe = make("", name, "full", training=training, tuning=plain)
    recipe = replace(recipe, data=replace(recipe.data, holdout=0.0), output=str(tmp_path))
    train(recipe)
    base, tuned = (DiffusionPipeline.from_pretrained(p) for p in (recipe.model.id, f"{recipe.output}/pipeline"))
    family, examples = load_family(recipe.model.id), load_images(recipe.data.path).examples
    with torch.no_grad():
        pixels = torch.cat([Framing(recipe.data.resolution).pixels(e) for e in examples])
        latents, captions = family.scale_latents(family.encode_moments(pixels)[0]), [e.caption for e in examples]
        before, after = (stock_loss(p, name, latents, captions) for p in (base, tuned))
    assert after < 0.95 * before
