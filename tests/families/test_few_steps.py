"""Models that were distilled to few steps: known by their configurations, drawn in their steps everywhere."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from difftuning_control.families.few_steps import FewSteps
from difftuning_control.families.fitting import fitted
from difftuning_control.families.loading import family_of, few_steps_of, load_family
from difftuning_control.families.sd import TOLD_GUIDANCE
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.requests import SampleRequest
from difftuning_control.recipe.studies import AnalysisConfig, Evaluation, PilotConfig
from difftuning_control.system.durable import write_json
from difftuning_control.verbs.sample import sample_to_folder
from difftuning_control.verbs.train import train
from support.marks import need_pipeline
from support.tiny_sd import tiny_pipeline

ANCESTRAL = {"_class_name": "EulerAncestralDiscreteScheduler", "prediction_type": "epsilon"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": False}


def model_of(
    folder: Path, pipeline: str, scheduler: dict | None = None, denoiser: dict | None = None, **index: object
) -> str:
    """A model of which only the configurations are there."""
    write_json(folder / "model_index.json", {"_class_name": pipeline, **index})
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler or {})
    write_json(folder / ("unet" if "Diffusion" in pipeline else "transformer") / "config.json", denoiser or {})
    return str(folder)


@pytest.mark.parametrize(
    ("pipeline", "configs", "steps"),
    [
        ("StableDiffusionPipeline", {"scheduler": {"_class_name": "LCMScheduler"}}, 4),
        ("PixArtAlphaPipeline", {"scheduler": {"_class_name": "LCMScheduler"}}, 4),
        ("StableDiffusionXLPipeline", {"scheduler": {"_class_name": "TCDScheduler"}}, 4),
        ("StableDiffusionXLPipeline", {"scheduler": ANCESTRAL | {"timestep_spacing": "trailing"}}, 4),
        ("StableDiffusionXLPipeline", {"scheduler": ANCESTRAL | {"timestep_spacing": "leading"}}, None),
        (
            "StableDiffusionXLPipeline",
            {"scheduler": ANCESTRAL | {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}},
            None,
        ),
        ("StableDiffusionPipeline", {"scheduler": {"_class_name": "DDIMScheduler"}}, None),
        ("FluxPipeline", {"scheduler": FLOW, "denoiser": {"guidance_embeds": False}}, 4),
        ("FluxPipeline", {"scheduler": FLOW, "denoiser": {"guidance_embeds": True}}, None),
        (
            "FluxPipeline",
            {"scheduler": FLOW | {"use_dynamic_shifting": True}, "denoiser": {"guidance_embeds": False}},
            None,
        ),
        ("ZImagePipeline", {"scheduler": FLOW | {"shift": 3.0}}, 8),
        ("ZImagePipeline", {"scheduler": FLOW | {"shift": 6.0}}, None),
        ("Flux2KleinPipeline", {"is_distilled": True}, 4),
        ("Flux2KleinPipeline", {"is_distilled": False}, None),
        ("Krea2Pipeline", {"is_distilled": True}, 8),
        ("Krea2Pipeline", {"is_distilled": False}, None),
    ],
)
def test_a_distilled_model_is_known_by_its_configurations(tmp_path, pipeline, configs, steps):
    need_pipeline(pipeline)
    found = few_steps_of(model_of(tmp_path / "mine", pipeline, **configs))
    assert (found and found.drawn) == (steps and (steps, 1.0))


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("stable-diffusion-3.5-large-turbo", 4),
        ("SDXL-Lightning_8step", 8),
        ("Hyper-SD-1-step", 1),
        ("TurboVision", None),
        ("turbo/mine", None),
    ],
)
def test_a_distilled_model_is_known_by_the_last_part_of_its_name(tmp_path, name, steps):
    found = few_steps_of(model_of(tmp_path / name, "StableDiffusion3Pipeline", FLOW))
    assert (found and found.steps) == steps


def recipe_of(model: str, **sections: dict) -> Recipe:
    return Recipe.from_dict({"data": {"path": "pics"}, "model": {"id": model}, **sections})


def test_what_draws_with_a_distilled_model_fits_it_and_is_said(tmp_path):
    model, said = model_of(tmp_path / "mine", "StableDiffusionPipeline", {"_class_name": "LCMScheduler"}), []
    recipe = fitted(recipe_of(model, gates={"kid": 0.1}), said.append)
    assert (recipe.bank.steps, recipe.bank.guidance_scale) == (4, 1.0)
    assert (recipe.training.sample_steps, recipe.training.sample_guidance_scale) == (4, 1.0)
    assert (recipe.gates.steps, recipe.gates.guidance_scale) == (4, 1.0)
    assert recipe.left_open == ()
    assert len(said) == 2
    assert "4 steps without guidance (by its scheduler, LCMScheduler)" in said[1]
    assert "bank.steps 4, bank.guidance_scale 1, training.sample_steps 4" in said[1]
    assert "control" not in said[1]
    controlled = fitted(recipe_of(model, method="controlnet"))
    assert (controlled.control.fidelity.steps, controlled.control.fidelity.guidance_scale) == (4, 1.0)
    assert controlled.gates == Recipe().gates


def test_what_is_named_stays_and_what_does_not_suit_is_said(tmp_path):
    model, said = model_of(tmp_path / "mine", "StableDiffusionPipeline", {"_class_name": "LCMScheduler"}), []
    named = {"sample_steps": 8, "sample_guidance_scale": 1.5}
    recipe = fitted(recipe_of(model, bank={"steps": 15, "solver": "dpmsolver++"}, training=named), said.append)
    assert (recipe.bank.steps, recipe.bank.guidance_scale) == (15, 1.0)
    assert (recipe.training.sample_steps, recipe.training.sample_guidance_scale) == (8, 1.5)
    assert "bank.steps is 15, training.sample_guidance_scale is 1.5, bank.solver is dpmsolver++;" in said[2]
    assert "sample_steps" not in said[2]


def test_a_model_of_many_steps_keeps_the_defaults(tmp_path):
    model = model_of(tmp_path / "mine", "StableDiffusionPipeline", {"_class_name": "DDIMScheduler"})
    recipe, said = recipe_of(model), []
    done = fitted(recipe, said.append)
    assert done.bank == recipe.bank
    assert done.training.sample_steps == recipe.training.sample_steps == 20
    assert len(said) == 1


@pytest.mark.parametrize(
    ("settings", "usual"),
    [
        (SampleRequest(["a"], model=None), (25, 4.0)),
        (Evaluation(["run"]), (20, 4.0)),
        (PilotConfig(), (15, 4.0)),
        (AnalysisConfig(), (15, 4.0)),
    ],
)
def test_what_a_verb_leaves_out_suits_the_model(settings, usual):
    assert settings.for_model(None).drawn == usual
    assert settings.for_model((4, 1.0)).drawn == (4, 1.0)
    assert replace(settings, steps=9, guidance_scale=2.0).for_model((4, 1.0)).drawn == (9, 2.0)
    changed = settings.for_model(None)
    assert asdict(changed) == asdict(settings) | {"steps": usual[0], "guidance_scale": usual[1]}


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the scheduler of latent consistency models."""
    pipe, folder = tiny_pipeline(), tmp_path_factory.mktemp("model") / "tiny"
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(folder)
    return folder


def test_a_run_draws_bank_samples_and_pictures_in_the_models_steps(turbo, pictures, tmp_path):
    recipe = Recipe.from_dict(
        {
            "model": {"id": str(turbo)},
            "data": {"path": str(pictures), "resolution": 16, "cache": str(tmp_path / "cache")},
            "bank": {"size": 3, "path": str(tmp_path / "bank")},
            "training": {"max_steps": 1, "batch_size": 5, "sample_every": 1, "validation_size": 1},
            "output": str(tmp_path / "run"),
        }
    )
    said: list[str] = []
    train(recipe, tell=said.append)
    bank = json.loads((tmp_path / "bank" / "manifest.json").read_text())["identity"]
    assert (bank["steps"], bank["guidance_scale"], bank["scheduler"]["class"]) == (4, 1.0, "LCMScheduler")
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert written["bank"] | {"steps": 4, "guidance_scale": 1.0} == written["bank"]
    assert (written["training"]["sample_steps"], written["training"]["sample_guidance_scale"]) == (4, 1.0)
    assert any("draws in 4 steps without guidance" in line for line in said)
    assert "num_inference_steps=4, guidance_scale=1.0).images[0]" in (tmp_path / "run" / "README.md").read_text()
    sample_to_folder(SampleRequest(["red"], str(tmp_path / "run"), output=str(tmp_path / "drawn")))
    drawn = json.loads((tmp_path / "drawn" / "samples.json").read_text())
    assert (drawn["steps"], drawn["guidance_scale"]) == (4, 1.0)


def test_a_loaded_model_knows_what_its_folder_says(turbo, model_dir):
    assert (
        load_family(str(turbo)).few_steps == few_steps_of(str(turbo)) == FewSteps(4, 1.0, "its scheduler, LCMScheduler")
    )
    assert load_family(str(model_dir)).few_steps is few_steps_of(str(model_dir)) is None


def test_a_unet_that_is_told_its_guidance_is_told_it_in_training_as_in_sampling():
    pipe = tiny_pipeline()
    torch.manual_seed(1)
    config = {key: value for key, value in pipe.unet.config.items() if not key.startswith("_")}
    unet = UNet2DConditionModel.from_config(config | {"time_cond_proj_dim": 16})
    pipe = StableDiffusionPipeline(**pipe.components | {"unet": unet}, requires_safety_checker=False)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    family, calls = family_of(pipe), []
    assert family.few_steps is not None
    assert family.few_steps.drawn == (4, TOLD_GUIDANCE)
    unet.register_forward_hook(lambda module, args, out: calls.append((args, out)))
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    family.sample(["red", "blue"], generators, steps=4, guidance_scale=TOLD_GUIDANCE, resolution=16)
    conditioning = family.encode_prompts(["red", "blue"])
    assert len(calls) == 4
    for (noisy_model_input, timestep), out in list(calls):
        with torch.no_grad():
            found = family.predict(unet, noisy_model_input, timestep.expand(2), conditioning)
        torch.testing.assert_close(found, out[0], atol=1e-5, rtol=1e-5)
        untold = unet(noisy_model_input, timestep, conditioning["prompt_embeds"]).sample
        assert not torch.allclose(found, untold, atol=1e-4)
