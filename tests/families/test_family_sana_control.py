"""ControlNets of Sana: what the stock pipeline does, piece by piece, and what our trainer makes of them."""

import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import SanaControlNetModel, SanaControlNetPipeline
from safetensors.torch import load_file

from difftuning_control.data.control_spec import Conditioner, ControlSpec
from difftuning_control.data.sources import load_images
from difftuning_control.errors import UserError
from difftuning_control.evaluation.drawing import sample_pictures
from difftuning_control.families.control import to_tensor
from difftuning_control.families.loading import family_of, load_controlnet, load_family
from difftuning_control.families.sana import Sana
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
from support.control_checks import (
    assert_adds_exactly_nothing,
    assert_predicts_as_in_the_stock_pipeline,
    assert_samples_as_the_stock_pipeline,
    conditions,
)
from support.controls import OUTLINE, write_photos
from support.drawing import PROMPTS, generators
from support.family_runs import FEW_STEPS
from support.tensors import differing
from support.tiny_models import tiny_sana
from support.trainings import interrupted_after, recomputed, resumed, run_record, trained_once
from support.tuned_pictures import assert_same_pictures

SIDE = 32
PLAIN = {"complex_human_instruction": None, "max_sequence_length": 24}  # of a call, as `short_prompts` has it
CONTROLNET = "controlnet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch):
    """No instruction before prompts and fewer tokens of padding, which saves time."""
    monkeypatch.setattr(Sana, "text_length", 24)
    monkeypatch.setattr(Sana, "instructions", {"complex_human_instruction": None})


@pytest.fixture
def family():
    """Four blocks, and a ControlNet that adds something to each but the first."""
    found = family_of(tiny_sana(layers=4))
    found.controlnet = found.new_controlnet(0)
    torch.manual_seed(3)
    for name, parameter in found.controlnet.named_parameters():
        if name.startswith(found.controlnet_whole):
            parameter.data = torch.randn(parameter.shape) * 0.3
    return found


def stock(family, control, steps: int = 3, **more):
    """A call of the stock pipeline under these conditions."""
    return family.control_pipeline()(
        PROMPTS,
        height=SIDE,
        width=SIDE,
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=generators(0, 1),
        output_type="pt",
        use_resolution_binning=False,
        **PLAIN,
        control_image=to_tensor(control, (-1.0, 1.0)),
        **more,
    ).images


# --- predict, sampling ----------------------------------------------------------------------------------------------


def test_predict_with_a_controlnet_is_the_call_in_the_stock_controlnet_pipeline(family):
    calls, control = [], conditions(SIDE)

    def keep(module, args, kwargs, out):
        calls.append((args[0], kwargs["timestep"], out[0]))

    handle = family.denoiser.register_forward_hook(keep, with_kwargs=True)
    stock(family, control)
    handle.remove()
    assert len(calls) == 3
    told, empty = family.encode_prompts(PROMPTS), family.encode_prompts(["", ""])
    rows = {name: torch.cat([empty[name], told[name]]) for name in told}
    assert_predicts_as_in_the_stock_pipeline(family, calls, rows, control)


@pytest.mark.parametrize("offload", [False, True])
def test_a_sample_under_a_condition_is_the_stock_controlnet_pipelines_picture(family, offload):
    control = conditions(SIDE)
    expected = stock(family, control)
    family.offload = offload
    assert_samples_as_the_stock_pipeline(family, expected, control)


# --- a new one, and another model's ---------------------------------------------------------------------------------


@pytest.mark.sample("2-1")
@pytest.mark.parametrize(("layers", "blocks"), [(2, 1), (4, 3), (10, 7)])
def test_a_new_controlnet_copies_the_first_blocks_and_adds_exactly_nothing(layers, blocks):
    family = family_of(tiny_sana(layers=layers))
    config = dict(family.denoiser.config)
    found = family.controlnet = family.new_controlnet(1)
    assert type(found) is SanaControlNetModel
    assert len(found.transformer_blocks) == len(found.controlnet_blocks) == blocks
    assert dict(family.denoiser.config) == config
    family.check_controlnet(found, "of its own")
    weights, its = family.denoiser.state_dict(), found.state_dict()
    fresh = {n for n in its if n.startswith(family.controlnet_whole)}
    assert not any(its[n].any() for n in fresh)
    assert all(torch.equal(its[n], weights[n]) for n in its.keys() - fresh)
    latents = torch.randn(2, 4, 16, 16, generator=generators(0)[0])
    assert_adds_exactly_nothing(family, latents, conditions(SIDE))


def test_a_controlnet_that_does_not_fit_is_refused_with_what_differs(family, tmp_path):
    for key in ("in_channels", "num_attention_heads", "caption_channels"):
        other = family.new_controlnet(0)
        other.register_to_config(**{key: 7})
        with pytest.raises(UserError, match=f"does not fit this model: its {key} is 7"):
            family.check_controlnet(other, "there")
    family.new_controlnet(0).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="it has 3 blocks, and the model takes what 1 give"):
        load_controlnet(family_of(tiny_sana(layers=2)), str(tmp_path))


def test_a_sana_that_the_stock_controlnet_is_not_for_is_refused_by_what_it_is_not_told():
    with pytest.raises(UserError, match=r"timestep_scale is 0.001 .*which diffusers' SanaControlNetModel does not"):
        family_of(tiny_sana(timestep_scale=0.001)).new_controlnet(0)
    pipe = tiny_sana()
    pipe.transformer.register_to_config(qk_norm="rms_norm_across_heads")
    with pytest.raises(UserError, match="qk_norm is rms_norm_across_heads"):
        family_of(pipe).new_controlnet(0)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sana control")
    (folder / "sana_outlines.py").write_text(OUTLINE)
    tiny_sana(layers=4).save_pretrained(folder / "model")
    write_photos(folder / "photos")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("sana_outlines", None)


@pytest.fixture(scope="module")
def make(root):
    def recipe(name: str, **sections) -> Recipe:
        return Recipe(
            "controlnet",
            ModelConfig(str(root / "model"), **sections.get("model", {})),
            DataConfig(path=str(root / "photos"), holdout=0.25, resolution=SIDE, cache=str(root / "cache")),
            bank=BankConfig(size=6, steps=2, batch_size=3),
            adapter=AdapterConfig(**sections.get("adapter", {})),
            control=ControlConfig(annotator="sana_outlines:outline", fidelity=FidelityConfig(every=4, size=2, steps=1)),
            training=TrainingConfig(**FEW_STEPS | sections.get("training", {})),
            output=str(root / name),
        )

    return recipe


@pytest.fixture(scope="module")
def finished(make):
    return trained_once(make)


LORA = {"adapter": {"on": "controlnet", "rank": 2, "alpha": 4.0}}


@pytest.mark.wide
@pytest.mark.parametrize("settings", [{}, LORA], ids=["whole", "lora"])
def test_a_controlnet_reloads_in_stock_diffusers_and_draws_the_same(finished, root, settings):
    recipe = finished(settings)
    run = run_record(recipe)
    assert run.frozen.denoiser_before == run.frozen.denoiser_after
    assert run.fidelity.steps == [0, 4]
    assert run.control.classes == ["SanaControlNetModel", "SanaControlNetPipeline"]
    controlnet = SanaControlNetModel.from_pretrained(f"{recipe.output}/controlnet")
    pipe = SanaControlNetPipeline.from_pretrained(recipe.model.id, controlnet=controlnet)
    conditioner = Conditioner(ControlSpec.load(f"{recipe.output}/controlnet"))
    pictures = [conditioner.prepare(e.load()) for e in load_images(str(root / "photos")).examples[: len(PROMPTS)]]
    control = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
    with tuned_model(load_family(recipe.model.id), recipe.output, run) as tuned:
        sampling = {"seed": 3, "steps": 2, "guidance_scale": 3.0, "resolution": SIDE}
        expected = sample_pictures(tuned, PROMPTS, **sampling, control=control)
        without = sample_pictures(tuned, PROMPTS, **sampling)
    seeds = [torch.Generator().manual_seed(step_seed(3, i)) for i in range(len(PROMPTS))]
    found = pipe(
        PROMPTS,
        height=SIDE,
        width=SIDE,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=seeds,
        control_image=pictures,
        use_resolution_binning=False,
        **PLAIN,
    ).images
    assert_same_pictures(found, expected)
    assert any(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() > 3 for a, b in zip(expected, without))
    words = (Path(recipe.output) / "README.md").read_text()
    assert "from diffusers import SanaControlNetModel, SanaControlNetPipeline" in words
    assert "control_image=condition" in words


@pytest.mark.wide
def test_what_trains_moves_and_the_rest_stays(make, finished, tmp_path):
    """Of a whole one every weight once its zeros have moved; with a LoRA its targets, its input and its zeros."""
    family = load_family(make("").model.id)
    start = family.new_controlnet(0).state_dict()
    whole = replace(make("", training={"max_steps": 5}), output=str(tmp_path / "whole"))
    train(whole)
    assert differing(load_file(f"{whole.output}/{CONTROLNET}"), start) == set(start)
    adapted = tuple(f".{target}.weight" for target in family.lora_targets)
    expected = {n for n in start if n.endswith(adapted) or n.startswith(family.controlnet_whole)}
    recipe = replace(make("", **LORA, training={"max_steps": 5}), output=str(tmp_path / "lora"))
    train(recipe)
    assert differing(load_file(f"{recipe.output}/{CONTROLNET}"), start) == expected


@pytest.mark.wide
def test_checkpointing_offload_and_an_interruption_change_no_weight(make, finished, tmp_path):
    expected = finished({})
    recipe = replace(make(""), output=str(tmp_path / "broken"))
    with pytest.raises(KeyboardInterrupt), interrupted_after(3):
        train(recipe)
    train(resumed(recipe))
    assert digest_of_file(tmp_path / "broken" / CONTROLNET) == digest_of_file(Path(expected.output) / CONTROLNET)
    recipe = make("", training={"gradient_checkpointing": True}, model={"offload": True})
    recipe = replace(recipe, output=str(tmp_path / "spared"))
    with recomputed() as again:
        train(recipe)
    assert "Linear" in again
    found, whole = (load_file(f"{r.output}/{CONTROLNET}") for r in (recipe, expected))
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-3)


@pytest.mark.wide
def test_a_run_in_bf16_and_in_8_bits_ends(make, tmp_path):
    recipe = make("", training={"mixed_precision": "bf16"}, model={"quantization": "float8"})
    run = train(replace(recipe, output=str(tmp_path))).record
    assert run.frozen.denoiser_before == run.frozen.denoiser_after
    assert np.isfinite(run.losses["target"].tuned.losses).all()


@pytest.mark.wide
def test_a_controlnet_is_exported_for_the_stock_pipeline(finished, tmp_path):
    recipe = finished({})
    folder = export(ExportRequest(recipe.output, str(tmp_path / "export"), pipeline="stock", base="copied"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is SanaControlNetPipeline
    saved = load_file(f"{recipe.output}/{CONTROLNET}")
    torch.testing.assert_close(pipe.controlnet.state_dict(), saved, atol=0, rtol=0)
