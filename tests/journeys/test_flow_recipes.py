"""The recipes of `examples/` for the families of 2025 and 2026, run on tiny models and reloaded in diffusers."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from difftuning_control.cli import main
from difftuning_control.data.control_spec import Conditioner, ControlSpec
from difftuning_control.data.sources import load_images
from support.command_line import flags
from support.controls import write_photos
from support.flow_families import STOCK, need
from support.marks import needs_bitsandbytes

EXAMPLES = Path(__file__).parents[2] / "examples"
CONTROLLED = ("z_image", "qwen_image")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow recipes")
    write_photos(folder / "photos", 12)
    return folder


def run(recipe: str, family: str, root: Path, output: Path, **more: object) -> dict:
    """Train by a recipe for two steps, only as much of it changed as a tiny model and a short test ask for."""
    if not (root / family).exists():
        STOCK[family].make().save_pretrained(root / family)
    values = {
        "model.id": root / family,
        "data.path": root / "photos",
        "data.cache": root / "cache",
        "data.resolution": STOCK[family].side,
        "data.holdout": 0.25,
        "bank.size": 6,
        "bank.steps": 2,
        "adapter.rank": 4,  # theirs is larger than a tiny layer
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


def draw(pipe, side: int, **more) -> np.ndarray:
    settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np", **more}
    return pipe(prompt="red 1", height=side, width=side, **settings).images


@needs_bitsandbytes
@pytest.mark.wide
@pytest.mark.parametrize("family", STOCK)
def test_the_recipe_of_a_lora_ends_in_one_that_stock_diffusers_loads(family, root, tmp_path):
    need(family)
    record = run(f"{family}_lora.yaml", family, root, tmp_path)
    assert record["status"] == "complete"
    assert (tmp_path / "samples" / "step-000002.png").exists()
    pipe, side = DiffusionPipeline.from_pretrained(root / family), STOCK[family].side
    guidance = STOCK[family].guidance(3.0, 1) if STOCK[family].beside else {}  # else the pipeline's own for 48 steps
    before = draw(pipe, side, **guidance)
    pipe.load_lora_weights(tmp_path)
    layers = [m for m in pipe.transformer.modules() if hasattr(m, "lora_B")]
    assert layers
    for layer in layers:  # what a run of two steps learns is little; it is there
        for factor in layer.lora_B.values():
            factor.weight.data *= 1e3
    assert np.abs(draw(pipe, side, **guidance) - before).max() > 1e-3


@needs_bitsandbytes
@pytest.mark.wide
@pytest.mark.parametrize("family", CONTROLLED)
def test_the_recipe_of_a_controlnet_ends_in_one_that_stock_diffusers_loads(family, root, tmp_path):
    need(family)
    fidelity = {"control.fidelity.every": 2, "control.fidelity.size": 2, "control.fidelity.steps": 2}
    record = run(f"{family}_controlnet.yaml", family, root, tmp_path, **fidelity)
    assert record["status"] == "complete"
    assert record["frozen"]["denoiser_before"] == record["frozen"]["denoiser_after"]
    assert record["fidelity"]["steps"] == [0, 2]
    controlnet_class, pipeline_class = (getattr(diffusers, n) for n in record["control"]["classes"])
    controlnet = controlnet_class.from_pretrained(tmp_path / "controlnet")
    pipe = pipeline_class.from_pretrained(root / family, controlnet=controlnet)
    conditioner = Conditioner(ControlSpec.load(tmp_path / "controlnet"))
    photo, side = load_images(str(root / "photos")).examples[0].load(), STOCK[family].side
    picture = draw(pipe, side, **{record["control"]["argument"]: conditioner.prepare(photo)})
    assert picture.shape == (1, side, side, 3)
    assert np.isfinite(picture).all()


def test_every_recipe_says_what_its_memory_goes_to():
    for name in [f"{f}_lora" for f in STOCK] + [f"{f}_controlnet" for f in CONTROLLED]:
        words = " ".join((EXAMPLES / f"{name}.yaml").read_text().replace("\n#", " ").split())
        assert all(word in words for word in ("Memory at", "GB", "activations")), name
        assert ("Not measured" in words) != ("on a GPU" in words), name
