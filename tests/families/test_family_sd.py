"""The family does what the stock StableDiffusionPipeline does, piece by piece."""

import copy

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.data.images import to_images
from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_of, load_family
from difftuning_control.families.sd import StableDiffusion
from difftuning_control.recipe.adapter import AdapterConfig
from support.tiny_sd import tiny_pipeline

PROMPTS = ["red 1", "a blue square"]


@pytest.fixture(params=["epsilon", "v_prediction"])
def pipe(request):
    return tiny_pipeline(prediction_type=request.param)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(family: StableDiffusion, prompts: list[str], seeds: list[int], guidance_scale: float = 3.0) -> torch.Tensor:
    return family.sample(prompts, generators(*seeds), steps=3, guidance_scale=guidance_scale, resolution=16)


def test_predict_is_the_unet_call_of_the_stock_pipeline(family, pipe):
    calls = []
    hook = pipe.unet.register_forward_hook(lambda m, args, kw, out: calls.append((args, kw, out)), with_kwargs=True)
    pipe(PROMPTS, height=16, width=16, num_inference_steps=3, guidance_scale=2.0, generator=generators(0)[0])
    hook.remove()
    conditioning = family.encode_prompts(["", "", *PROMPTS])
    assert len(calls) == 3
    for (noisy_model_input, timestep), _, out in calls:
        with torch.no_grad():
            found = family.predict(pipe.unet, noisy_model_input, timestep.expand(4), conditioning)
        torch.testing.assert_close(found, out[0], atol=1e-5, rtol=1e-5)


def test_noise_and_target_are_the_schedulers(family, pipe):
    latents, noise = torch.randn(2, 6, 4, 8, 8, generator=generators(0)[0])
    levels = torch.tensor([0, 1, 250, 500, 998, 999])
    timesteps = family.process.timesteps[levels]
    noisy = family.process.add_noise(latents, noise, levels)
    training = DDPMScheduler.from_config(pipe.scheduler.config)
    torch.testing.assert_close(noisy, training.add_noise(latents, noise, timesteps), atol=1e-5, rtol=1e-5)
    velocity = pipe.scheduler.config.prediction_type == "v_prediction"
    expected = training.get_velocity(latents, noise, timesteps) if velocity else noise
    torch.testing.assert_close(family.process.target(latents, noise, levels), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.sample("v_prediction-1.0")
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_sample_depends_on_its_own_prompt_and_generator_alone(family, guidance_scale):
    together = sample(family, [*PROMPTS, "six"], [1, 2, 3], guidance_scale)
    torch.testing.assert_close(sample(family, PROMPTS[:1], [1], guidance_scale), together[:1], atol=1e-5, rtol=1e-5)
    mixed = sample(family, ["blue", PROMPTS[1]], [9, 2], guidance_scale)
    torch.testing.assert_close(mixed[1], together[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mixed[0], together[0], atol=1e-2)


@pytest.mark.sample("v_prediction-True")
@pytest.mark.parametrize("training", [True, False])
def test_sampling_leaves_the_model_as_it_was(family, training):
    family.denoiser.train(training)
    before = copy.deepcopy(family.denoiser.state_dict())
    latents = sample(family, PROMPTS, [0, 1])
    assert (latents.dtype, latents.requires_grad) == (torch.float32, False)
    assert family.denoiser.training is training
    torch.testing.assert_close(family.denoiser.state_dict(), before, atol=0, rtol=0)


def test_decoded_samples_are_the_pipelines_pictures(family, pipe):
    pixels = family.decode(sample(family, PROMPTS, [0, 1]))
    settings = {"height": 16, "width": 16, "num_inference_steps": 3, "guidance_scale": 3.0}
    expected = pipe(PROMPTS, **settings, generator=generators(0, 1), output_type="pt").images
    torch.testing.assert_close(pixels / 2 + 0.5, expected, atol=1e-5, rtol=1e-5)
    stock = pipe(PROMPTS, **settings, generator=generators(0, 1)).images
    assert [p.tobytes() for p in to_images(pixels)] == [p.tobytes() for p in stock]


def test_scaled_latents_decode_as_the_vae_decodes_its_own(family, pipe):
    latents = torch.randn(2, 4, 8, 8, generator=generators(0)[0])
    with torch.no_grad():
        expected = pipe.vae.decode(latents).sample.clamp(-1, 1)
    torch.testing.assert_close(family.decode(family.scale_latents(latents)), expected, atol=1e-5, rtol=1e-5)


def test_prompts_are_measured_with_their_end_marks(family):
    assert family.prompt_tokens("") == (2, 16)
    assert family.prompt_tokens("red") == (3, 16)
    assert family.prompt_tokens("x" * 40) == (42, 16)


def test_sizes_come_from_the_model(family):
    assert (family.native_resolution, family.resolution_step) == (16, 8)
    assert sample(family, ["red"], [0]).shape == (1, 4, 8, 8)
    assert family.encode_moments(torch.zeros(1, 3, 20, 12))[0].shape == (1, 4, 10, 6)


@pytest.mark.sample("v_prediction-unet")
@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_the_fingerprint_follows_every_components_weights(family, pipe, component):
    same = family_of(tiny_pipeline(prediction_type=pipe.scheduler.config.prediction_type))
    assert same.fingerprints == family.fingerprints
    list(getattr(pipe, component).parameters())[-1].data.view(-1)[0] += 1e-3
    changed = family_of(pipe).fingerprints
    name = "denoiser" if component == "unet" else component
    assert [k for k, v in family.fingerprints.items() if changed[k] != v] == [name]
    assert family_of(pipe).fingerprint != family.fingerprint


@pytest.mark.sample("epsilon")
def test_an_attached_adapter_does_not_change_the_bases_fingerprint(family, pipe):
    before = family.fingerprint
    AdapterTuning(family, AdapterConfig(rank=2))
    assert family_of(pipe).fingerprint == before


def test_a_loaded_model_is_the_saved_one(family, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = load_family(str(tmp_path))
    assert loaded.fingerprints == family.fingerprints
    assert loaded.sampler_settings() == family.sampler_settings()
    torch.testing.assert_close(sample(loaded, PROMPTS, [0, 1]), sample(family, PROMPTS, [0, 1]), atol=0, rtol=0)


def test_other_pipelines_are_refused(pipe):
    class Other:
        pass

    assert isinstance(pipe, StableDiffusionPipeline)
    with pytest.raises(UserError, match="a Other cannot be tuned yet"):
        family_of(Other())
