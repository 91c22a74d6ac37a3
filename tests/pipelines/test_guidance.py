"""A stage hand-over samples with one model above u₀ and with the other below, and leaves nothing behind."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_of
from difftuning_control.families.sd import StableDiffusion
from difftuning_control.pipelines.guidance import TUNED, hand_over
from difftuning_control.recipe.adapter import AdapterConfig
from support.tiny_sd import tiny_pipeline

SIDES = ["adapter", "full weights"]


def draw(family: StableDiffusion, **settings) -> Tensor:
    """Latents of two prompts; the four steps lie at u = 0.002, 0.252, 0.502 and 0.752."""
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    options = {"steps": 4, "guidance_scale": 2.0, "resolution": 16, **settings}
    return family.sample(["red 1", "a blue square"], generators, **options)


def adapted() -> StableDiffusion:
    """The tiny model with an adapter that changes what it draws."""
    family = family_of(tiny_pipeline())
    AdapterTuning(family, AdapterConfig(rank=2))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in family.denoiser.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return family


def retrained() -> StableDiffusion:
    """The tiny model with other weights in its denoiser."""
    family = family_of(tiny_pipeline())
    generator = torch.Generator().manual_seed(1)
    for parameter in family.denoiser.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return family


@pytest.fixture(params=SIDES)
def tuned(request: pytest.FixtureRequest) -> StableDiffusion:
    return adapted() if request.param == "adapter" else retrained()


@pytest.fixture
def base(tuned: StableDiffusion) -> nn.Module | None:
    """What `hand_over` takes as the base beside `tuned`."""
    return None if hasattr(tuned.denoiser, "peft_config") else family_of(tiny_pipeline()).denoiser


@pytest.fixture(scope="module")
def of_base() -> Tensor:
    return draw(family_of(tiny_pipeline()))


def state(family: StableDiffusion) -> list[object]:
    """All that a hand-over could leave behind in a denoiser."""
    unet = family.denoiser
    switched = [m.disable_adapters for m in unet.modules() if hasattr(m, "lora_A")]
    registry = getattr(unet, "_diffusers_hook", None)
    weights = [(n, p.requires_grad, p.clone()) for n, p in unet.named_parameters()]
    return [switched, registry.hooks if registry else {}, unet.forward.__func__, unet.training, weights]


def same(one: list[object], other: list[object]) -> bool:
    (*plain, weights), (*others, expected) = one, other
    pairs = zip(weights, expected, strict=True)
    return plain == others and all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in pairs)


# --- who draws where ------------------------------------------------------------------------------------------------


@pytest.mark.sample("full weights")
def test_at_the_ends_one_model_draws_alone(tuned, base, of_base):
    plain = draw(tuned)
    assert not torch.allclose(plain, of_base, atol=1e-2)
    for u0, above, expected in ((0, True, plain), (1, True, of_base), (0, False, of_base), (1, False, plain)):
        with hand_over(tuned, u0, tuned_above=above, base=base):
            assert torch.equal(draw(tuned), expected), (u0, above)


@pytest.mark.sample("full weights")
def test_in_between_each_place_gives_another_picture(tuned, base, of_base):
    found = [draw(tuned), of_base]
    for u0 in (0.1, 0.4, 0.6):
        for above in (True, False):
            with hand_over(tuned, u0, tuned_above=above, base=base):
                found.append(draw(tuned))
    for i, one in enumerate(found):
        assert all(not torch.equal(one, other) for other in found[:i])


@pytest.mark.sample("full weights-0.502-True")
@pytest.mark.parametrize("tuned_above", [True, False])
@pytest.mark.parametrize("u0", [0.0019, 0.002, 0.2, 0.5019, 0.502, 0.752, 0.9])
def test_the_model_changes_exactly_at_u0(tuned, base, u0, tuned_above):
    """Steps of the stock sampler, one model chosen by hand for each."""
    pipe, other = copy.deepcopy(tuned.pipe), tiny_pipeline().unet
    own = pipe.unet.forward
    timesteps: list[float] = []

    def chosen(sample: Tensor, timestep: Tensor, *args, **kwargs):
        timesteps.append(float(timestep))
        above = (float(timestep) + 1) / 1000 > u0
        return (own if above == tuned_above else other.eval())(sample, timestep, *args, **kwargs)

    pipe.unet.forward = chosen
    expected = draw(family_of(pipe))
    assert timesteps == [751, 501, 251, 1]
    with hand_over(tuned, u0, tuned_above=tuned_above, base=base):
        assert torch.equal(draw(tuned), expected)


@pytest.mark.sample("settings1")
@pytest.mark.parametrize("settings", [{"guidance_scale": 1.0}, {"steps": 1}, {"steps": 7}])
def test_guidance_and_steps_do_not_matter_at_the_ends(settings):
    tuned, base = adapted(), family_of(tiny_pipeline())
    expected = draw(tuned, **settings)
    with hand_over(tuned, 0):
        assert torch.equal(draw(tuned, **settings), expected)
    with hand_over(tuned, 1):
        assert torch.equal(draw(tuned, **settings), draw(base, **settings))


def test_v_prediction_is_handed_over_too():
    tuned = family_of(tiny_pipeline(prediction_type="v_prediction"))
    AdapterTuning(tuned, AdapterConfig(rank=2))
    before = draw(tuned)
    for name, parameter in tuned.denoiser.named_parameters():
        if "lora_B" in name:
            parameter.data += 1
    with hand_over(tuned, 1):
        assert torch.equal(draw(tuned), before)
    assert not torch.equal(draw(tuned), before)


# --- nothing is left ------------------------------------------------------------------------------------------------


@pytest.mark.sample("full weights")
def test_afterwards_the_pipeline_is_as_before(tuned, base):
    before, picture = state(tuned), draw(tuned)
    for u0 in (0.3, 0.8):
        with hand_over(tuned, u0, base=base):
            assert TUNED in tuned.denoiser._diffusers_hook.hooks
            draw(tuned)
    assert same(state(tuned), before)
    assert torch.equal(draw(tuned), picture)


@pytest.mark.parametrize("trainable", [True, False])
def test_a_frozen_adapter_stays_frozen(trainable):
    tuned = adapted()
    for name, parameter in tuned.denoiser.named_parameters():
        parameter.requires_grad_(trainable and "lora_" in name)
    before = state(tuned)
    with hand_over(tuned, 0.5):
        draw(tuned)
    assert same(state(tuned), before)


@pytest.mark.sample("full weights-0")
@pytest.mark.parametrize("step", [0, 1, 3])
def test_an_exception_in_the_middle_leaves_nothing_either(tuned, base, step):
    before, picture = state(tuned), draw(tuned)

    def stop(pipe, index, timestep, values):
        if index == step:
            raise KeyboardInterrupt
        return values

    tuned.pipe.set_progress_bar_config(disable=True)
    with pytest.raises(KeyboardInterrupt), hand_over(tuned, 0.6, base=base):
        tuned.pipe("red", height=16, width=16, num_inference_steps=4, callback_on_step_end=stop, output_type="latent")
    assert same(state(tuned), before)
    assert torch.equal(draw(tuned), picture)


def test_an_exception_in_the_denoiser_leaves_the_adapter_on():
    tuned = adapted()
    before = state(tuned)
    prompts = torch.zeros(1, 16, 99)  # the cross attention takes 16
    with pytest.raises(RuntimeError), hand_over(tuned, 1):
        tuned.denoiser(torch.zeros(1, 4, 8, 8), torch.tensor(500), prompts)
    assert same(state(tuned), before)


def test_the_base_is_left_alone():
    tuned, base = retrained(), family_of(tiny_pipeline())
    before = state(base)
    with hand_over(tuned, 0.5, base=base.denoiser):
        draw(tuned)
    assert same(state(base), before)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_model_without_adapter_and_base_is_refused(of_base):
    plain = family_of(tiny_pipeline())
    with pytest.raises(
        UserError, match="nothing to switch off: no adapter acts in the denoiser, and no pretrained one is beside it"
    ):
        hand_over(plain, 0.5).__enter__()
    assert torch.equal(draw(plain), of_base)


def test_an_adapter_that_was_unloaded_does_not_count():
    tuned = adapted()
    tuned.pipe.unload_lora_weights()
    with pytest.raises(UserError, match="no adapter acts in the denoiser"):
        hand_over(tuned, 0.5).__enter__()


@pytest.mark.sample("1.01")
@pytest.mark.parametrize("u0", [-0.01, 1.01, float("nan"), float("inf")])
def test_u0_out_of_its_range_is_refused(u0):
    tuned = adapted()
    with pytest.raises(UserError, match=rf"^u0 is {re.escape(str(u0))}; expected 0 to 1\.$"):
        hand_over(tuned, u0).__enter__()
