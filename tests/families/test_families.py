"""Every family does what its stock pipeline does, piece by piece, and nothing else knows which family it is."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.data.embeddings import cached_embeddings
from difftuning_control.errors import UserError
from difftuning_control.families.control import to_tensor
from difftuning_control.families.loading import FAMILIES, family_of, load_family
from difftuning_control.families.packed import image_ids, pack, unpack
from difftuning_control.objective.noise import NoiseProcess
from difftuning_control.pipelines.guidance import hand_over
from difftuning_control.recipe.adapter import AdapterConfig
from support.drawing import PROMPTS, TOLERANCE, generators
from support.tensors import in_memory
from support.tiny_models import tiny_flux, tiny_sd3, tiny_sdxl

VARIANTS = {
    "sdxl": tiny_sdxl,
    "sdxl v": lambda **k: tiny_sdxl(prediction_type="v_prediction", **k),
    "sd3": tiny_sd3,
    "sd3 without t5": lambda **k: tiny_sd3(t5=False, **k),
    "flux dev": tiny_flux,
    "flux schnell": lambda **k: tiny_flux(dev=False, **k),
}
FLOW = [name for name in VARIANTS if not name.startswith("sdxl")]


def conditions(seed: int = 0, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), generator=generators(seed)[0], dtype=torch.uint8)


def with_controlnet(pipe):
    """The family with a ControlNet that adds something."""
    family = family_of(pipe)
    family.controlnet = family.new_controlnet(0)
    torch.manual_seed(3)
    for name, parameter in family.controlnet.named_parameters():
        if name.startswith(family.controlnet_whole):
            parameter.data = torch.randn(parameter.shape) * 0.1
    return family


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture
def pipe(variant):
    return VARIANTS[variant]()


@pytest.fixture
def family(pipe):
    return family_of(pipe)


class Recorded:
    """What a denoiser was given and gave, in the terms of `predict`, while a real pipeline called it."""

    def __init__(self, family):
        self.family, self.calls = family, []
        self.handle = family.denoiser.register_forward_hook(self.keep, with_kwargs=True)

    def __enter__(self):
        return self.calls

    def __exit__(self, *_):
        self.handle.remove()

    def keep(self, module, args, kwargs, out):
        if self.family.component == "unet":
            noisy, timestep = args
        else:
            noisy, timestep = kwargs["hidden_states"], kwargs["timestep"]
        if self.family.name == "flux":
            noisy, out = unpack(noisy, 8, 8), (unpack(out[0], 8, 8),)
        self.calls.append((noisy, timestep.expand(len(noisy)), out[0]))


def conditioning_of(family, calls, guidance_scale: float) -> dict[str, torch.Tensor]:
    """Of the rows of a recorded call: those under guidance come after as many with the empty prompt."""
    rows = len(calls[0][0])
    found = family.encode_prompts([""] * (rows - 2) + PROMPTS)
    return found | ({"guidance": torch.full((rows,), guidance_scale)} if family.name == "flux" else {})


# --- predict, noise, target -----------------------------------------------------------------------------------------


@pytest.mark.sample("sd3")
def test_predict_is_the_denoisers_call_in_the_stock_pipeline(family, pipe):
    with Recorded(family) as calls:
        pipe(PROMPTS, height=16, width=16, num_inference_steps=3, guidance_scale=3.0, generator=generators(0, 1))
    assert len(calls) == 3
    assert len(calls[0][0]) == (2 if family.name == "flux" else 4)
    conditioning = conditioning_of(family, calls, 3.0)
    for noisy, timesteps, out in calls:
        with torch.no_grad():
            found = family.predict(family.denoiser, noisy, timesteps, conditioning)
        torch.testing.assert_close(found, out, **TOLERANCE)


@pytest.mark.sample("flux dev")
def test_predict_with_a_controlnet_is_the_call_in_the_stock_controlnet_pipeline(variant):
    family = with_controlnet(VARIANTS[variant](sharp=True))
    control = conditions()
    picture = {family.control_argument: to_tensor(control, family.condition_range)}
    size = {"height": 16, "width": 16}
    with Recorded(family) as calls:
        family.control_pipeline()(
            PROMPTS, **size, num_inference_steps=2, guidance_scale=3.0, generator=generators(0, 1), **picture
        )
    conditioning = conditioning_of(family, calls, 3.0)
    rows = conditioning | {"control": control.repeat(len(calls[0][0]) // 2, 1, 1, 1)}
    for noisy, timesteps, out in calls:
        with torch.no_grad():
            found = family.predict(family.model, noisy, timesteps, rows)
            alone = family.predict(family.model, noisy, timesteps, conditioning)
        torch.testing.assert_close(found, out, **TOLERANCE)
        assert not torch.allclose(alone, out, atol=1e-3)


@pytest.mark.sample("sd3 without t5")
def test_stock_pipelines_call_models_with_timesteps_of_the_process(family, pipe):
    """What a hand-over reads off a call is the noise level that the call is at."""
    with Recorded(family) as calls:
        pipe(PROMPTS, height=16, width=16, num_inference_steps=5, generator=generators(0, 1))
    process = family.training_process(16)
    found = [float(process.u[process.levels_of(timesteps[:1])]) for _, timesteps, _ in calls]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.75
    if process.prediction == "flow":
        torch.testing.assert_close(torch.tensor(found), pipe.scheduler.sigmas[:-1], atol=2e-3, rtol=0)


@pytest.mark.parametrize("variant", ["sdxl", "sdxl v"])
def test_noise_and_target_of_sdxl_are_the_schedulers(family, pipe):
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=generators(0)[0])
    levels = torch.tensor([0, 250, 998, 999])
    training = DDPMScheduler.from_config(pipe.scheduler.config)
    expected = training.add_noise(latents, noise, levels)
    torch.testing.assert_close(family.process.add_noise(latents, noise, levels), expected, **TOLERANCE)
    target = training.get_velocity(latents, noise, levels) if family.process.prediction == "v_prediction" else noise
    torch.testing.assert_close(family.process.target(latents, noise, levels), target, **TOLERANCE)


@pytest.mark.parametrize("variant", FLOW)
def test_noise_and_target_of_flow_matching_are_the_official_training_formula(family, pipe):
    """diffusers' own scripts for SD3 and FLUX: (1 − σ) x + σ ε and ε − x, with σ and t looked up in the scheduler."""
    scheduler, count = pipe.scheduler, 1000
    if scheduler.config.use_dynamic_shifting:  # 16 tokens at 16 pixels
        config = scheduler.config
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (16 - config.base_image_seq_len)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / count, count), mu=mu)
    process = family.training_process(16)
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=generators(0)[0])
    levels = torch.tensor([0, 250, 700, 999])
    indices = count - 1 - levels  # the scheduler's go from noise to clean
    sigmas, timesteps = scheduler.sigmas[indices].view(-1, 1, 1, 1), scheduler.timesteps[indices]
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    torch.testing.assert_close(process.add_noise(latents, noise, levels), noisy, **TOLERANCE)
    torch.testing.assert_close(process.target(latents, noise, levels), noise - latents, atol=0, rtol=0)
    told = timesteps / 1000 if family.name == "flux" else timesteps
    torch.testing.assert_close(process.timesteps[levels], told, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("variant", FLOW)
def test_levels_of_flow_matching_are_drawn_as_the_official_scripts_draw_them(family):
    draws, count = 200_000, len(family.process)
    u = compute_density_for_timestep_sampling("logit_normal", draws, 0.0, 1.0, generator=generators(5)[0])
    levels = count - 1 - (u * count).long()
    found = torch.histc(levels.float(), bins=20, min=0, max=count) / draws
    expected = family.training_process(16).base_density.view(20, -1).sum(1).float()
    error = (expected * (1 - expected) / draws).sqrt()
    assert ((found - expected).abs() < 5 * error + 1e-6).all()


def test_larger_pictures_are_trained_at_more_noise_only_where_the_scheduler_shifts_by_size():
    moving = family_of(tiny_flux())
    small, large = (moving.training_process(side).sigmas for side in (16, 256))
    assert (large[:-1] > small[:-1]).all()
    assert moving.training_process(256).base_density is moving.process.base_density
    for still in (tiny_flux(dev=False), tiny_sd3()):
        family = family_of(still)
        assert family.training_process(256) is family.process
    with pytest.raises(ValueError, match="no timestep shift"):
        family_of(tiny_sdxl()).process.shifted(2.0)


# --- what is peculiar to one family ---------------------------------------------------------------------------------


def test_packing_and_ids_of_flux_are_the_stock_pipelines():
    pipe = tiny_flux()
    latents = torch.randn(3, 4, 6, 10)
    packed = pack(latents)
    assert torch.equal(packed, pipe._pack_latents(latents, 3, 4, 6, 10))
    assert torch.equal(unpack(packed, 6, 10), latents)
    assert torch.equal(unpack(packed, 6, 10), pipe._unpack_latents(packed, 12, 20, 2))
    ids = pipe._prepare_latent_image_ids(3, 3, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids(6, 10, torch.device("cpu")).float(), ids)


@pytest.mark.wide
def test_the_guidance_that_flux_dev_is_told_matters_and_schnell_is_told_none():
    for dev in (True, False):
        family = family_of(tiny_flux(dev=dev))
        rows = family.encode_prompts(PROMPTS)
        latents, timesteps = torch.randn(2, 4, 8, 8, generator=generators(0)[0]), torch.tensor([0.3, 0.9])
        with torch.no_grad():
            plain, one, other = (
                family.predict(family.denoiser, latents, timesteps, rows | more)
                for more in ({}, {"guidance": torch.ones(2)}, {"guidance": torch.full((2,), 4.0)})
            )
        assert torch.equal(plain, one)
        assert torch.equal(plain, other) != dev


def test_sizes_that_sdxl_is_told_are_the_stock_pipelines_time_ids():
    pipe = tiny_sdxl()
    family = family_of(pipe)
    told = {"original_size": (40, 24), "crops_coords_top_left": (6, 2), "target_size": (16, 16)}
    with Recorded(family) as calls:
        pipe("red 1", height=16, width=16, num_inference_steps=1, guidance_scale=1.0, **told)
    ((noisy, timesteps, out),) = calls
    rows = family.encode_prompts(["red 1"])
    with torch.no_grad():
        found = family.predict(
            family.denoiser, noisy, timesteps, rows | {"sizes": torch.tensor([[40, 24, 6, 2, 16, 16]])}
        )
        plain, whole = (
            family.predict(family.denoiser, noisy, timesteps, rows | more)
            for more in ({}, {"sizes": torch.tensor([[16, 16, 0, 0, 16, 16]])})
        )
    torch.testing.assert_close(found, out, **TOLERANCE)
    assert torch.equal(plain, whole)
    assert not torch.allclose(plain, out, atol=1e-4)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_prompt_of_sdxl_is_what_guidance_pushes_away_from(zeros):
    pipe = tiny_sdxl()
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    found = family_of(pipe).encode_prompts(["", "red", ""])
    _, negative, _, pooled = pipe.encode_prompt(["red"], do_classifier_free_guidance=True)
    for row in (0, 2):
        torch.testing.assert_close(found["prompt_embeds"][row], negative[0], **TOLERANCE)
        torch.testing.assert_close(found["pooled_prompt_embeds"][row], pooled[0], **TOLERANCE)
    assert found["prompt_embeds"][1].any()
    assert bool(found["prompt_embeds"][0].any()) != zeros


def test_without_t5_its_tokens_are_zeros_and_clip_counts_the_words():
    family = family_of(tiny_sd3(t5=False))
    embeds = family.encode_prompts(PROMPTS)["prompt_embeds"]
    assert embeds[:, :16].any()
    assert not embeds[:, 16:].any()
    assert family.prompt_tokens("red") == (3, 16)
    assert family_of(tiny_sd3()).prompt_tokens("red") == (5, 256)  # ▁ r e d and the end
    assert family_of(tiny_flux()).prompt_tokens("red") == (5, 512)


def test_the_autoencoder_of_sdxl_is_in_float32_while_it_is_used_and_in_float16_else():
    pipe = tiny_sdxl()
    pipe.vae.half()
    family = family_of(pipe)
    before = family.fingerprints["vae"]
    mean, _ = family.encode_moments(torch.full((1, 3, 16, 16), 0.5))
    pixels = family.decode(torch.ones(1, 4, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):  # as grids are drawn while a run trains
        assert torch.equal(family.decode(torch.ones(1, 4, 8, 8)), pixels)
    assert pipe.vae.dtype == torch.float16
    assert family_of(pipe).fingerprints["vae"] == before
    exact = family_of(tiny_sdxl())
    exact.pipe.vae.load_state_dict(pipe.vae.state_dict())
    torch.testing.assert_close(mean, exact.encode_moments(torch.full((1, 3, 16, 16), 0.5))[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pixels, exact.decode(torch.ones(1, 4, 8, 8)), atol=1e-5, rtol=1e-5)


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.sample("sdxl")
def test_a_sample_is_the_stock_pipelines_picture(family, pipe):
    found = family.sample(PROMPTS, generators(0, 1), steps=3, guidance_scale=3.0, resolution=16)
    assert (found.shape, found.dtype) == ((2, 4, 8, 8), torch.float32)
    settings = {"height": 16, "width": 16, "num_inference_steps": 3, "guidance_scale": 3.0}
    expected = pipe(PROMPTS, **settings, generator=generators(0, 1), output_type="pt").images
    torch.testing.assert_close(family.decode(found) / 2 + 0.5, expected, **TOLERANCE)


@pytest.mark.sample("sd3 without t5")
def test_a_sample_under_a_condition_is_the_stock_controlnet_pipelines_picture(variant):
    family = with_controlnet(VARIANTS[variant](sharp=True))
    control = conditions()
    found = family.sample(PROMPTS, generators(0, 1), steps=3, guidance_scale=3.0, resolution=16, control=control)
    settings = {"height": 16, "width": 16, "num_inference_steps": 3, "guidance_scale": 3.0}
    picture = {family.control_argument: to_tensor(control, family.condition_range)}
    expected = family.control_pipeline()(PROMPTS, **settings, generator=generators(0, 1), output_type="pt", **picture)
    torch.testing.assert_close(family.decode(found) / 2 + 0.5, expected.images, **TOLERANCE)


@pytest.mark.wide
def test_a_sample_depends_on_its_own_prompt_generator_and_condition_alone(variant):
    family = with_controlnet(VARIANTS[variant]())

    def sample(prompts, seeds, control):
        return family.sample(prompts, generators(*seeds), steps=2, guidance_scale=3.0, resolution=16, control=control)

    control = conditions()
    together = sample(PROMPTS, (1, 2), control)
    alone = sample(PROMPTS[1:], (2,), control[1:])
    torch.testing.assert_close(alone[0], together[1], atol=1e-5, rtol=1e-4)
    other = sample(["six", PROMPTS[1]], (7, 2), conditions(9)[:1].expand(2, -1, -1, -1))
    assert not torch.allclose(other[0], together[0], atol=1e-2)
    assert not torch.allclose(sample(PROMPTS, (1, 2), conditions(9))[0], together[0], atol=1e-3)


@pytest.mark.sample("sdxl v", "sd3 without t5", "flux schnell")
def test_sampling_leaves_the_model_as_it_was(variant):
    family = with_controlnet(VARIANTS[variant]())
    family.denoiser.train()
    weights = copy.deepcopy(family.denoiser.state_dict())
    configs = [dict(part.config) for part in (family.denoiser, family.pipe.scheduler)]
    family.sample(PROMPTS, generators(0, 1), steps=2, guidance_scale=3.0, resolution=16, control=conditions())
    assert family.denoiser.training
    torch.testing.assert_close(family.denoiser.state_dict(), weights, atol=0, rtol=0)
    assert [dict(part.config) for part in (family.denoiser, family.pipe.scheduler)] == configs
    assert family.pipe.vae.encode.__func__ is type(family.pipe.vae).encode
    torch.testing.assert_close(NoiseProcess.from_scheduler(family.pipe.scheduler).sigmas, family.process.sigmas)


@pytest.mark.wide
def test_the_pretrained_model_takes_over_below_u0(family, pipe):
    def sample(model):
        return model.sample(PROMPTS, generators(0, 1), steps=4, guidance_scale=3.0, resolution=16)

    base = sample(family)
    tuning = AdapterTuning(family, AdapterConfig(rank=2))
    for name, parameter in tuning.parameters().items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generators(1)[0])
    tuned = sample(family)
    assert not torch.allclose(base, tuned, atol=1e-2)
    with hand_over(family, 0.0):
        torch.testing.assert_close(sample(family), tuned, atol=0, rtol=0)
    with hand_over(family, 1.0):
        torch.testing.assert_close(sample(family), base, **TOLERANCE)
    with hand_over(family, 0.6):
        between = sample(family)
    assert not torch.allclose(between, base, atol=1e-3)
    assert not torch.allclose(between, tuned, atol=1e-3)


# --- ControlNets ----------------------------------------------------------------------------------------------------


@pytest.mark.sample("sdxl v", "flux dev", "sd3 without t5")
def test_a_new_controlnet_copies_the_denoiser_adds_exactly_nothing_and_changes_no_configuration(family):
    config = dict(family.denoiser.config)
    random = torch.get_rng_state()
    found = family.controlnet = family.new_controlnet(1)
    assert torch.equal(torch.get_rng_state(), random)
    assert dict(family.denoiser.config) == config
    family.check_controlnet(found, "of its own")
    weights, its = family.denoiser.state_dict(), found.state_dict()
    shared = [n for n in its if n in weights and its[n].shape == weights[n].shape]
    assert len(shared) > len(its) / 2
    assert all(torch.equal(its[n], weights[n]) for n in shared)
    fresh = {n for n in its if n not in shared}
    assert all(n.startswith(family.controlnet_whole) for n in fresh)
    rows, latents = family.encode_prompts(PROMPTS), torch.randn(2, 4, 8, 8, generator=generators(0)[0])
    timesteps = family.process.timesteps[torch.tensor([100, 800])]
    with torch.no_grad():
        alone = family.predict(family.denoiser, latents, timesteps, rows)
        beside = family.predict(family.model, latents, timesteps, rows | {"control": conditions()})
    assert torch.equal(alone, beside)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux dev"])
def test_a_controlnet_of_another_model_is_refused_with_what_differs(name):
    family = family_of(VARIANTS[name]())
    key = "cross_attention_dim" if name == "sdxl" else "num_attention_heads"
    other = family.new_controlnet(0)
    other.register_to_config(**{key: 7})
    with pytest.raises(UserError, match=f"does not fit this model: its {key} is 7"):
        family.check_controlnet(other, "there")


def test_controlnets_with_other_inputs_are_refused_by_what_they_take():
    family = family_of(tiny_sd3())
    for settings, words in (
        ({"extra_conditioning_channels": 1}, "takes 1 channels beside the condition's"),
        ({"use_pos_embed": False}, "borrows the transformer's position embedding"),
    ):
        other = family.new_controlnet(0)
        other.register_to_config(**settings)
        with pytest.raises(UserError, match=words):
            family.check_controlnet(other, "there")
    family = family_of(tiny_flux())
    for own, words in (({"num_mode": 3}, "several kinds"), ({"conditioning_embedding_channels": 16}, "hint block")):
        other = family.copied_controlnet({"num_layers": 1, "num_single_layers": 1, **own}, ())
        with pytest.raises(UserError, match=words):
            family.check_controlnet(other, "there")


# --- identity, saving, loading --------------------------------------------------------------------------------------


@pytest.mark.sample("flux schnell")
def test_the_fingerprint_follows_every_components_weights_and_no_other(variant):
    same, family = (family_of(VARIANTS[variant]()) for _ in range(2))
    assert same.fingerprints == family.fingerprints
    for name, module in family.modules.items():
        parameter = list(module.parameters())[-1].data.view(-1)
        parameter[0] += 1e-3
        changed = family_of(family.pipe)
        assert [k for k, v in same.fingerprints.items() if changed.fingerprints[k] != v] == [name]
        encoder = name not in ("denoiser", "vae")
        assert (changed.conditioning_fingerprint != same.conditioning_fingerprint) == encoder
        parameter[0] -= 1e-3
        module.load_state_dict(same.modules[name].state_dict())


@pytest.mark.sample("sd3 without t5")
def test_embeddings_are_cached_whole_and_made_again_when_an_encoder_changes(family, tmp_path):
    def embeddings():
        advanced = []
        found = cached_embeddings(family_of(family.pipe), PROMPTS, tmp_path, advanced.append)
        return found, len(list(tmp_path.iterdir()))

    first, files = embeddings()
    assert files == 1
    expected = family.encode_prompts(["", *PROMPTS])
    torch.testing.assert_close(in_memory(first), expected, **TOLERANCE)
    second, files = embeddings()
    assert files == 1
    torch.testing.assert_close(in_memory(second), in_memory(first), atol=0, rtol=0)
    encoders = [n for n in family.modules if n.startswith("text_encoder")]
    for count, name in enumerate(encoders, 2):
        next(family.modules[name].parameters()).data.add_(0.1)
        assert embeddings()[1] == count
    next(family.denoiser.parameters()).data.add_(0.1)
    assert embeddings()[1] == 1 + len(encoders)


@pytest.mark.sample("sd3")
def test_a_loaded_model_is_the_saved_one(family, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = load_family(str(tmp_path))
    assert loaded.fingerprints == family.fingerprints
    assert loaded.sampler_settings() == family.sampler_settings()
    settings = {"steps": 2, "guidance_scale": 3.0, "resolution": 16}
    expected = family.sample(PROMPTS, generators(0, 1), **settings)
    torch.testing.assert_close(loaded.sample(PROMPTS, generators(0, 1), **settings), expected, atol=0, rtol=0)


def test_sizes_come_from_the_model():
    found = {name: (f.native_resolution, f.resolution_step) for name in VARIANTS for f in [family_of(VARIANTS[name]())]}
    assert found["sdxl"] == (16, 8)
    assert found["sd3"] == (16, 4)
    assert found["flux dev"] == (256, 4)
    family_of(tiny_sd3()).check_resolution(32, "data.resolution")
    with pytest.raises(UserError, match="resolution is 18; this model takes multiples of 4"):
        family_of(tiny_sd3()).check_resolution(18, "data.resolution")
    with pytest.raises(UserError, match="resolution is 48; this model has positions for at most 32"):
        family_of(tiny_sd3()).check_resolution(48, "data.resolution")


# --- refusals -------------------------------------------------------------------------------------------------------


def test_variants_that_take_other_inputs_are_refused_by_name():
    pipe = tiny_sdxl()
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(UserError, match=r"takes 9 channels \(an inpainting model\), the autoencoder gives 4"):
        family_of(pipe)
    for make, channels in ((tiny_sd3, 8), (tiny_flux, 32)):
        pipe = make()
        pipe.transformer.register_to_config(in_channels=channels)
        with pytest.raises(UserError, match=r"takes 8 channels \(a variant that fills in or edits pictures\)"):
            family_of(pipe)
    pipe = tiny_sdxl()
    pipe.text_encoder = None
    with pytest.raises(UserError, match="is an SDXL refiner"):
        family_of(pipe)


@pytest.mark.sample("flux dev-text_encoder_2")
@pytest.mark.parametrize(
    ("variant", "missing"), [("sdxl", "text_encoder_2"), ("sd3", "text_encoder"), ("flux dev", "text_encoder_2")]
)
def test_a_model_without_an_encoder_that_it_needs_is_refused(pipe, missing, tmp_path):
    setattr(pipe, missing, None)
    with pytest.raises(UserError, match=f"has no {missing}, which a {type(pipe).__name__} needs"):
        family_of(pipe)
    pipe.register_modules(**{missing: None})
    pipe.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"has no {missing}"):
        load_family(str(tmp_path))


def test_a_pipeline_that_is_not_known_is_refused_with_those_that_are(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLImg2ImgPipeline"}')
    with pytest.raises(UserError, match=f"is a StableDiffusionXLImg2ImgPipeline.*{', '.join(FAMILIES)}"):
        load_family(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="does not say which pipeline it is"):
        load_family(str(tmp_path))


def test_a_gated_model_is_told_with_what_to_do(monkeypatch):
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import GatedRepoError

    def gated(*_, **__):
        error = GatedRepoError.__new__(GatedRepoError)
        raise OSError("You are trying to access a gated repo.") from error

    monkeypatch.setattr(DiffusionPipeline, "load_config", gated)
    with pytest.raises(UserError, match=r"is gated: accept its licence at https://\S+/maker/model, and log in"):
        load_family("maker/model")


def test_a_family_is_one_file_and_one_line():
    """No module but the families' own names a family."""
    from pathlib import Path

    import difftuning_control

    root = Path(difftuning_control.__file__).parent
    words = ("StableDiffusion", "Flux", "prompt_embeds[", '"prompt_embeds"', "pooled_p", "families.sd", "families.flux")
    # the names of drop-ins and of other tools' models, a hint for users, the objective's example, and the benchmarks'
    # models
    named = {
        "__init__.py",
        "discovery.py",
        "system/untrusted.py",
        "adapters/native_names.py",
        "verbs/export/lora_formats.py",
        "objective/difftuning.py",
        "verbs/bench/inputs.py",
        "verbs/bench/models.py",
    }
    folders = ("families", "pipelines")
    places = {p.relative_to(root).as_posix(): p for p in root.rglob("*.py") if p.parent.name not in folders}
    others = [p for name, p in places.items() if name not in named]
    assert len(others) > 30
    found = {p.name: [w for w in words if w in p.read_text(encoding="utf-8")] for p in others}
    assert {name: words for name, words in found.items() if words} == {}
