"""The recipes of `examples/` for real sizes, each run by the command line on a tiny model and reloaded in diffusers."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from diffusers import DiffusionPipeline
from test_cli import flags
from test_control import write_photos
from tiny_models import tiny_flux, tiny_sd3, tiny_sdxl

from difftuning_control.cli import main
from difftuning_control.control import Conditioner, ControlSpec
from difftuning_control.data import load_images

EXAMPLES = Path(__file__).parent.parent / "examples"
MODELS = {"sd15": tiny_pipeline, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    for name, make in MODELS.items():
        make().save_pretrained(folder / name)
        if name == "sdxl":  # its recipe takes the smaller files
            make().save_pretrained(folder / name, variant="fp16")
    write_photos(folder / "photos", 12)
    return folder


@pytest.fixture(params=MODELS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def run(recipe: str, family: str, root: Path, output: Path, **more: object) -> dict:
    """Train by a recipe for two steps, only as much of it changed as a tiny model and a short test ask for."""
    values = {
        "model.id": root / family, "data.path": root / "photos", "data.cache": root / "cache", "data.resolution": 16,
        "data.holdout": 0.25, "bank.size": 6, "bank.steps": 2, "training.max_steps": 2, "training.validate_every": 0,
        "training.validation_size": 2, "training.sample_every": 2, "training.sample_steps": 2, "output": output, **more,
    }  # fmt: skip
    main(["train", "--config", str(EXAMPLES / recipe), *flags(values)])
    return json.loads((output / "run.json").read_text())


def draw(pipe, **more) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    settings = {"height": 16, "width": 16, "num_inference_steps": 2, "generator": generator, "output_type": "np"}
    return pipe("red 1", **settings, **more).images


def test_the_recipe_of_a_lora_ends_in_one_that_stock_diffusers_loads(family, root, tmp_path):
    record = run(f"{family}_lora.yaml", family, root, tmp_path)
    assert record["status"] == "complete"
    assert (tmp_path / "samples" / "step-000002.png").exists()
    pipe = DiffusionPipeline.from_pretrained(root / family)
    before = draw(pipe)
    pipe.load_lora_weights(tmp_path)
    layers = [m for m in pipe.components[record_component(pipe)].modules() if hasattr(m, "lora_B")]
    assert layers
    after = draw(pipe)
    assert np.isfinite(after).all()
    assert after.shape == before.shape == (1, 16, 16, 3)
    for layer in layers:  # what a run of two steps learns is little; it is there
        for factor in layer.lora_B.values():
            factor.weight.data *= 1e3
    assert np.abs(draw(pipe) - before).max() > 1e-3


def record_component(pipe) -> str:
    return "unet" if hasattr(pipe, "unet") else "transformer"


def test_the_recipe_of_a_controlnet_ends_in_one_that_stock_diffusers_loads(family, root, tmp_path):
    fidelity = {"control.fidelity.every": 2, "control.fidelity.size": 2, "control.fidelity.steps": 2}
    plain = {"training.stop_when": "null", "training.stop_after": 0} if family == "sd15" else {}
    small = {"adapter.rank": 4} if family in ("sdxl", "sd3") else {}  # theirs is larger than a tiny layer
    record = run(f"{family}_controlnet.yaml", family, root, tmp_path, **fidelity, **plain, **small)
    assert record["status"] == "complete"
    assert record["frozen"]["denoiser_before"] == record["frozen"]["denoiser_after"]
    assert record["fidelity"]["steps"] == [0, 2]
    controlnet_class, pipeline_class = (getattr(diffusers, n) for n in record["control"]["classes"])
    controlnet = controlnet_class.from_pretrained(tmp_path / "controlnet")
    pipe = pipeline_class.from_pretrained(root / family, controlnet=controlnet)
    conditioner = Conditioner(ControlSpec.load(tmp_path / "controlnet"))
    photo = load_images(str(root / "photos")).examples[0].load()
    picture = draw(pipe, **{record["control"]["argument"]: conditioner.prepare(photo)})
    assert picture.shape == (1, 16, 16, 3)
    assert np.isfinite(picture).all()


def test_every_recipe_says_what_its_memory_goes_to():
    recipes = [EXAMPLES / f"{family}_{method}.yaml" for family in MODELS for method in ("lora", "controlnet")]
    for path in recipes:
        words = path.read_text()
        assert all(word in words for word in ("Memory at", "GB", "activations", "24 GB")) or "sd15_lora" in path.name
