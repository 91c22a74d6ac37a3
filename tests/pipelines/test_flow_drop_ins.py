"""The drop-ins that have nothing peculiar: they draw as attached stock pipelines do, and are saved and loaded."""

from __future__ import annotations

import sys
from importlib import import_module
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from difftuning_control import attach, pipelines
from difftuning_control.pipelines.registry import BY_NAME, BY_STOCK
from support.drawing import PROMPTS, generators
from support.flow_families import STOCK, need
from support.pipeline_samples import add_adapter
from support.tiny_models import tiny_lumina2, tiny_sana

OLDER = {"lumina2": (tiny_lumina2, "Lumina2Pipeline", 64), "sana": (tiny_sana, "SanaPipeline", 32)}
TOKENS = {"flux2": 512}


@pytest.fixture(params=[*STOCK, *OLDER])
def name(request):
    if request.param in STOCK:
        need(request.param)
    return request.param


def made(name: str):
    """A stock pipeline, quiet, as it is when loaded."""
    pipe = STOCK[name].make() if name in STOCK else OLDER[name][0]()
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours_of(name: str):
    stock = STOCK[name].pipeline if name in STOCK else OLDER[name][1]
    return getattr(pipelines, BY_STOCK[stock].name)


def draw(pipe, name: str) -> np.ndarray:
    side = STOCK[name].side if name in STOCK else OLDER[name][2]
    guidance = STOCK[name].guidance(3.0, 2) if name in STOCK else {"guidance_scale": 3.0}
    if name == "sana":
        guidance["use_resolution_binning"] = False
    size = {"height": side, "width": side}
    if name not in STOCK or STOCK[name].cuts:
        size["max_sequence_length"] = TOKENS.get(name, 64)
    call = {"prompt": list(PROMPTS), "num_inference_steps": 2, "generator": generators(0, 1), "output_type": "np"}
    return pipe(**call, **size, **guidance).images


@pytest.mark.sample("z_image")
def test_a_drop_in_draws_as_an_attached_pipeline_and_is_saved_with_its_adapter(name, tmp_path):
    stock = made(name)
    plain = draw(stock, name)
    ours = ours_of(name).from_pipe(made(name))
    ours.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(ours, name), plain)
    for pipe in (stock, ours):
        add_adapter(pipe.transformer, "tuned", 1, ["to_q", "to_v"])
    settings = {"hand_over": 0.6} if name in ("flux2", "ideogram4") else {"unconditional_strength": 0.5}
    attach(stock, **settings)
    ours.set_extras(**settings)
    expected = draw(stock, name)
    assert np.abs(expected - plain).max() > 1e-4
    assert np.array_equal(draw(ours, name), expected)
    ours.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is ours_of(name)
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(draw(loaded, name), expected, atol=1e-5)


@pytest.mark.parametrize("settings", [{"hand_over": 0.6}, {"adapter_schedule": {"kind": "power", "tau": 1.0}}])
def test_where_weights_change_by_step_the_prompt_is_not_kept_of_the_first(settings):
    """Qwen-Image 2.1's transformer gives the prompt's places at every step then, not at the first alone."""
    need("qwen_image21")
    pipe, places = made("qwen_image21"), list[int]()
    add_adapter(pipe.transformer, "tuned", 1, ["to_q", "to_v"])
    pipe.transformer.register_forward_hook(lambda module, args, out: places.append(out[0].shape[1]))
    kept = draw(pipe, "qwen_image21")
    assert [n > 16 for n in places] == [True, True, False, False]  # 16 are the picture's
    places.clear()
    attach(pipe, **settings)
    found = draw(pipe, "qwen_image21")
    assert [n > 16 for n in places] == [True] * 4
    assert np.abs(found - kept).max() > 1e-4


def test_an_older_diffusers_lacks_a_class_and_nothing_else(monkeypatch):
    """The others are found, and diffusers' own tables are as they are."""
    need("z_image")
    row = BY_NAME["DiffTuningZImagePipeline"]
    monkeypatch.delitem(sys.modules, "difftuning_control.pipelines.z_image", raising=False)
    monkeypatch.setitem(vars(diffusers), "ZImagePipeline", None)
    monkeypatch.delitem(vars(diffusers), "ZImagePipeline")
    hidden = {k: v for k, v in diffusers._class_to_module.items() if k != "ZImagePipeline"}
    monkeypatch.setattr(diffusers, "_class_to_module", hidden)
    with pytest.raises(AttributeError, match="DiffTuningZImagePipeline is made of a class that there is not"):
        getattr(pipelines, row.name)
    assert pipelines.DiffTuningPipeline is not None
    discovery = import_module("difftuning_control.discovery")
    table = {"stable-diffusion": diffusers.StableDiffusionPipeline}

    empty = {f"AUTO_{task}_PIPELINES_MAPPING": {} for task in ("IMAGE2IMAGE", "INPAINT")}
    discovery._add_to_tables(SimpleNamespace(AUTO_TEXT2IMAGE_PIPELINES_MAPPING=table, **empty))
    assert set(table) == {"stable-diffusion", "difftuning-sd"}
