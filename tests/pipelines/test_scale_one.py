"""Domain Guidance at w = 1 is the tuned conditional prediction; a sweep of scales may begin there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from difftuning_control.errors import UserError
from difftuning_control.families.sd import StableDiffusion
from difftuning_control.families.sd3 import StableDiffusion3
from difftuning_control.families.sdxl import StableDiffusionXL
from difftuning_control.pipelines.domain_guidance import domain_guided
from difftuning_control.recipe.studies import Evaluation, PilotConfig, check_domain_scale
from difftuning_control.verbs.parse import parse
from support.pipeline_samples import EVERY, add_adapter, denoiser_of, draw, drop_in, plain, source_of, stock

TOLERANCE = 1e-5
every = pytest.mark.parametrize("kind", EVERY)


def scale(kind: str, value: float) -> dict[str, float]:
    return {"true_cfg_scale" if plain(kind) == "flux" else "guidance_scale": value}


@pytest.mark.sample("full weights-dit")
@every
@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full weights"])
def test_fault_15_15_at_one_it_is_the_tuned_pipeline_without_guidance(kind, full):
    tuned = stock(kind)
    if not full:
        add_adapter(denoiser_of(tuned), "tuned", 1)
    pipe = drop_in(kind, **(source_of(kind) if full else {}), domain_guidance=True)
    if not full:
        add_adapter(pipe.denoiser, "tuned", 1)
    expected = draw(tuned, kind, **scale(kind, 1.0))
    assert np.abs(draw(pipe, kind, **scale(kind, 1.0)) - expected).max() < TOLERANCE
    assert np.abs(draw(pipe, kind, **scale(kind, 3.0)) - expected).max() > 10 * TOLERANCE


@pytest.mark.sample("sd")
@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind != "sd3-control"])
def test_fault_15_15_a_sweep_from_one_is_continuous_at_one(kind):
    """ε = ε_pretrained(∅) + w (ε_tuned(c) − ε_pretrained(∅)) just above 1 is what 1 gives, up to the distance.

    The stock SD3 ControlNet pipeline draws its condition's latents anew for a guided batch, and other ones.
    """
    pipe = drop_in(kind, domain_guidance=True)
    add_adapter(pipe.denoiser, "tuned", 1)
    pictures = [draw(pipe, kind, **scale(kind, w)) for w in (1.0, 1 + 1e-6, 1.5, 2.0)]
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-3
    assert np.abs(pictures[0] - pictures[3]).max() > 2e-3


@pytest.mark.parametrize("kind", ["flux", "flux-control"])
def test_fault_15_15_at_one_a_negative_prompt_of_flux_is_not_asked(kind):
    """At every step the tuned weights answer: there is no second forward whose turn it would be."""
    pipe = drop_in(kind, domain_guidance=True)
    add_adapter(pipe.denoiser, "tuned", 1)
    add_adapter(pipe.text_encoder, "tuned", 1, ["q_proj", "v_proj"])
    expected = draw(pipe, kind, true_cfg_scale=1.0)
    assert np.array_equal(draw(pipe, kind, true_cfg_scale=1.0, negative_prompt=["dog"]), expected)
    pipe.set_extras(domain_guidance=False)
    assert np.abs(draw(pipe, kind, true_cfg_scale=1.0) - expected).max() < TOLERANCE


@pytest.mark.sample("sd")
@every
def test_fault_15_15_below_one_is_told(kind):
    pipe = drop_in(kind, **source_of(kind), domain_guidance=True)
    with pytest.raises(UserError, match=r"does nothing at \w+ 0\.9; give 1, which is the tuned model alone, or more"):
        draw(pipe, kind, **scale(kind, 0.9))


@pytest.mark.sample("StableDiffusionXL")
@pytest.mark.parametrize("family", [StableDiffusion, StableDiffusionXL, StableDiffusion3])
def test_fault_15_15_a_family_samples_at_one(family):
    kind = {StableDiffusion: "sd", StableDiffusionXL: "xl", StableDiffusion3: "sd3"}[family]
    model = family(stock(kind))
    add_adapter(model.denoiser, "tuned", 1)

    def sampled() -> torch.Tensor:
        generator = [torch.Generator().manual_seed(0)]
        return model.sample(["red 1"], generator, steps=3, guidance_scale=1.0, resolution=16)

    expected = sampled()
    with domain_guided(model, model):
        assert (sampled() - expected).abs().max() < TOLERANCE


def test_fault_15_15_the_verbs_take_one():
    check_domain_scale(1.0)
    assert Evaluation(["r"], domain_guidance_scale=1.0).domain_guidance_scale == 1
    assert PilotConfig(guidance_scales=[1.0, 1.5]).guidance_scales == [1.0, 1.5]
    command = ["sample", "--run", "r", "--prompts", '["a"]', "--domain_guidance_scale", "1"]
    assert parse(command)[1].domain_guidance_scale == 1
    with pytest.raises(UserError, match=r"domain_guidance_scale is 0\.99; expected a finite number of at least 1"):
        check_domain_scale(0.99)
