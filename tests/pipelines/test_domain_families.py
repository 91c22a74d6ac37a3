"""Domain Guidance in what `sample` and `evaluate` draw: for each family the empty prompt's rows are the base's."""

import pytest
import torch

from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_of
from difftuning_control.pipelines.domain_guidance import domain_guided
from difftuning_control.recipe.adapter import AdapterConfig
from support.drawing import PROMPTS, SIDES, generators
from support.flow_families import STOCK, need, shorten
from support.tiny_models import tiny_lumina2, tiny_pixart, tiny_sana

OLDER = {"pixart": tiny_pixart, "sana": tiny_sana, "lumina2": tiny_lumina2}
GUIDED = [name for name, stock in STOCK.items() if not stock.embedded and not stock.beside]


def tuned_family(make):
    """A model with a LoRA that does something."""
    family = family_of(make())
    for name, parameter in AdapterTuning(family, AdapterConfig(rank=2)).parameters().items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generators(1)[0])
    return family


@pytest.mark.sample("lumina2", "z_image")
@pytest.mark.parametrize("name", [*OLDER, *GUIDED])
def test_the_unconditional_rows_are_the_pretrained_models(name, monkeypatch):
    """With the adapter switched off as with the pretrained model beside it; with its whole strength nothing changes."""
    if name in STOCK:
        need(name)
        shorten(monkeypatch)
    make, side = (STOCK[name].make, STOCK[name].side) if name in STOCK else (OLDER[name], SIDES[name])
    family, base = tuned_family(make), family_of(make())
    settings = {"steps": 2, "guidance_scale": 3.0, "resolution": side}

    def sample(of, prompts):
        return of.sample(prompts, generators(0, 1), **settings)

    plain = sample(family, PROMPTS)
    with domain_guided(family, family):
        guided = sample(family, PROMPTS)
    assert not torch.allclose(guided, plain, atol=1e-3)
    assert not torch.allclose(guided, sample(base, PROMPTS), atol=1e-3)
    torch.testing.assert_close(sample(family, PROMPTS), plain, atol=1e-6, rtol=1e-6)  # nothing of it is left
    with domain_guided(family, family, 1.0):  # the adapter whole in the unconditional rows: ordinary guidance
        torch.testing.assert_close(sample(family, PROMPTS), plain, atol=1e-5, rtol=1e-4)
    with domain_guided(base, family):  # the pretrained model beside it, in the place of the adapter switched off
        # a batch of both kinds of rows and two halves round otherwise, which the first step of DDIM makes larger
        torch.testing.assert_close(sample(family, PROMPTS), guided, atol=1e-4, rtol=1e-3)


def test_a_model_that_is_told_its_guidance_or_has_none_is_refused():
    for name, variant in (("flux2", {}), ("flux2_klein", {"distilled": True})):
        need(name)
        family = family_of(STOCK[name].make(**variant))
        refused = pytest.raises(UserError, match="Domain Guidance is here for models that are sampled with a second")
        with refused, domain_guided(family, family):
            pass
