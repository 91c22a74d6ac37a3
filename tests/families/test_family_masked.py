"""PixArt, Sana and Lumina2 do what their stock pipelines do, piece by piece."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_of, load_family
from difftuning_control.recipe.adapter import AdapterConfig
from support.drawing import PROMPTS, SIDES, TOLERANCE, exact, generators
from support.family_checks import (
    assert_a_tlora_has_the_papers_ranks,
    assert_embeddings_are_cached,
    assert_loaded_it_is_the_saved_one,
    assert_the_pretrained_model_takes_over,
)
from support.tiny_models import tiny_lumina2, tiny_pixart, tiny_sana

VARIANTS = {
    "pixart sigma": tiny_pixart,
    "pixart sigma without variance": lambda: tiny_pixart(variance=False),
    "pixart alpha": lambda: tiny_pixart(alpha=True),
    "sana": tiny_sana,
    "sana with other timesteps": lambda: tiny_sana(timestep_scale=0.001),
    "lumina2": tiny_lumina2,
    "lumina2 dynamic": lambda: tiny_lumina2(dynamic=True),
}
FLOW = [name for name in VARIANTS if not name.startswith("pixart")]


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture
def pipe(variant):
    return VARIANTS[variant]()


@pytest.fixture
def family(pipe):
    return family_of(pipe)


@pytest.fixture
def side(variant):
    return SIDES[variant.split()[0]]


def recorded(pipe, side: int, steps: int, prompts=PROMPTS, **settings):
    """Noisy latents, timesteps and outputs of every call of the transformer in a real pipeline call."""
    calls = []

    def keep(module, args, kwargs, out):
        noisy = args[0] if args else kwargs["hidden_states"]
        calls.append((noisy, kwargs["timestep"], out[0]))

    handle = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    pictures = pipe(
        prompts,
        height=side,
        width=side,
        num_inference_steps=steps,
        generator=generators(*range(len(prompts))),
        output_type="pt",
        **exact(pipe),
        **settings,
    ).images
    handle.remove()
    return calls, pictures


# --- predict, noise, target -----------------------------------------------------------------------------------------


@pytest.mark.sample("lumina2", "pixart sigma")
def test_predict_is_the_transformers_call_in_the_stock_pipeline(variant, family, pipe, side):
    calls, _ = recorded(pipe, side, 3, guidance_scale=3.0)
    told, empty = family.encode_prompts(PROMPTS), family.encode_prompts(["", ""])
    together = {name: torch.cat([empty[name], told[name]]) for name in told}
    sign = -1 if variant.startswith("lumina2") else 1  # the pipeline negates what this model gives
    rows = [together] * 3 if sign == 1 else [told, empty] * 3
    assert len(calls) == len(rows)
    for (noisy, timesteps, out), conditioning in zip(calls, rows):
        with torch.no_grad():
            found = family.predict(family.denoiser, noisy, timesteps, conditioning)
        torch.testing.assert_close(found, sign * out, **TOLERANCE)
        assert family.learned_variance == (found.shape[1] == 2 * noisy.shape[1])


@pytest.mark.sample("pixart alpha")
def test_padding_is_masked(family):
    rows = family.encode_prompts(PROMPTS)
    mask = rows["prompt_attention_mask"]
    assert (mask.sum(1) < mask.shape[1]).all()
    latents = torch.randn(2, 4, 8, 8, generator=generators(0)[0])
    other = rows | {"prompt_embeds": torch.where(mask[..., None] == 1, rows["prompt_embeds"], 7.0)}
    unmasked = rows | {"prompt_attention_mask": torch.ones_like(mask)}
    timesteps = family.process.timesteps[torch.tensor([100, 800])]
    with torch.no_grad():
        found, same, differs = (family.predict(family.denoiser, latents, timesteps, c) for c in (rows, other, unmasked))
    torch.testing.assert_close(found, same, **TOLERANCE)
    assert not torch.allclose(found, differs, atol=1e-4)


@pytest.mark.sample("pixart sigma without variance")
def test_the_stock_pipeline_calls_the_model_with_timesteps_of_the_process(variant, family, pipe, side):
    """What a hand-over reads off a call is the noise level that the call is at."""
    calls, _ = recorded(pipe, side, 5, guidance_scale=1.0)
    process = family.training_process(side)
    found = [process.u_at(timesteps) for _, timesteps, _ in calls]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.75
    if process.prediction == "flow":
        expected = pipe.scheduler.sigmas[: len(found)].float()
        torch.testing.assert_close(torch.tensor(found), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("variant", ["pixart sigma", "pixart alpha"])
def test_noise_and_target_of_pixart_are_the_schedulers(family, pipe):
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=generators(0)[0])
    levels = torch.tensor([0, 250, 998, 999])
    expected = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(latents, noise, levels)
    torch.testing.assert_close(family.process.add_noise(latents, noise, levels), expected, **TOLERANCE)
    assert torch.equal(family.process.target(latents, noise, levels), noise)


@pytest.mark.parametrize("variant", FLOW)
def test_noise_and_target_of_flow_matching_are_the_schedulers(variant, family, pipe, side):
    """σ of the scheduler; a step of the stock scheduler along the target goes from the noisy latents to the clean."""
    config = pipe.scheduler.config
    shift = config.flow_shift if variant.startswith("sana") else config.shift
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    if variant == "lumina2 dynamic":  # the pipeline counts the channels of its latents as tokens
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (4 - config.base_image_seq_len)
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 1000, 1000), mu=mu)
    process = family.training_process(side)
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=generators(0)[0])
    levels = torch.tensor([0, 250, 700, 999])
    sigmas = scheduler.sigmas[999 - levels].view(-1, 1, 1, 1)
    noisy = process.add_noise(latents, noise, levels)
    torch.testing.assert_close(noisy, (1 - sigmas) * latents + sigmas * noise, **TOLERANCE)
    target = process.target(latents, noise, levels)
    torch.testing.assert_close(noisy - sigmas * target, latents, **TOLERANCE)
    told = process.timesteps[levels]
    if variant.startswith("lumina2"):
        torch.testing.assert_close(told, 1 - sigmas.flatten(), atol=1e-6, rtol=0)
    else:
        scale = pipe.transformer.config.timestep_scale
        torch.testing.assert_close(told, 1000 * scale * sigmas.flatten(), atol=1e-3, rtol=1e-5)


@pytest.mark.sample("pixart sigma without variance")
def test_the_sign_of_a_prediction_is_the_one_that_takes_noise_away(family, pipe, side):
    """A model that gives exactly what it should in the pipeline's own terms leads the stock pipeline to the picture."""
    process, sign = family.training_process(side), -1 if family.name == "lumina2" else 1
    factor = family.vae_scale_factor
    clean = torch.randn(1, 4, side // factor, side // factor, generator=generators(3)[0])
    steps, drawn = [], []

    def perfect(module, args, kwargs, out):
        noisy = (args[0] if args else kwargs["hidden_states"])[:1]
        level = process.levels_of(kwargs["timestep"][:1])
        alpha, sigma = (float(t[level]) for t in (process.alphas, process.sigmas))
        noise = (noisy - alpha * clean) / sigma
        steps.append(float(process.u[level]))
        target = process.target(clean, noise, level)
        extra = [torch.zeros_like(target)] * family.learned_variance
        return (torch.cat([sign * target, *extra], 1),)

    def catch(latents, **_):
        drawn.append(latents)
        return (torch.zeros(1, 3, side, side),)

    handle = pipe.transformer.register_forward_hook(perfect, with_kwargs=True)
    pipe.vae.decode = catch
    settings = {"height": side, "width": side, "guidance_scale": 1.0, "num_inference_steps": 20}
    pipe(["a"], generator=generators(0), output_type="pt", **settings, **exact(pipe))
    handle.remove()
    assert len(steps) == 20
    scaled = (drawn[0] - family.latent_shift) * pipe.vae.config.scaling_factor
    torch.testing.assert_close(scaled, clean, atol=0.1, rtol=0)  # what the last step of DDIM leaves


# --- sampling, identity ---------------------------------------------------------------------------------------------


@pytest.mark.sample("pixart alpha-True")
@pytest.mark.parametrize("offload", [False, True])
def test_a_sample_is_the_stock_pipelines_picture(family, pipe, side, offload):
    _, expected = recorded(pipe, side, 2, guidance_scale=3.0)
    family.offload = offload
    found = family.sample(PROMPTS, generators(0, 1), steps=2, guidance_scale=3.0, resolution=side)
    torch.testing.assert_close(family.decode(found) / 2 + 0.5, expected, **TOLERANCE)
    family.sample(PROMPTS, generators(0, 1), steps=1, guidance_scale=1.0, resolution=side)


@pytest.mark.sample("pixart sigma")
def test_a_sample_depends_on_its_own_prompt_and_generator_alone(family, side):
    settings = {"steps": 2, "guidance_scale": 3.0, "resolution": side}
    together = family.sample([PROMPTS[0], "", PROMPTS[1]], generators(1, 2, 3), **settings)
    for i, (prompt, seed) in enumerate(zip([PROMPTS[0], "", PROMPTS[1]], (1, 2, 3))):
        alone = family.sample([prompt], generators(seed), **settings)
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-4)
    other = family.sample([PROMPTS[1]], generators(1), **settings)
    assert not torch.allclose(other[0], together[0], atol=1e-4)


@pytest.mark.sample("pixart sigma")
def test_the_empty_prompt_is_what_guidance_pushes_away_from(family, side):
    """Then guidance has nothing to push, whatever instructions other prompts come with."""
    weak, strong = (
        family.sample([""], generators(1), steps=2, guidance_scale=scale, resolution=side) for scale in (1.0, 1.5)
    )
    torch.testing.assert_close(weak, strong, atol=1e-4, rtol=1e-4)


def test_latents_are_the_autoencoders_own(family, pipe, side):
    pixels = torch.rand(2, 3, side, side, generator=generators(0)[0]) * 2 - 1
    mean, std = family.encode_moments(pixels)
    encoded = pipe.vae.encode(pixels)
    if hasattr(encoded, "latent"):
        assert torch.equal(mean, encoded.latent)
        assert not std.any()
    else:
        assert torch.equal(mean, encoded.latent_dist.mean)
        assert torch.equal(std, encoded.latent_dist.std)
    expected = pipe.vae.decode(mean).sample.clamp(-1, 1)
    torch.testing.assert_close(family.decode(family.scale_latents(mean)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.sample("pixart sigma")
def test_a_loaded_model_is_the_saved_one(family, side, tmp_path):
    assert_loaded_it_is_the_saved_one(family, side, tmp_path)


@pytest.mark.sample("pixart sigma")
def test_embeddings_are_cached_with_their_masks_and_made_again_when_the_encoder_changes(family, tmp_path):
    assert_embeddings_are_cached(family, tmp_path)


def test_prompts_are_counted_with_what_the_pipeline_puts_before_them():
    assert family_of(tiny_pixart()).prompt_tokens("red") == (5, 300)  # ▁ r e d and the end
    assert family_of(tiny_pixart(alpha=True)).prompt_tokens("red") == (5, 120)
    assert family_of(tiny_sana()).prompt_tokens("red") == (4, 299)  # the start and r e d
    lumina = family_of(tiny_lumina2())
    assert lumina.prompt_tokens("red")[0] > lumina.prompt_tokens("")[0] > len(lumina.pipe.system_prompt)


# --- adapters that read timesteps -----------------------------------------------------------------------------------


@pytest.mark.wide
def test_the_pretrained_model_takes_over_below_u0(family, side):
    # the scheduler of Lumina 2 draws at high noise mostly
    assert_the_pretrained_model_takes_over(family, side, 0.8 if family.name == "lumina2" else 0.6)


@pytest.mark.sample("pixart sigma without variance")
def test_a_tlora_has_the_papers_rank_at_every_level(family):
    assert_a_tlora_has_the_papers_ranks(family, torch.randn(2, 4, 8, 8, generator=generators(0)[0]))


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.sample("sana")
@pytest.mark.parametrize("variant", ["pixart sigma", "pixart alpha", "sana", "lumina2"])
def test_other_variants_are_refused_by_name(variant, tmp_path):
    pipe = VARIANTS[variant]()
    pipe.transformer.register_to_config(in_channels=9)
    with pytest.raises(UserError, match=r"takes 9 channels \(a variant that fills in or edits pictures\)"):
        family_of(pipe)
    for name in ("text_encoder", "tokenizer"):
        pipe = VARIANTS[variant]()
        pipe.register_modules(**{name: None})
        with pytest.raises(UserError, match=f"has no {name}, which a {type(pipe).__name__} needs"):
            family_of(pipe)
        pipe.save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=f"has no {name}"):
            load_family(str(tmp_path / name))


def test_a_distilled_sana_is_refused_by_name():
    pipe = tiny_sana()
    pipe.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(UserError, match="distilled to few steps"):
        family_of(pipe)


@pytest.mark.parametrize("variant", ["pixart sigma", "sana", "lumina2"])
def test_an_adapter_that_does_not_fit_is_refused_before_training(family, variant):
    with pytest.raises(UserError, match=r"adapter.rank is 64, but \S+ is"):
        AdapterTuning(family, AdapterConfig(rank=64))
    with pytest.raises(UserError, match="targets names conv_in, which are no linear or convolution"):
        AdapterTuning(family, AdapterConfig(rank=2, targets="conv_in"))
    if variant != "sana":
        with pytest.raises(UserError, match=f"no ControlNet for a {type(family.pipe).__name__}"):
            family.need_controlnet()


def test_sizes_come_from_the_model():
    found = {n: (f.native_resolution, f.resolution_step) for n in VARIANTS for f in [family_of(VARIANTS[n]())]}
    assert found["pixart sigma"] == (16, 4)
    assert found["sana"] == (32, 32)
    assert found["lumina2"] == (64, 16)
