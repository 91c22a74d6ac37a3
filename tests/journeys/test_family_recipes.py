"""The recipes of `examples/` for real sizes, each run by the command line on a tiny model and reloaded in diffusers."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from difftuning_control import load_adapter
from difftuning_control.cli import main
from difftuning_control.data.control_spec import Conditioner, ControlSpec
from difftuning_control.data.sources import load_images
from difftuning_control.families.sana import Sana
from support.command_line import flags
from support.controls import write_photos
from support.marks import needs_bitsandbytes
from support.tiny_models import tiny_flux, tiny_lumina2, tiny_pixart, tiny_sana, tiny_sd3, tiny_sdxl
from support.tiny_sd import tiny_pipeline

EXAMPLES = Path(__file__).parents[2] / "examples"
CONTROLLED = {"sd15": tiny_pipeline, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux, "sana": tiny_sana}
MODELS = CONTROLLED | {"pixart": tiny_pixart, "lumina2": tiny_lumina2}
VARIANTS = {"sdxl": "fp16", "sana": "bf16"}  # the smaller files, which their recipes take
SIDES = {"sana": 32, "lumina2": 64}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    for name, make in MODELS.items():
        make().save_pretrained(folder / name)
        if name in VARIANTS:
            make().save_pretrained(folder / name, variant=VARIANTS[name])
    write_photos(folder / "photos", 12)
    return folder


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch):
    """No instruction before the prompts of Sana, which saves time."""
    monkeypatch.setattr(Sana, "instructions", {"complex_human_instruction": None})


def run(recipe: str, family: str, root: Path, output: Path, **more: object) -> dict:
    """Train by a recipe for two steps, only as much of it changed as a tiny model and a short test ask for."""
    values = {
        "model.id": root / family,
        "data.path": root / "photos",
        "data.cache": root / "cache",
        "data.resolution": SIDES.get(family, 16),
        "data.holdout": 0.25,
        "bank.size": 6,
        "bank.steps": 2,
        "training.max_steps": 2,
        "training.validate_every": 0,
        "training.validation_size": 2,
        "training.sample_every": 2,
        "training.sample_steps": 2,
        "output": output,
        **more,
    }
    main(["train", "--config", str(EXAMPLES / recipe), *flags(values)])
    return json.loads((output / "run.json").read_text())


def draw(pipe, side: int = 16, **more) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 2, "generator": generator, "output_type": "np", **more}
    if type(pipe).__name__.startswith(("PixArt", "Sana")):
        settings["use_resolution_binning"] = False
    return pipe("red 1", height=side, width=side, **settings).images


@pytest.mark.sample("pixart")
@pytest.mark.parametrize("name", [*MODELS, pytest.param("flux_nf4", marks=needs_bitsandbytes)])
def test_the_recipe_of_a_lora_ends_in_one_that_stock_diffusers_loads(name, root, tmp_path):
    family = name.removesuffix("_nf4")
    small = {"adapter.rank": 4} if family in ("sana", "lumina2") else {}  # theirs is larger than a tiny layer
    record = run(f"{name}_lora.yaml", family, root, tmp_path, **small)
    assert record["status"] == "complete"
    assert (tmp_path / "samples" / "step-000002.png").exists()
    pipe, side = DiffusionPipeline.from_pretrained(root / family), SIDES.get(family, 16)
    before = draw(pipe, side)
    if family == "pixart":  # diffusers has no loader for it
        load_adapter(pipe, tmp_path)
    else:
        pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    layers = [m for m in pipe.components[record_component(pipe)].modules() if hasattr(m, "lora_B")]
    assert layers
    after = draw(pipe, side)
    assert np.isfinite(after).all()
    assert after.shape == before.shape == (1, side, side, 3)
    for layer in layers:  # what a run of two steps learns is little; it is there
        for factor in layer.lora_B.values():
            factor.weight.data *= 1e3
    assert np.abs(draw(pipe, side) - before).max() > 1e-3


def record_component(pipe) -> str:
    return "unet" if hasattr(pipe, "unet") else "transformer"


@pytest.mark.wide
@pytest.mark.parametrize("family", CONTROLLED)
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
    side = SIDES.get(family, 16)
    picture = draw(pipe, side, **{record["control"]["argument"]: conditioner.prepare(photo)})
    assert picture.shape == (1, side, side, 3)
    assert np.isfinite(picture).all()


def test_every_recipe_says_what_its_memory_goes_to():
    recipes = [f"{name}_lora" for name in (*MODELS, "flux_nf4")] + [f"{name}_controlnet" for name in CONTROLLED]
    for name in recipes:
        words = (EXAMPLES / f"{name}.yaml").read_text()
        card = "16 GB" if name == "flux_nf4_lora" else "24 GB"
        assert all(word in words for word in ("Memory at", "GB", "activations", card)) or name == "sd15_lora"
