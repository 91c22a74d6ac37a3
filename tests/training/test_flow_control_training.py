"""ControlNets of the families of 2025 and 2026: what our trainer makes of them."""

import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from difftuning_control.data.control_spec import Conditioner, ControlSpec
from difftuning_control.data.sources import load_images
from difftuning_control.evaluation.drawing import sample_pictures
from difftuning_control.families.loading import load_family
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.inputs import BankConfig, ControlConfig, DataConfig, FidelityConfig, ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.requests import ExportRequest
from difftuning_control.recipe.training import TrainingConfig
from difftuning_control.runs.finished import tuned_model
from difftuning_control.system.digests import digest_of_file
from difftuning_control.system.seeds import step_seed
from difftuning_control.verbs.export.export import export
from difftuning_control.verbs.train import train
from support.controls import OUTLINE, write_photos
from support.drawing import PROMPTS
from support.family_runs import FEW_STEPS
from support.flow_families import STOCK, shorten
from support.tensors import differing
from support.trainings import interrupted_after, recomputed, resumed, run_record, trained_once
from support.tuned_pictures import assert_same_pictures

CLASSES = {
    "z_image": ("ZImageControlNetModel", "ZImageControlNetPipeline"),
    "qwen_image": ("QwenImageControlNetModel", "QwenImageControlNetPipeline"),
}
WEIGHTS = "controlnet/diffusion_pytorch_model.safetensors"
LORA = {"adapter": {"on": "controlnet", "rank": 2, "alpha": 4.0}}


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch):
    shorten(monkeypatch)


@pytest.fixture(params=CLASSES)
def name(request):
    missing = [c for c in CLASSES[request.param] if not hasattr(diffusers, c)]
    if missing:
        pytest.skip(f"diffusers {diffusers.__version__} has no {missing[0]}")
    return request.param


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow control")
    (folder / "flow_outlines.py").write_text(OUTLINE)
    write_photos(folder / "photos")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("flow_outlines", None)


@pytest.fixture(scope="module")
def make(root):
    def recipe(output: str, family: str, **sections) -> Recipe:
        model = root / "models" / family
        if not model.exists():
            STOCK[family].make(layers=7).save_pretrained(model)
        return Recipe(
            "controlnet",
            ModelConfig(str(model), **sections.get("model", {})),
            DataConfig(
                path=str(root / "photos"), holdout=0.25, resolution=STOCK[family].side, cache=str(root / "cache")
            ),
            bank=BankConfig(size=6, steps=2, batch_size=3),
            adapter=AdapterConfig(**sections.get("adapter", {})),
            control=ControlConfig(
                annotator="flow_outlines:outline",
                fidelity=FidelityConfig(every=4, size=2, steps=2),
                **sections.get("control", {}),
            ),
            training=TrainingConfig(**FEW_STEPS | sections.get("training", {})),
            output=str(root / output),
        )

    return recipe


@pytest.fixture(scope="module")
def finished(make):
    return trained_once(make)


@pytest.mark.wide
@pytest.mark.parametrize("settings", [{}, LORA], ids=["whole", "lora"])
def test_a_controlnet_reloads_in_stock_diffusers_and_draws_the_same(finished, name, root, settings):
    recipe, stock = finished({"family": name, **settings}), STOCK[name]
    run = run_record(recipe)
    assert run.frozen.denoiser_before == run.frozen.denoiser_after
    assert run.fidelity.steps == [0, 4]
    assert list(run.control.classes) == list(CLASSES[name])
    controlnet_class, pipeline_class = (getattr(diffusers, c) for c in CLASSES[name])
    controlnet = controlnet_class.from_pretrained(f"{recipe.output}/controlnet")
    pipe = pipeline_class.from_pretrained(recipe.model.id, controlnet=controlnet)
    conditioner = Conditioner(ControlSpec.load(f"{recipe.output}/controlnet"))
    pictures = [conditioner.prepare(e.load()) for e in load_images(str(root / "photos")).examples[: len(PROMPTS)]]
    control = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
    with tuned_model(load_family(recipe.model.id), recipe.output, run) as tuned:
        sampling = {"seed": 3, "steps": 2, "guidance_scale": 3.0, "resolution": stock.side}
        expected = sample_pictures(tuned, PROMPTS, **sampling, control=control)
        without = sample_pictures(tuned, PROMPTS, **sampling)
    seeds = [torch.Generator().manual_seed(step_seed(3, i)) for i in range(len(PROMPTS))]
    size = {"height": stock.side, "width": stock.side, "max_sequence_length": stock.tokens}
    ready = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures]) / 127.5 - 1
    found = pipe(
        prompt=list(PROMPTS),
        num_inference_steps=2,
        generator=seeds,
        control_image=ready,
        controlnet_conditioning_scale=1.0,
        **size,
        **stock.guidance(3.0, len(PROMPTS)),
    ).images
    assert_same_pictures(found, expected)
    assert any(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() > 3 for a, b in zip(expected, without))
    words = (Path(recipe.output) / "README.md").read_text()
    assert f"from diffusers import {', '.join(CLASSES[name])}" in words
    assert "control_image=condition, controlnet_conditioning_scale=1.0" in words


@pytest.mark.wide
def test_what_trains_moves_and_the_rest_stays(make, name, tmp_path):
    """Of a whole one every weight once its zeros have moved; with a LoRA its targets, its input and its zeros."""
    family = load_family(make("", name).model.id)
    found = family.new_controlnet(0)
    start, unused = found.state_dict(), family.unused_parameters(found)
    whole = replace(make("", name, training={"max_steps": 5}), output=str(tmp_path / "whole"))
    train(whole)
    assert differing(load_file(f"{whole.output}/{WEIGHTS}"), start) == {n for n in start if not n.startswith(unused)}
    adapted = tuple(f".{target}.weight" for target in family.lora_targets)
    own = {n for n in start if not set(family.controlnet_whole).isdisjoint(n.split("."))}
    recipe = replace(make("", name, **LORA, training={"max_steps": 5}), output=str(tmp_path / "lora"))
    train(recipe)
    expected = {n for n in start if n.endswith(adapted) and not n.startswith(unused)} | own
    assert differing(load_file(f"{recipe.output}/{WEIGHTS}"), start) == expected


@pytest.mark.wide
def test_checkpointing_offload_and_an_interruption_change_no_weight(make, finished, name, tmp_path):
    expected = finished({"family": name})
    recipe = replace(make("", name), output=str(tmp_path / "broken"))
    with pytest.raises(KeyboardInterrupt), interrupted_after(3):
        train(recipe)
    train(resumed(recipe))
    assert digest_of_file(tmp_path / "broken" / WEIGHTS) == digest_of_file(Path(expected.output) / WEIGHTS)
    recipe = make("", name, training={"gradient_checkpointing": True}, model={"offload": True})
    recipe = replace(recipe, output=str(tmp_path / "spared"))
    with recomputed() as again:
        train(recipe)
    assert "Linear" in again
    found, whole = (load_file(f"{r.output}/{WEIGHTS}") for r in (recipe, expected))
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-3)


@pytest.mark.wide
def test_a_run_in_bf16_and_in_8_bits_goes_on_from_a_controlnet(make, finished, name, tmp_path):
    init = f"{finished({'family': name}).output}/controlnet"
    more = {"training": {"mixed_precision": "bf16"}, "model": {"quantization": "float8"}, "control": {"init": init}}
    run = train(replace(make("", name, **more), output=str(tmp_path))).record
    assert run.frozen.denoiser_before == run.frozen.denoiser_after
    assert np.isfinite(run.losses["target"].tuned.losses).all()
    assert differing(load_file(tmp_path / WEIGHTS), load_file(f"{init}/diffusion_pytorch_model.safetensors"))


@pytest.mark.wide
def test_a_controlnet_is_exported_for_the_stock_pipeline(finished, name, tmp_path):
    recipe = finished({"family": name})
    folder = export(ExportRequest(recipe.output, str(tmp_path / "export"), pipeline="stock", base="copied"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipe).__name__ == CLASSES[name][1]
    saved = load_file(f"{recipe.output}/{WEIGHTS}")
    found = {n: t for n, t in pipe.controlnet.state_dict().items() if n in saved}
    torch.testing.assert_close(found, saved, atol=0, rtol=0)
