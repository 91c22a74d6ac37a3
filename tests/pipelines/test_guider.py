"""The guider for modular pipelines: two predictions, the formula, and an adapter that is as it was afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import SequentialPipelineBlocks, StableDiffusionXLAutoBlocks

from difftuning_control import DomainGuidance
from difftuning_control.errors import UserError
from support.marks import needs
from support.pipeline_samples import SIDE, STEPS, add_adapter, draw, drop_in, same_traces, stock, traces

TOLERANCE = 1e-5
pytestmark = needs("diffusers", "0.40")  # the guiders before it were called otherwise


class Steps:
    """The denoising loop of a modular pipeline, as its blocks call a guider."""

    def __init__(self, guider: Any, denoiser: Any):
        self.guider, self.denoiser = guider, denoiser
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(1, 4, 8, 8, generator=generator)
        self.prompts = torch.randn(2, 1, 16, 16, generator=generator)

    @torch.no_grad()
    def predictions(self, steps: int = 3) -> list[torch.Tensor]:
        found = []
        for i, t in enumerate((900, 500, 100)[:steps]):
            self.guider.set_state(step=i, num_inference_steps=3, timestep=torch.tensor(t))
            state = self.guider.prepare_inputs({"prompt_embeds": (self.prompts[0], self.prompts[1])})
            for batch in state:
                self.guider.prepare_models(self.denoiser)
                batch.noise_pred = self.denoiser(self.latents, t, batch.prompt_embeds, return_dict=False)[0]
                self.guider.cleanup_models(self.denoiser)
            found.append(self.guider(state)[0])
        return found


def unet(*strengths: float) -> Any:
    found = stock("sd").unet
    for strength in strengths:
        add_adapter(found, "tuned", 1)
        found.set_adapters(["tuned"], [strength])
    return found


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_it_is_two_forwards_and_the_formula(share):
    model = unet(1.0)
    before = traces(model)
    loop = Steps(DomainGuidance(guidance_scale=3.0, unconditional_strength=share), model)
    found = loop.predictions()
    assert same_traces(traces(model), before)
    weaker = unet(share)
    with torch.no_grad():
        for t, prediction in zip((900, 500, 100), found):
            no = weaker(loop.latents, t, loop.prompts[1]).sample
            yes = model(loop.latents, t, loop.prompts[0]).sample
            assert (prediction - (no + 3.0 * (yes - no))).abs().max() < TOLERANCE
    if share == 1:
        ordinary = Steps(ClassifierFreeGuidance(3.0), model).predictions()
        assert all(torch.equal(a, b) for a, b in zip(found, ordinary))


def test_outside_of_its_steps_and_at_scale_one_it_is_one_prediction():
    model = unet(1.0)
    guider = DomainGuidance(guidance_scale=3.0, start=0.5)
    loop = Steps(guider, model)
    (first,) = loop.predictions(1)
    with torch.no_grad():
        assert torch.equal(first, model(loop.latents, 900, loop.prompts[0]).sample)
    assert DomainGuidance(guidance_scale=1.0).num_conditions == 1


def test_an_error_in_a_forward_leaves_nothing_for_the_next_call():
    model = unet(1.0)
    before, loop = traces(model), Steps(DomainGuidance(guidance_scale=3.0), unet(1.0))
    loop.denoiser = model
    loop.prompts = loop.prompts[..., :5]
    with pytest.raises(RuntimeError):
        loop.predictions()
    again = Steps(loop.guider, model)
    expected = Steps(DomainGuidance(guidance_scale=3.0), model).predictions()
    assert all(torch.equal(a, b) for a, b in zip(again.predictions(), expected))
    assert same_traces(traces(model), before)


def test_what_it_is_made_of_is_its_configuration(tmp_path):
    guider = DomainGuidance(
        guidance_scale=2.5, guidance_rescale=0.1, unconditional_strength=0.2, tuned_adapters=["tuned"], stop=0.9
    )
    guider.save_pretrained(tmp_path)
    for other in (DomainGuidance.from_pretrained(tmp_path), guider.new()):
        assert {k: v for k, v in other.config.items() if not k.startswith("_")} == {
            "guidance_scale": 2.5,
            "guidance_rescale": 0.1,
            "unconditional_strength": 0.2,
            "tuned_adapters": ["tuned"],
            "start": 0.0,
            "stop": 0.9,
        }


def test_what_it_cannot_act_on_is_refused():
    with pytest.raises(UserError, match=r"unconditional_strength is 2; expected 0 to 1"):
        DomainGuidance(unconditional_strength=2)
    with pytest.raises(UserError, match="nothing to switch off"):
        Steps(DomainGuidance(guidance_scale=3.0), unet()).predictions()
    model = unet(1.0)
    add_adapter(model, "style", 2)
    model.set_adapters(["tuned", "style"])
    with pytest.raises(UserError, match=r"several adapters act .*DomainGuidance\(tuned_adapters=\['tuned'\]\)"):
        Steps(DomainGuidance(guidance_scale=3.0), model).predictions()
    with pytest.raises(UserError, match="tuned_adapters names other, which does not act"):
        Steps(DomainGuidance(guidance_scale=3.0, tuned_adapters=["other"]), model).predictions()


def test_a_modular_sdxl_pipeline_draws_with_it():
    """The picture of our ordinary SDXL pipeline with Domain Guidance."""
    ordinary = stock("xl")
    add_adapter(ordinary.unet, "tuned", 1)
    blocks = StableDiffusionXLAutoBlocks()
    assert isinstance(blocks, SequentialPipelineBlocks)
    modular = blocks.init_pipeline()
    named = {n: c for n, c in ordinary.components.items() if c is not None}
    modular.update_components(**{n: c for n, c in named.items() if n in modular.components})
    modular.update_components(guider=DomainGuidance(guidance_scale=3.0))
    found = modular(
        prompt="red 1",
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        output="images",
    )
    pipe = drop_in("xl", ordinary, domain_guidance=True)
    assert abs(found - draw(pipe, "xl", prompt="red 1")).max() < 1e-4
