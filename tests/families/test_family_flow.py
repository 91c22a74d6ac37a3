"""The families of 2025 and 2026 do what their stock pipelines do, piece by piece."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.data.prepare import check_captions
from difftuning_control.data.sources import load_images
from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_of, load_family
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.inputs import DataConfig
from difftuning_control.recipe.recipe import Recipe
from support.drawing import PROMPTS, TOLERANCE, generators
from support.family_checks import (
    assert_a_tlora_has_the_papers_ranks,
    assert_embeddings_are_cached,
    assert_loaded_it_is_the_saved_one,
    assert_the_pretrained_model_takes_over,
)
from support.flow_families import STOCK, need, recorded, shorten
from support.pictures import write_pictures
from support.tiny_flow import (
    tiny_chroma,
    tiny_flux2,
    tiny_flux2_klein,
    tiny_ideogram4,
    tiny_krea2,
    tiny_qwen_image,
    tiny_qwen_image21,
    tiny_z_image,
)

VARIANTS = {
    "z_image": tiny_z_image,
    "z_image dynamic": lambda: tiny_z_image(dynamic=True),
    "qwen_image": tiny_qwen_image,
    "qwen_image21": tiny_qwen_image21,
    "flux2_klein": tiny_flux2_klein,
    "flux2_klein distilled": lambda: tiny_flux2_klein(distilled=True),
    "flux2": tiny_flux2,
    "krea2": tiny_krea2,
    "krea2 distilled": lambda: tiny_krea2(distilled=True),
    "chroma": tiny_chroma,
    "ideogram4": tiny_ideogram4,
}
REVERSED = ("z_image", "ideogram4")  # told 1 − σ
ONE_EACH = [name for name in VARIANTS if name in STOCK]


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch):
    shorten(monkeypatch)


@pytest.fixture(params=VARIANTS)
def variant(request):
    need(request.param.split()[0])
    return request.param


@pytest.fixture
def stock(variant):
    return STOCK[variant.split()[0]]


@pytest.fixture
def pipe(variant):
    return VARIANTS[variant]()


@pytest.fixture
def family(pipe):
    return family_of(pipe)


def noisy_rows(family, stock, count: int = 2) -> torch.Tensor:
    side = stock.side // family.vae_scale_factor
    return torch.randn(count, family.latent_channels, side, side, generator=generators(0)[0])


# --- predict, noise, target -----------------------------------------------------------------------------------------


@pytest.mark.sample(*ONE_EACH)
def test_predict_is_the_transformers_call_in_the_stock_pipeline(variant, family, stock, pipe):
    calls, _ = recorded(stock, pipe, 2, 3.0)
    told, empty = family.encode_prompts(PROMPTS), family.encode_prompts(["", ""])
    together = {name: torch.cat([told[name], empty[name]]) for name in told}
    rows = [told, empty] * 2 if stock.apart else [together] * 2
    if stock.embedded:
        rows = [told | {"guidance": torch.full((2,), 3.0)}] * 2
    if variant == "flux2_klein distilled" or stock.beside:
        rows = [told] * 2
    assert len(calls) == len(rows)
    for (noisy, timesteps, out), conditioning in zip(calls, rows):
        with torch.no_grad():
            found = family.predict(family.denoiser, noisy, timesteps, conditioning)
        torch.testing.assert_close(found, out, **TOLERANCE)
    assert out.std() > 0.01


@pytest.mark.sample("z_image", "qwen_image")
def test_a_row_is_its_own_prompts_whatever_stands_beside_it_or_after_its_end(family, stock):
    rows = family.encode_prompts([PROMPTS[0], PROMPTS[1]])
    latents, timesteps = noisy_rows(family, stock), family.process.timesteps[torch.tensor([100, 800])]
    with torch.no_grad():
        found = family.predict(family.denoiser, latents, timesteps, rows)
        alone = family.predict(family.denoiser, latents[1:], timesteps[1:], {n: t[1:] for n, t in rows.items()})
        swapped = family.predict(family.denoiser, latents, timesteps, {n: t.flip(0) for n, t in rows.items()})
    torch.testing.assert_close(found[1:], alone, **TOLERANCE)
    assert not torch.allclose(found, swapped, atol=1e-4)
    if "prompt_attention_mask" in rows and not rows["prompt_attention_mask"].is_floating_point():
        mask = rows["prompt_attention_mask"]
        assert (mask.sum(1) < mask.shape[1]).all()
        embeds = rows["prompt_embeds"]
        read = mask.view(*mask.shape, *[1] * (embeds.ndim - 2)) == 1
        other = rows | {"prompt_embeds": torch.where(read, embeds, 7.0)}
        with torch.no_grad():
            torch.testing.assert_close(family.predict(family.denoiser, latents, timesteps, other), found, **TOLERANCE)


@pytest.mark.sample("z_image*", "flux2_klein")
def test_the_stock_pipeline_calls_the_model_with_timesteps_of_the_process(family, stock, pipe):
    """What a hand-over reads off a call is the noise level that the call is at."""
    calls, _ = recorded(stock, pipe, 5, 1.0)
    process = family.training_process(stock.side)
    found = [process.u_at(timesteps) for _, timesteps, _ in calls]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.75
    nearest = float(process.u.diff().max()) / 2 + 2e-4
    torch.testing.assert_close(torch.tensor(found), pipe.scheduler.sigmas[: len(found)].float(), atol=nearest, rtol=0)


def test_noise_and_target_are_the_schedulers(variant, family, stock, pipe):
    """σ of the scheduler; a step of the stock scheduler along the target goes from the noisy latents to the clean."""
    config = pipe.scheduler.config
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    if config.use_dynamic_shifting:
        scheduler.register_to_config(shift_terminal=None)  # which is where sampling ends
        tokens = 16 if variant == "qwen_image21" else (stock.side // family.resolution_step) ** 2  # 4 × 4 latents
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
        if variant.startswith("flux2"):  # 16 tokens, 50 steps, by the formula of its authors
            mu = (1.0 - 40 / 190) * (8.73809524e-05 * 16 + 1.89833333) + 40 / 190 * (0.00016927 * 16 + 0.45666666)
        mu = 1.15 if variant == "krea2 distilled" else mu
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 1000, 1000), mu=mu)
    if variant == "ideogram4":  # whose pipeline shifts its own levels, by half the log of pixels over 512 × 512
        scheduler.sigmas = torch.sigmoid(torch.logit(scheduler.sigmas) + math.log(stock.side**2 / 512**2) / 2)
    process = family.training_process(stock.side)
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=generators(0)[0])
    levels = torch.tensor([0, 250, 700, 999])
    sigmas = scheduler.sigmas[999 - levels].view(-1, 1, 1, 1)
    noisy = process.add_noise(latents, noise, levels)
    torch.testing.assert_close(noisy, (1 - sigmas) * latents + sigmas * noise, **TOLERANCE)
    torch.testing.assert_close(noisy - sigmas * process.target(latents, noise, levels), latents, **TOLERANCE)
    told = 1 - sigmas if variant.startswith(REVERSED) else sigmas
    torch.testing.assert_close(process.timesteps[levels], told.flatten(), atol=1e-6, rtol=1e-5)


@pytest.mark.sample("z_image", "qwen_image", "flux2_klein")
def test_a_model_that_gives_what_it_should_leads_the_stock_pipeline_to_the_picture(family, stock, pipe):
    """The sign of a prediction, and the way from latents to pixels."""
    process, side = family.training_process(stock.side), stock.side // family.vae_scale_factor
    clean = torch.randn(1, family.latent_channels, side, side, generator=generators(3)[0])
    taken = []

    def perfect(module, args, kwargs, out):
        noisy, timesteps, _ = stock.read(args, kwargs, out)
        level = process.levels_of(timesteps[:1])
        noise = (noisy - (1 - process.sigmas[level]) * clean) / process.sigmas[level]
        taken.append(level)
        return (stock.write(process.target(clean, noise, level)),)

    pipe.transformer.register_forward_hook(perfect, with_kwargs=True)
    _, picture = recorded(stock, pipe, 20, 1.0, prompts=["a"])
    assert len(taken) == 20
    torch.testing.assert_close(picture * 2 - 1, family.decode(clean), atol=0.02, rtol=0)


# --- sampling, identity ---------------------------------------------------------------------------------------------


@pytest.mark.sample("z_image-*", "qwen_image-True", "flux2_klein-False", "krea2-True")
@pytest.mark.parametrize("offload", [False, True])
def test_a_sample_is_the_stock_pipelines_picture(family, stock, pipe, offload):
    prompts = list(PROMPTS)
    _, expected = recorded(stock, pipe, 2, 3.0)
    family.offload = offload
    found = family.sample(prompts, generators(0, 1), steps=2, guidance_scale=3.0, resolution=stock.side)
    torch.testing.assert_close(family.decode(found) / 2 + 0.5, expected, **TOLERANCE)
    assert prompts == PROMPTS
    plain = family.sample(prompts, generators(0, 1), steps=2, guidance_scale=1.0, resolution=stock.side)
    _, expected = recorded(stock, pipe, 2, 1.0)
    torch.testing.assert_close(family.decode(plain) / 2 + 0.5, expected, **TOLERANCE)


@pytest.mark.sample("z_image")
def test_a_sample_depends_on_its_own_prompt_and_generator_alone(family, stock):
    settings = {"steps": 2, "guidance_scale": 3.0, "resolution": stock.side}
    together = family.sample([PROMPTS[0], "", PROMPTS[1]], generators(1, 2, 3), **settings)
    for i, (prompt, seed) in enumerate(zip([PROMPTS[0], "", PROMPTS[1]], (1, 2, 3))):
        alone = family.sample([prompt], generators(seed), **settings)
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-4)
    other = family.sample([PROMPTS[1]], generators(1), **settings)
    assert not torch.allclose(other[0], together[0], atol=1e-4)


@pytest.mark.sample("z_image", "qwen_image")
def test_the_empty_prompt_is_what_guidance_pushes_away_from(family, stock):
    if stock.embedded or stock.beside:
        pytest.skip("the model is told its guidance, or a transformer that is told no prompt")
    weak, strong = (
        family.sample([""], generators(1), steps=2, guidance_scale=scale, resolution=stock.side) for scale in (1.0, 1.5)
    )
    torch.testing.assert_close(weak, strong, atol=1e-4, rtol=1e-4)


@pytest.mark.sample("z_image")
def test_a_loaded_model_is_the_saved_one(family, stock, tmp_path):
    assert_loaded_it_is_the_saved_one(family, stock.side, tmp_path)


@pytest.mark.sample("z_image")
def test_embeddings_are_cached_and_made_again_when_the_encoder_changes(family, tmp_path):
    assert_embeddings_are_cached(family, tmp_path)


def test_prompts_are_counted_with_what_the_pipeline_puts_around_them():
    need("z_image")
    family = family_of(tiny_z_image())
    around = 3 + 5  # of the user's turn; then the assistant's begins
    assert family.prompt_tokens("red") == (around + 3, 64)
    assert int(family.encode_prompts(["red"])["prompt_attention_mask"].sum()) == around + 3
    need("qwen_image")
    family = family_of(tiny_qwen_image())
    assert family.prompt_tokens("red") == (3 + 5, 64)  # the template's end after the prompt
    assert int(family.encode_prompts(["red"])["prompt_attention_mask"].sum()) == 3 + 5
    need("flux2_klein")
    family = family_of(tiny_flux2_klein())
    assert family.prompt_tokens("")[0] > around
    assert family.prompt_tokens("red")[0] == family.prompt_tokens("")[0] + 3
    need("krea2")
    family = family_of(tiny_krea2())
    assert family.prompt_tokens("red") == (3 + 5, 64)
    assert int(family.encode_prompts(["red"])["prompt_attention_mask"].sum()) == 3 + 5
    family = family_of(tiny_flux2())
    assert family.prompt_tokens("red")[0] == family.prompt_tokens("")[0] + 3 > len(family.pipe.system_message) / 8


# --- adapters that read timesteps -----------------------------------------------------------------------------------


@pytest.mark.sample("z_image")
def test_the_pretrained_model_takes_over_below_u0(family, stock):
    assert_the_pretrained_model_takes_over(family, stock.side, 0.7)


@pytest.mark.sample("z_image")
def test_a_tlora_has_the_papers_rank_at_every_level(family, stock):
    assert_a_tlora_has_the_papers_ranks(family, noisy_rows(family, stock))


# --- Qwen-Image 2.1 -------------------------------------------------------------------------------------------------


@pytest.fixture
def qwen21():
    need("qwen_image21")
    return family_of(tiny_qwen_image21(sigmas=[1.0, 0.8, 0.4]))


def test_a_model_that_lists_its_steps_draws_in_these_unless_told_otherwise(qwen21):
    stock, settings = STOCK["qwen_image21"], {"guidance_scale": 1.0, "resolution": 64}
    assert qwen21.few_steps.drawn == (3, 1.0)
    assert family_of(tiny_qwen_image21()).few_steps.drawn == (40, 1.0)
    _, listed = recorded(stock, qwen21.pipe, 50, 1.0)  # whatever number of steps it is given
    found = qwen21.decode(qwen21.sample(list(PROMPTS), generators(0, 1), steps=3, **settings)) / 2 + 0.5
    torch.testing.assert_close(found, listed, **TOLERANCE)
    _, usual = recorded(stock, tiny_qwen_image21(), 2, 1.0)
    found = qwen21.decode(qwen21.sample(list(PROMPTS), generators(0, 1), steps=2, **settings)) / 2 + 0.5
    torch.testing.assert_close(found, usual, **TOLERANCE)


def test_pictures_are_opaque_to_the_autoencoder_and_on_white_where_it_draws_others(qwen21):
    pictures = torch.rand(2, 3, 64, 64, generator=generators(0)[0]) * 2 - 1
    opaque = torch.cat([pictures, torch.ones(2, 1, 64, 64)], 1)
    with torch.no_grad():
        expected = qwen21.pipe.vae.encode(opaque.unsqueeze(2)).latent_dist.mean[:, :, 0]
    torch.testing.assert_close(qwen21.encode_moments(pictures)[0], expected, **TOLERANCE)
    latents = torch.randn(1, 4, 4, 4, generator=generators(1)[0])
    qwen21.pipe.vae.decoder.conv_out.weight.data[3] = 0.0
    qwen21.pipe.vae.decoder.conv_out.bias.data[3] = -5.0  # transparent everywhere
    assert torch.equal(qwen21.decode(latents), torch.ones(1, 3, 64, 64))


def tuned(family, kind: str) -> AdapterTuning:
    """An adapter that does something."""
    tuning = AdapterTuning(family, AdapterConfig(kind=kind, rank=4))
    for name, parameter in tuning.parameters().items():
        parameter.data = torch.randn(parameter.shape, generator=generators(len(name))[0])
    return tuning


@pytest.mark.parametrize("kind", ["lora", "tlora"])
def test_gradients_are_the_same_with_checkpointed_activations(kind):
    """Of rows at two levels, which T-LoRA gives other ranks, and whose forwards all come before their backward."""
    need("qwen_image21")
    found = []
    for checkpointed in (False, True):
        family = family_of(tiny_qwen_image21())
        torch.manual_seed(0)
        tuning = tuned(family, kind)
        if checkpointed:
            family.checkpoint_activations()
        family.denoiser.train()
        levels = family.process.timesteps[torch.tensor([50, 950])]
        told = family.encode_prompts(PROMPTS)
        family.predict(
            family.denoiser, noisy_rows(family, STOCK["qwen_image21"]), levels, told
        ).square().sum().backward()
        found.append({name: parameter.grad for name, parameter in tuning.parameters().items()})
    torch.testing.assert_close(*found, **TOLERANCE)


def test_a_tlora_reads_the_prompt_at_every_step_in_the_stock_pipeline(qwen21):
    pipe, places = qwen21.pipe, list[int]()
    tuned(qwen21, "tlora")
    pipe.transformer.register_forward_hook(lambda module, args, out: places.append(out[0].shape[1]))
    stock = STOCK["qwen_image21"]
    kept, uncached = (recorded(stock, pipe, 3, 1.0, use_kv_cache=cache)[1] for cache in (True, False))
    assert min(places) > 16  # the picture's
    assert torch.equal(kept, uncached)


def test_a_prompt_that_holds_the_mark_of_a_picture_is_refused(qwen21):
    with pytest.raises(UserError, match=r"a prompt has <\|image_pad\|> in it, which stands for a picture to edit"):
        qwen21.encode_prompts(["red", "a <|image_pad|>"])


def test_a_caption_that_the_pipeline_would_not_cut_is_refused_whatever_may_be_cut(qwen21, tmp_path):
    write_pictures(tmp_path, 2, 16)
    (tmp_path / "metadata.jsonl").unlink()
    for file in tmp_path.glob("*.png"):
        file.with_suffix(".txt").write_text("red " * 40)
    recipe = Recipe(data=DataConfig(str(tmp_path), truncate_captions=True))
    data = load_images(str(tmp_path))
    with pytest.raises(UserError, match=r"the 64 that the text encoder takes: .*; shorten them\.$"):
        check_captions(qwen21, recipe, data, data)


def test_a_prompt_that_is_longer_than_what_is_taken_is_refused(qwen21):
    with pytest.raises(UserError, match=r"has \d+ tokens with what stands around it, and at most 64 are taken here"):
        qwen21.encode_prompts(["red " * 40])


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_z_image_that_edits_pictures_is_refused_by_name():
    need("z_image")
    pipe = tiny_z_image()
    pipe.transformer.register_to_config(siglip_feat_dim=8)
    with pytest.raises(UserError, match=r"edits pictures \(Omni\)"):
        family_of(pipe)


@pytest.mark.sample(*ONE_EACH)
def test_a_missing_encoder_or_other_channels_are_refused(variant):
    pipe = VARIANTS[variant]()
    pipe.transformer.register_to_config(in_channels=9)
    with pytest.raises(UserError, match="channels"):
        family_of(pipe)
    pipe = VARIANTS[variant]()
    pipe.text_encoder = None
    with pytest.raises(UserError, match="has no text_encoder"):
        family_of(pipe)


@pytest.mark.parametrize("name", STOCK)
def test_an_older_diffusers_says_which_one_has_the_family(name, tmp_path, monkeypatch):
    need(name)
    import diffusers

    STOCK[name].make().save_pretrained(tmp_path)
    monkeypatch.setattr(diffusers, STOCK[name].pipeline, None)
    monkeypatch.setattr(diffusers, "__version__", "0.35.2")
    sentence = (
        rf"is a {STOCK[name].pipeline}, which diffusers 0\.35\.2 does not have as it is needed here; "
        r"install diffusers 0\.[34]\d or later"
    )
    with pytest.raises(UserError, match=sentence):
        load_family(str(tmp_path))
