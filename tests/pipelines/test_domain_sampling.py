"""Domain Guidance through a family: the pictures of the drop-in pipeline, and the family as it was afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from difftuning_control.errors import UserError
from difftuning_control.families.sd import StableDiffusion
from difftuning_control.families.sd3 import StableDiffusion3
from difftuning_control.families.sdxl import StableDiffusionXL
from difftuning_control.pipelines.domain_guidance import check_domain_method, domain_guided
from difftuning_control.recipe.studies import check_domain_scale
from support.pipeline_samples import add_adapter, drop_in, stock

FAMILIES: dict[str, Any] = {"sd": StableDiffusion, "xl": StableDiffusionXL, "sd3": StableDiffusion3}


def latents(pipe: Any) -> torch.Tensor:
    generator = [torch.Generator().manual_seed(0)]
    return pipe(
        "red 1",
        height=16,
        width=16,
        num_inference_steps=3,
        guidance_scale=2.5,
        generator=generator,
        output_type="latent",
    ).images


def sampled(family: Any) -> torch.Tensor:
    return family.sample(["red 1"], [torch.Generator().manual_seed(0)], steps=3, guidance_scale=2.5, resolution=16)


@pytest.mark.sample("lora-sd")
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_family_draws_what_the_drop_in_pipeline_draws(kind, method):
    base = FAMILIES[kind](stock(kind))
    tuned = base if method == "lora" else FAMILIES[kind](stock(kind, 9))
    expected, source = stock(kind, 0 if method == "lora" else 9), None
    if method == "lora":
        for unet in (base.denoiser, getattr(expected, base.component)):
            add_adapter(unet, "tuned", 1)
    else:
        source = getattr(stock(kind), base.component)
    source_of = {f"source_{base.component}": source}
    before, own = tuned.pipe, sampled(tuned)
    with domain_guided(base, tuned):
        found = sampled(tuned)
    assert torch.equal(found, latents(drop_in(kind, expected, domain_guidance=True, **source_of)))
    assert not torch.equal(found, own)
    assert tuned.pipe is before
    assert torch.equal(sampled(tuned), own)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.9, float("inf"), float("nan")])
def test_a_scale_without_the_pretrained_branch_is_refused(scale):
    with pytest.raises(UserError, match="domain_guidance_scale is"):
        check_domain_scale(scale)


def test_a_controlnet_is_refused():
    with pytest.raises(UserError, match="is a ControlNet"):
        check_domain_method("runs/c", "controlnet")
