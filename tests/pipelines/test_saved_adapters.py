"""A tuned pipeline is saved as it is: its adapters lie beside its modules and act again when it is loaded."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook
from diffusers import ControlNetModel, DiffusionPipeline
from peft import LoHaConfig, LoraConfig

from difftuning_control import add_control, load_adapter, unload_adapter
from difftuning_control.adapters.attached import merge_adapter
from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.errors import UserError
from difftuning_control.families.hub import in_precision
from difftuning_control.families.loading import family_of
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.adapter_kinds import KINDS
from support.pipeline_samples import (
    EVERY,
    OURS,
    add_adapter,
    controlnet,
    denoiser_of,
    draw,
    drop_in,
    same_traces,
    source_of,
    stock,
    traces,
)
from support.tiny_sd import tiny_pipeline

every = pytest.mark.parametrize("kind", EVERY)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def again(place: Path, **more: Any) -> Any:
    return quiet(DiffusionPipeline.from_pretrained(str(place), **more))


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Up to rounding: weights that lie elsewhere in memory are multiplied by other instructions."""
    return bool(np.abs(found - expected).max() < 1e-4)


# --- what is saved along --------------------------------------------------------------------------------------------


@pytest.mark.sample("dit")
@every
def test_fault_15_14_a_tuned_pipeline_is_saved_and_loaded(tmp_path, kind):
    """Two adapters at weights of their own, one of them on a text encoder too, with Domain Guidance between them."""
    pipe = drop_in(kind, tuned_adapters="tuned", domain_guidance=True)
    for name, seed in (("tuned", 1), ("style", 2)):
        add_adapter(pipe.denoiser, name, seed)
    pipe.denoiser.set_adapters(["tuned", "style"], [0.8, 0.6])
    if kind != "dit":
        add_adapter(pipe.text_encoder, "tuned", 3, ["q_proj", "v_proj"])
    before, expected = traces(pipe.denoiser), draw(pipe, kind, **negative(kind))
    pipe.save_pretrained(tmp_path)
    assert same_traces(before, traces(pipe.denoiser))
    assert np.array_equal(draw(pipe, kind, **negative(kind)), expected)
    found = again(tmp_path)
    assert type(found) is OURS[kind]
    assert found.extras == pipe.extras
    assert sorted(found.denoiser.peft_config) == ["style", "tuned"]
    assert same(draw(found, kind, **negative(kind)), expected)
    assert not same(draw(drop_in(kind), kind, **negative(kind)), expected)
    found.save_pretrained(tmp_path)  # where it was, and once more
    assert same(draw(again(tmp_path), kind, **negative(kind)), expected)


def test_a_saved_adapter_is_loaded_into_a_denoiser_that_was_spread_over_devices(tmp_path):
    pipe = drop_in("sd")
    add_adapter(pipe.unet, "tuned", 1)
    expected = draw(pipe, "sd")
    pipe.save_pretrained(tmp_path)
    unet = dispatch_model(drop_in("sd").unet, {"": "cpu"}, force_hooks=True)
    found = again(tmp_path, unet=unet)
    assert isinstance(found.unet._hf_hook, AlignDevicesHook)
    assert {p.device.type for p in found.unet.parameters()} == {"cpu"}
    assert found.hf_device_map is None  # which from_pretrained sets
    assert same(draw(found, "sd"), expected)


def negative(kind: str) -> dict[str, Any]:
    return {} if kind == "dit" else {"negative_prompt": ["dog"]}


@pytest.mark.sample("dit")
@every
def test_fault_15_14_without_its_adapter_it_is_the_pretrained_pipeline(tmp_path, kind):
    """Bit for bit, also for stock classes, which take the adapter from its folder."""
    pipe = drop_in(kind)
    add_adapter(pipe.denoiser, "tuned", 1)
    pipe.save_pretrained(tmp_path)
    expected, plain_one = stock(kind), quiet(type(stock(kind)).from_pretrained(str(tmp_path)))
    for name, tensor in denoiser_of(expected).state_dict().items():
        assert torch.equal(denoiser_of(plain_one).state_dict()[name], tensor), name
    assert denoiser_of(plain_one).state_dict().keys() == denoiser_of(expected).state_dict().keys()
    load_adapter(plain_one, tmp_path / "adapters" / "tuned")
    assert same(draw(plain_one, kind), draw(pipe, kind))
    found = again(tmp_path)
    unload_adapter(found, "tuned")
    assert same(draw(found, kind), draw(expected, kind))
    assert type(found).from_pipe(found).denoiser is found.denoiser
    assert not getattr(found.denoiser, "peft_config", {})


@pytest.mark.sample("difffit", "tlora", "lokr")
@pytest.mark.parametrize("kind", KINDS)
def test_fault_15_14_every_kind_of_adapter(tmp_path, kind):
    family = family_of(tiny_pipeline())
    config = AdapterConfig(kind, **({"block_size": 4} if KINDS[kind].block_size else {}))
    tuning = AdapterTuning(family, config, seed=3)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in tuning.parameters().values():
            parameter += 0.05 * torch.randn(parameter.shape)
    tuning.save(tmp_path / "run")
    pipe = drop_in("sd", domain_guidance=True)
    load_adapter(pipe, tmp_path / "run", "mine")
    expected = draw(pipe, "sd")
    pipe.save_pretrained(tmp_path / "pipe")
    assert np.array_equal(draw(pipe, "sd"), expected)
    found = again(tmp_path / "pipe")
    assert same(draw(found, "sd"), expected)
    unload_adapter(found, "mine")
    found.set_extras(domain_guidance=False)
    assert same(draw(found, "sd"), draw(stock("sd"), "sd"))


def test_fault_15_14_text_encoders_alone(tmp_path):
    """Every text encoder that the pipeline's LoRA loader knows."""
    pipe = drop_in("xl")
    for i, encoder in enumerate((pipe.text_encoder, pipe.text_encoder_2)):
        add_adapter(encoder, "words", i, ["q_proj", "out_proj"])
    expected = draw(pipe, "xl")
    pipe.save_pretrained(tmp_path)
    found = again(tmp_path)
    assert same(draw(found, "xl"), expected)
    assert not same(draw(stock("xl"), "xl"), expected)
    assert "words" in found.text_encoder_2.peft_config


def test_fault_15_14_what_does_not_act_does_not_act_again(tmp_path):
    pipe = drop_in("sd")
    for name, seed in (("a.b c", 1), ("style", 2)):
        add_adapter(pipe.unet, name.replace(".", "-"), seed)
    pipe.unet.set_adapters(["style"], [0.3])
    expected = draw(pipe, "sd")
    pipe.save_pretrained(tmp_path / "one")
    found = again(tmp_path / "one")
    assert found.unet.active_adapters() == ["style"]
    assert same(draw(found, "sd"), expected)
    found.unet.set_adapters(["a-b c"])
    pipe.unet.set_adapters(["a-b c"])
    assert same(draw(found, "sd"), draw(pipe, "sd"))
    pipe.unet.disable_adapters()
    pipe.save_pretrained(tmp_path / "two")
    assert same(draw(again(tmp_path / "two"), "sd"), draw(stock("sd"), "sd"))


def test_fault_15_14_another_pipeline_in_the_same_folder_leaves_none_behind(tmp_path):
    pipe = drop_in("sd")
    add_adapter(pipe.unet, "tuned", 1)
    pipe.save_pretrained(tmp_path)
    drop_in("sd").save_pretrained(tmp_path)
    assert not (tmp_path / "adapters").exists()
    assert json.loads((tmp_path / "model_index.json").read_text())["saved_adapters"] is None
    assert same(draw(again(tmp_path), "sd"), draw(stock("sd"), "sd"))


def test_fault_15_14_half_precision(tmp_path):
    pipe = drop_in("sd").to(torch.bfloat16)
    add_adapter(pipe.unet, "tuned", 1)
    pipe.save_pretrained(tmp_path)
    found = again(tmp_path, **in_precision(torch.bfloat16))
    assert {p.dtype for p in found.unet.parameters()} <= {torch.bfloat16, torch.float32}
    assert found.unet.dtype == torch.bfloat16
    assert found.unet.active_adapters() == ["tuned"]
    drawn = draw(found, "sd")
    assert np.abs(drawn - draw(pipe, "sd")).mean() < 0.02
    found.unet.disable_adapters()
    assert np.abs(drawn - draw(found, "sd")).mean() > 0.03


# --- what is not ----------------------------------------------------------------------------------------------------


@pytest.mark.sample("dit")
@every
def test_fault_15_14_fused_and_saved_it_draws_without_further_ado(tmp_path, kind, caplog):
    """The settings that need the pretrained model have nothing to act on any more, and are left out, with a word."""
    pipe = drop_in(kind, domain_guidance=True, hand_over=0.3, tuned_adapters=["tuned"])
    add_adapter(pipe.denoiser, "tuned", 1)
    without = type(pipe).from_pipe(pipe, domain_guidance=False, hand_over=None, tuned_adapters=None)
    expected = draw(quiet(without), kind)
    if kind == "dit":  # diffusers has no LoRA loader for it
        merge_adapter(pipe, "tuned")
    else:
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    said = logging.getLogger("difftuning_control.pipelines.saved")
    said.addHandler(caplog.handler)
    pipe.save_pretrained(tmp_path)
    said.removeHandler(caplog.handler)
    assert "not saved: tuned_adapters, domain_guidance, hand_over, since no tuned adapter is loaded" in caplog.text
    assert pipe.extras.domain_guidance  # only what is saved is without it
    found = again(tmp_path)
    assert not found.extras.is_active
    assert same(draw(found, kind), expected)


def test_fault_15_14_fused_but_not_unloaded(tmp_path):
    """The weights hold the adapter; it is not saved a second time."""
    pipe = drop_in("sd", domain_guidance=True)
    add_adapter(pipe.unet, "tuned", 1)
    pipe.set_extras(domain_guidance=False)
    expected = draw(pipe, "sd")
    pipe.set_extras(domain_guidance=True)
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path)
    assert same(draw(again(tmp_path), "sd"), expected)


@pytest.mark.sample("dit")
@every
def test_fault_15_14_a_source_keeps_domain_guidance(tmp_path, kind):
    pipe = drop_in(kind, **source_of(kind), domain_guidance=True)
    pipe.save_pretrained(tmp_path)
    found = again(tmp_path)
    assert found.extras.domain_guidance
    assert same(draw(found, kind), draw(pipe, kind))


def test_fault_15_14_what_a_file_cannot_hold_is_told_before_anything_is_written(tmp_path):
    pipe = drop_in("sd")
    pipe.text_encoder.add_adapter(LoHaConfig(r=2, target_modules=["q_proj"]), adapter_name="loha")
    with pytest.raises(UserError, match="the adapter loha in text_encoder cannot be saved with the pipeline"):
        pipe.save_pretrained(tmp_path / "there")
    assert not (tmp_path / "there").exists()


@pytest.mark.skipif(not hasattr(ControlNetModel, "add_adapter"), reason="ControlNets of this diffusers take no adapter")
def test_fault_15_14_an_adapter_on_a_controlnet_is_told_before_anything_is_written(tmp_path):
    other = drop_in("sd-control")
    other.controlnet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="x")
    with pytest.raises(UserError, match="an adapter is loaded in controlnet, which a saved pipeline does not hold"):
        other.save_pretrained(tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_fault_15_14_adapters_that_are_gone_are_told(tmp_path):
    pipe = drop_in("sd")
    add_adapter(pipe.unet, "tuned", 1)
    pipe.save_pretrained(tmp_path)
    (tmp_path / "adapters" / "in_use.json").unlink()
    with pytest.raises(UserError, match=r"saved with the adapters tuned, and there is no adapters/in_use\.json"):
        again(tmp_path)
    assert same(draw(again(tmp_path, saved_adapters=None), "sd"), draw(stock("sd"), "sd"))
    (tmp_path / "adapters" / "in_use.json").write_text('{"folders": {"tuned": "../x"}, "modules": {}}')
    with pytest.raises(UserError, match=r"names \.\./x, which is no folder beside it"):
        again(tmp_path)


# --- run folders ----------------------------------------------------------------------------------------------------


@pytest.mark.wide
@pytest.mark.parametrize("kind", ["sd", "xl", "sd3", "flux"])
def test_fault_15_16_one_call_takes_the_folders_of_two_runs(tmp_path, kind):
    """What a ControlNet run leaves, and what a LoRA run leaves."""
    net = controlnet(stock(kind))
    net.save_pretrained(tmp_path / "ctl" / "controlnet")
    (tmp_path / "ctl" / "run.json").write_text("{}")
    tuned = drop_in(kind)
    add_adapter(tuned.denoiser, "default", 1, lora_alpha=2)
    tuned.save_pretrained(tmp_path / "whole")
    lora = tmp_path / "whole" / "adapters" / "default"
    pipe = stock(kind)
    found = quiet(add_control(pipe, tmp_path / "ctl", adapter=str(lora)))
    expected = drop_in(f"{kind}-control", stock(f"{kind}-control"))
    add_adapter(expected.denoiser, "default", 1, lora_alpha=2)
    assert same(draw(found, f"{kind}-control"), draw(expected, f"{kind}-control"))
    by_two = quiet(add_control(stock(kind), str(tmp_path / "ctl")))
    load_adapter(by_two, lora)
    assert same(draw(by_two, f"{kind}-control"), draw(found, f"{kind}-control"))


def test_fault_15_16_a_run_of_another_kind_is_told_and_nothing_changes(tmp_path):
    pipe = stock("sd")
    controlnet(pipe).save_pretrained(tmp_path / "ctl" / "controlnet")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    before = traces(pipe.unet)
    for place, said in (("lora", "holds an adapter and no ControlNet; give it as adapter"), ("empty", "no ControlNet")):
        with pytest.raises(UserError, match=said):
            add_control(pipe, tmp_path / place)
    with pytest.raises(UserError, match=r"holds a ControlNet and no adapter; add_control\(pipe, "):
        load_adapter(pipe, tmp_path / "ctl")
    with pytest.raises(UserError, match="holds a ControlNet and no adapter"):
        add_control(pipe, tmp_path / "ctl", adapter=tmp_path / "ctl")
    assert same_traces(before, traces(pipe.unet))


def test_an_adapter_beside_a_fused_one_is_told(tmp_path):
    """peft runs none in a layer that has one fused; loaded again, it would act."""
    pipe = drop_in("sd")
    for seed, name in enumerate(("style", "tuned")):
        add_adapter(pipe.unet, name, seed)
    pipe.set_adapters(["style", "tuned"], [1.0, 1.0])
    pipe.fuse_lora(adapter_names=["style"])
    with pytest.raises(UserError, match="style is fused in unet, where tuned therefore does not act"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipe.set_extras(domain_guidance=True)
    with pytest.raises(UserError, match="nothing to switch off: no adapter acts"):
        draw(pipe, "sd")
    pipe.set_extras(domain_guidance=False)
    pipe.unfuse_lora()
    both = draw(pipe, "sd")
    pipe.save_pretrained(tmp_path / "saved")
    assert same(draw(again(tmp_path / "saved"), "sd"), both)
