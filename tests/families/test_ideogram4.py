"""What is peculiar to Ideogram 4: a second transformer for the unconditional rows, text at the end of its places."""

import pytest
import torch

from difftuning_control import attach
from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_of
from difftuning_control.pipelines.domain_guidance import check_mixed_family, domain_guided
from difftuning_control.recipe.adapter import AdapterConfig
from support.drawing import PROMPTS, TOLERANCE, generators
from support.flow_families import STOCK, need, shorten
from support.tiny_flow import tiny_ideogram4

SETTINGS = {"steps": 2, "resolution": 16}
CALL = {"prompt": list(PROMPTS), "height": 16, "width": 16, "output_type": "latent", "max_sequence_length": 64}


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch):
    need("ideogram4")
    shorten(monkeypatch)


@pytest.fixture
def family():
    """With a LoRA that does something."""
    found = family_of(tiny_ideogram4())
    for name, parameter in AdapterTuning(found, AdapterConfig(rank=2)).parameters().items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generators(1)[0])
    return found


def draw(family, scale: float = 3.0) -> torch.Tensor:
    return family.sample(PROMPTS, generators(0, 1), guidance_scale=scale, **SETTINGS)


def test_guidance_of_a_tuned_model_is_domain_guidance_already(family):
    """The second transformer is not tuned: ε = ε_base(∅) + w (ε_tuned(c) − ε_base(∅))."""
    with domain_guided(family, family):
        guided = draw(family)
    assert torch.equal(guided, draw(family))
    pipe, seen = family.pipe, []
    for transformer in (pipe.transformer, pipe.unconditional_transformer):
        transformer.register_forward_hook(lambda *call: seen.append(call[2][0]))
    found = pipe(
        **CALL, **STOCK["ideogram4"].guidance(3.0, 2), generator=generators(0, 1), num_inference_steps=1
    ).images
    tuned, base = seen[0][:, 64:], seen[1]
    start = torch.stack([torch.randn(16, 16, generator=g) for g in generators(0, 1)])
    torch.testing.assert_close(found, start + pipe.scheduler.sigmas[0] * (base + 3.0 * (tuned - base)), **TOLERANCE)
    assert not [n for n, _ in pipe.unconditional_transformer.named_parameters() if "lora" in n]


def test_a_pilot_refuses_a_mixture_before_it_trains(family):
    with pytest.raises(UserError, match=r"transformer of its own .*; leave out pilot\.unconditional_strength"):
        check_mixed_family(family, "pilot.unconditional_strength")


def test_a_share_of_the_adapter_in_the_unconditional_rows_is_refused(family):
    with (
        pytest.raises(UserError, match="transformer of its own for the unconditional rows"),
        domain_guided(family, family, 0.5),
    ):
        draw(family)


@pytest.mark.wide
def test_an_attached_stock_pipeline_hands_over_to_the_pretrained_model(family):
    base, stock = family_of(tiny_ideogram4()), STOCK["ideogram4"]
    call = CALL | {"num_inference_steps": 2, **stock.guidance(3.0, 2)}
    attach(family.pipe, hand_over=1.0)
    found = family.pipe(**call, generator=generators(0, 1)).images
    torch.testing.assert_close(found, base.pipe(**call, generator=generators(0, 1)).images, **TOLERANCE)


def test_a_prompt_that_the_pipeline_would_not_cut_is_refused(family):
    with pytest.raises(UserError, match=r'the prompt "long long .*…" has \d+ tokens .* at most 64'):
        family.encode_prompts(["long " * 40])


@pytest.mark.wide
def test_offloading_leaves_the_pipeline_as_it_was(family):
    """Its embeddings are read where it would encode prompts, for the while of drawing only."""
    expected = draw(family)
    family.offload = True
    torch.testing.assert_close(draw(family), expected, **TOLERANCE)
    assert "encode_prompt" not in vars(family.pipe)


@pytest.mark.wide
def test_fewer_bits_are_of_both_transformers():
    family = family_of(tiny_ideogram4())
    family.quantise("float8")
    for transformer in (family.denoiser, family.pipe.unconditional_transformer):
        assert transformer.layers[0].attention.to_q.weight.dtype == torch.float8_e4m3fn
    assert torch.isfinite(draw(family)).all()


@pytest.mark.wide
def test_bfloat16_keeps_rows_and_columns_apart():
    """They are counted from 65,536, where bfloat16 has steps of 512."""
    family = family_of(tiny_ideogram4())
    latents, rows = torch.randn(2, 16, 4, 4, generator=generators(0)[0]), family.encode_prompts(PROMPTS)
    timesteps = family.process.timesteps[torch.tensor([300, 800])]
    with torch.no_grad():
        expected = family.predict(family.denoiser, latents, timesteps, rows)
        with torch.autocast("cpu", torch.bfloat16):
            found = family.predict(family.denoiser, latents, timesteps, rows)
    assert (found - expected).norm() < 0.05 * expected.norm()
