"""The adapter's share in the unconditional branch, through families and verbs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock

from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_of
from difftuning_control.pipelines import guidance
from difftuning_control.pipelines.domain_guidance import check_domain_family, domain_guided
from difftuning_control.recipe.drawing import check_domain_scale
from difftuning_control.recipe.studies import Evaluation
from difftuning_control.verbs.parse import parse
from support.marks import need_pipeline
from support.pipeline_samples import add_adapter, stock
from support.tiny_flow import tiny_chroma, tiny_flux2_klein, tiny_krea2, tiny_qwen_image, tiny_z_image
from support.tiny_models import tiny_lumina2, tiny_pixart, tiny_sana

MAKERS: dict[str, Any] = {
    "sd": lambda: stock("sd"),
    "sd3": lambda: stock("sd3"),
    "pixart": tiny_pixart,
    "sana": tiny_sana,
    "lumina2": tiny_lumina2,
    "z-image": tiny_z_image,
    "qwen-image": tiny_qwen_image,
    "klein": tiny_flux2_klein,
    "krea2": tiny_krea2,
    "chroma": tiny_chroma,
}


NEWER = {
    "z-image": "ZImagePipeline",
    "qwen-image": "QwenImagePipeline",
    "klein": "Flux2KleinPipeline",
    "krea2": "Krea2Pipeline",
    "chroma": "ChromaPipeline",
}


@pytest.mark.sample("sd", "lumina2", "z-image", "qwen-image")
@pytest.mark.parametrize("kind", MAKERS)
def test_a_family_draws_between_domain_and_ordinary_guidance(kind):
    if kind in NEWER:
        need_pipeline(NEWER[kind])
    family = family_of(MAKERS[kind]())
    family.denoiser.eval()
    add_adapter(family.denoiser, "tuned", 1, ["to_q", "to_v"])
    side = {"sana": 32, "lumina2": 64}.get(kind, 16)

    def sampled() -> torch.Tensor:
        generator = [torch.Generator().manual_seed(0)]
        return family.sample(["red 1"], generator, steps=2, guidance_scale=3.0, resolution=side)

    stock_class, ordinary, found = type(family.pipe), sampled(), {}
    for share in (0.0, 0.5, 1.0):
        with domain_guided(family, family, share):
            found[share] = sampled()
    assert type(family.pipe) is stock_class
    assert torch.equal(found[1.0], ordinary)
    assert torch.equal(sampled(), ordinary)
    apart = [(found[0.5] - found[other]).abs().max() for other in (0.0, 1.0)]
    assert min(apart) > 1e-4


def test_a_family_with_another_argument_for_its_scale_is_refused():
    with pytest.raises(UserError, match="not for a FluxPipeline; leave out --domain_guidance_scale"):
        check_domain_family(family_of(stock("flux")), "--domain_guidance_scale")


@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0])
def test_z_image_s_scale_is_one_less_and_guides_where_its_pipeline_does(scale):
    """At 1 that is the tuned model alone; between it and 2 an older pipeline has no second branch."""
    need_pipeline("ZImagePipeline")
    family = family_of(tiny_z_image())
    family.denoiser.eval()
    add_adapter(family.denoiser, "tuned", 1, ["to_q", "to_v"])
    family.pipe._guidance_scale = 0.5
    is_refused = scale == 1.5 and not family.pipe.do_classifier_free_guidance

    def sampled() -> torch.Tensor:
        generator = [torch.Generator().manual_seed(0)]
        return family.sample(["red 1"], generator, steps=2, guidance_scale=scale, resolution=16)

    ordinary = sampled()
    with domain_guided(family, family):
        if is_refused:
            with pytest.raises(UserError, match=r"at guidance_scale 0\.5; give 0, .* alone, or more than 1, or leave"):
                sampled()
        else:
            assert torch.equal(sampled(), ordinary) == (scale == 1)


def test_a_distilled_model_is_refused():
    need_pipeline("Flux2KleinPipeline")
    with pytest.raises(UserError, match="not for a Flux2KleinPipeline; leave out pilot"):
        check_domain_family(family_of(tiny_flux2_klein(distilled=True)), "pilot.guidance_scales")


def test_verbs_take_it_with_a_scale_only():
    check_domain_scale(2.0, 0.5)
    assert Evaluation(["r"], domain_guidance_scale=2.0, unconditional_strength=0.5).unconditional_strength == 0.5
    command = ["sample", "--run", "r", "--prompts", '["a"]', "--domain_guidance_scale", "2"]
    assert parse([*command, "--unconditional_strength", "0.25"])[1].unconditional_strength == 0.25
    with pytest.raises(UserError, match="needs a scale of Domain Guidance; give --domain_guidance_scale too"):
        check_domain_scale(None, 0.5)
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match=rf"unconditional_strength is {value}; expected 0 to 1"):
            check_domain_scale(2.0, value)


def test_a_layer_that_has_several_rows_a_picture_is_masked_as_two_halves_would_be(monkeypatch):
    """PixArt's embedding of sizes at 1024 pixels has two rows a picture for the size."""
    family = family_of(tiny_pixart(alpha=True))
    family.denoiser.eval()
    add_adapter(family.denoiser, "tuned", 1, ["to_q", "linear_1", "linear_2"])

    def sampled() -> torch.Tensor:
        generator = [torch.Generator().manual_seed(0)]
        return family.sample(["red 1"], generator, steps=2, guidance_scale=3.0, resolution=16)

    ordinary = sampled()
    with domain_guided(family, family):
        masked = sampled()
        monkeypatch.setattr(guidance, "can_mask", lambda weights: False)
        torch.testing.assert_close(masked, sampled(), rtol=1e-4, atol=1e-2)  # values are some hundreds
    assert (masked - ordinary).abs().max() > 1


def test_a_layer_that_is_given_parts_of_the_batch_is_refused():
    family = family_of(stock("sd"))
    add_adapter(family.denoiser, "tuned", 1, ["ff.net.2"])
    for block in (m for m in family.denoiser.modules() if isinstance(m, BasicTransformerBlock)):
        block.set_chunk_feed_forward(1, dim=0)
    with domain_guided(family, family), pytest.raises(UserError, match=r"is given parts of the batch \(forward chunk"):
        family.sample(["red 1"], [torch.Generator().manual_seed(0)], steps=2, guidance_scale=3.0, resolution=16)
