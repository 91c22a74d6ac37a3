"""What the extras make a denoiser predict, against forwards and formulas written out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
)
from diffusers.hooks import HookRegistry, ModelHook
from peft import IA3Config, LoHaConfig, LoraConfig
from torch import Tensor

from difftuning_control.errors import UserError
from difftuning_control.families.tunable import make_tunable
from support.pipeline_samples import (
    EVERY,
    SIDE,
    STEPS,
    UNETS,
    add_adapter,
    arguments,
    denoiser_of,
    draw,
    drop_in,
    plain,
    source_of,
    source_unet,
    stock,
)

TOLERANCE = 1e-5
every = pytest.mark.parametrize("kind", EVERY, indirect=True)
batches = pytest.mark.parametrize("kind", [k for k in EVERY if plain(k) != "flux"], indirect=True)
flux = pytest.mark.parametrize("kind", ["flux", "flux-control"], indirect=True)


@pytest.fixture(params=UNETS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


class Recorded:
    """Every forward of a denoiser in a call: inputs, noise level u, and what it answered with all hooks on."""

    def __init__(self, pipe: Any, kind: str, **given: Any):
        self.steps: list[tuple[tuple, dict, float, Tensor]] = []

        def keep(module, args, kwargs, output):
            timestep = float((kwargs["timestep"] if "timestep" in kwargs else args[1]).reshape(-1)[0])
            u = {"sd3": timestep / 1000, "flux": timestep}.get(plain(kind), (timestep + 1) / 1000)
            self.steps.append((args, kwargs, u, output[0].clone()))

        handle = denoiser_of(pipe).register_forward_hook(keep, with_kwargs=True)
        self.picture = draw(pipe, kind, **given)
        handle.remove()

    def answers(self, other: Any) -> list[Tensor]:
        """What another denoiser predicts for the same inputs."""
        with torch.no_grad():
            return [other.eval()(*args, **kwargs)[0] for args, kwargs, _, _ in self.steps]


def unet_with(kind: str, adapters: dict[str, float]) -> Any:
    """A denoiser of its own with these adapters at these weights; equal names have equal weights everywhere."""
    unet = denoiser_of(stock(plain(kind)))
    for name in adapters:
        add_adapter(unet, name, {"tuned": 1, "style": 2}[name])
    if adapters:
        unet.set_adapters(list(adapters), list(adapters.values()))
    return unet


def with_both(kind: str, **settings: Any) -> Any:
    """Ours with the adapter that was tuned and one that the user loaded, each at a weight of its own."""
    pipe = drop_in(kind, tuned_adapters="tuned", **settings)
    for name, seed in (("tuned", 1), ("style", 2)):
        add_adapter(pipe.denoiser, name, seed)
    pipe.denoiser.set_adapters(["tuned", "style"], [0.8, 0.6])
    return pipe


def halves(answers: list[Tensor], kind: str = "sd") -> list[tuple[Tensor, Tensor]]:
    """The unconditional rows and the conditional ones, which a DiT has first."""
    return [tuple(a.chunk(2)[:: -1 if kind == "dit" else 1]) for a in answers]


def mixed(unconditional: Tensor, conditional: Tensor, kind: str) -> Tensor:
    """A guided batch of the two."""
    return torch.cat([conditional, unconditional] if kind == "dit" else [unconditional, conditional])


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() < TOLERANCE


# --- Domain Guidance ------------------------------------------------------------------------------------------------


@pytest.mark.sample("dit")
@batches
def test_the_unconditional_half_comes_without_the_tuned_adapter_and_with_the_others(kind):
    found = Recorded(with_both(kind, domain_guidance=True), kind, count=2)
    pretrained = found.answers(unet_with(kind, {"style": 0.6}))
    tuned = found.answers(unet_with(kind, {"tuned": 0.8, "style": 0.6}))
    assert len(found.steps) == STEPS
    for (_, _, _, answer), (unconditional, _), (own, conditional) in zip(
        found.steps, halves(pretrained, kind), halves(tuned, kind)
    ):
        ((first, second),) = halves([answer], kind)
        assert_close(first, unconditional)
        assert_close(second, conditional)
        assert (first - own).abs().max() > 100 * TOLERANCE  # the tuned model's own would be another


def test_pictures_are_those_of_two_forwards_and_the_formula():
    """The whole of sampling by hand: DDIM, ε = ε_pretrained(∅) + w (ε_tuned(c) − ε_pretrained(∅))."""
    pipe = with_both("sd", domain_guidance=True)
    scale, given = 4.0, arguments("sd", output_type="latent", negative_prompt=["dog"])
    found = pipe(**given | {"guidance_scale": scale}).images
    tuned, pretrained = unet_with("sd", {"tuned": 0.8, "style": 0.6}), unet_with("sd", {"style": 0.6})
    reference = stock("sd")
    prompt, empty = reference.encode_prompt(["red 1"], "cpu", 1, True, ["dog"])
    scheduler = DDIMScheduler.from_config(reference.scheduler.config)
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, 4, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in scheduler.timesteps:
            unconditional = pretrained(latents, t, empty, return_dict=False)[0]
            conditional = tuned(latents, t, prompt, return_dict=False)[0]
            guided = unconditional + scale * (conditional - unconditional)
            latents = scheduler.step(guided, t, latents).prev_sample
    assert (found - latents).abs().max() < TOLERANCE * latents.abs().max()


@pytest.mark.sample("sd-control")
@batches
def test_full_weights_take_the_unconditional_half_from_the_source(kind):
    pipe = drop_in(kind, **source_of(kind), domain_guidance=True)
    found = Recorded(pipe, kind, count=2, **({} if kind == "dit" else {"negative_prompt": ["dog", "red"]}))
    pretrained, tuned = found.answers(source_unet(kind)), found.answers(denoiser_of(stock(kind)))
    for (_, _, _, answer), (unconditional, _), (_, conditional) in zip(
        found.steps, halves(pretrained, kind), halves(tuned, kind)
    ):
        assert_close(answer, mixed(unconditional, conditional, kind))


def test_skip_layer_guidance_goes_on_with_the_tuned_weights():
    """Stable Diffusion 3's third forward of some steps, of the conditional rows alone."""
    pipe, skipping = with_both("sd3", domain_guidance=True), {"skip_guidance_layers": [0]}
    found = Recorded(pipe, "sd3", count=2, skip_layer_guidance_stop=0.6, **skipping)
    pretrained = found.answers(unet_with("sd3", {"style": 0.6}))
    tuned = found.answers(unet_with("sd3", {"tuned": 0.8, "style": 0.6}))
    skips = ["skip_layers" in kwargs for _, kwargs, _, _ in found.steps]
    assert (len(skips), sum(skips)) == (STEPS + 2, 2)
    for is_skip, (_, _, _, answer), theirs, ours in zip(skips, found.steps, pretrained, tuned):
        assert_close(answer, ours if is_skip else torch.cat([theirs.chunk(2)[0], ours.chunk(2)[1]]))


@pytest.mark.sample("full weights-flux")
@flux
@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full weights"])
def test_flux_without_a_negative_prompt_is_two_forwards_and_the_formula(kind, full):
    """ε = ε_pretrained(c) + w (ε_tuned(c) − ε_pretrained(c)), w the true_cfg_scale, in one forward that is seen."""
    pipe = drop_in(kind, **source_of(kind), domain_guidance=True) if full else with_both(kind, domain_guidance=True)
    found = Recorded(pipe, kind, count=2, true_cfg_scale=2.5)
    pretrained = found.answers(source_unet(kind) if full else unet_with(kind, {"style": 0.6}))
    tuned = found.answers(unet_with(kind, {} if full else {"tuned": 0.8, "style": 0.6}))
    assert len(found.steps) == STEPS
    for (_, kwargs, _, answer), theirs, ours in zip(found.steps, pretrained, tuned):
        assert kwargs["guidance"].tolist() == [3.0, 3.0]  # dev is told its own guidance as before
        assert_close(answer, theirs + 2.5 * (ours - theirs))
        assert (ours - theirs).abs().max() > 100 * TOLERANCE


@pytest.mark.sample("flux")
@flux
def test_flux_with_a_negative_prompt_has_the_pretrained_model_answer_it(kind):
    found = Recorded(with_both(kind, domain_guidance=True), kind, negative_prompt=["dog"])
    pretrained = found.answers(unet_with(kind, {"style": 0.6}))
    tuned = found.answers(unet_with(kind, {"tuned": 0.8, "style": 0.6}))
    assert len(found.steps) == 2 * STEPS
    for i, (_, _, _, answer) in enumerate(found.steps):
        assert_close(answer, pretrained[i] if i % 2 else tuned[i])
    assert not torch.equal(*(kwargs["encoder_hidden_states"] for _, kwargs, _, _ in found.steps[:2]))


def test_flux_encodes_the_negative_prompt_without_the_tuned_adapter():
    pipe = drop_in("flux", domain_guidance=True)
    for module, targets in ((pipe.transformer, None), (pipe.text_encoder, ["q_proj", "v_proj"])):
        add_adapter(module, "tuned", 1, targets)
    found = Recorded(pipe, "flux", negative_prompt=["dog"])
    (_, first, _, _), (_, second, _, _) = found.steps[:2]
    plain_one = stock("flux")
    pooled = [p.encode_prompt([w], device="cpu")[1] for p, w in ((pipe, "red 1"), (plain_one, "dog"), (pipe, "dog"))]
    assert_close(first["pooled_projections"], pooled[0])
    assert_close(second["pooled_projections"], pooled[1])
    assert not torch.allclose(pooled[1], pooled[2], atol=1e-3)  # outside of a call it is the stock class's
    with pytest.raises(UserError, match='under the same embeddings; give a negative_prompt, "" for none'):
        draw(pipe, "flux")


@pytest.mark.sample("{'adapter_schedule': {'kind': 'power', 'tau': 1.0}}-flux-control")
@every
@pytest.mark.parametrize("setting", [{"hand_over": 0.5}, {"adapter_schedule": {"kind": "power", "tau": 1.0}}], ids=str)
def test_switching_the_denoiser_alone_is_refused_where_a_text_encoder_is_tuned_too(kind, setting):
    if kind == "dit":
        pytest.skip("has no text encoder")
    pipe = drop_in(kind, **setting)
    for module, targets in ((pipe.denoiser, None), (pipe.text_encoder, ["q_proj"])):
        add_adapter(module, "tuned", 1, targets)
    with pytest.raises(UserError, match="tuned tuned text_encoder too, which would stay tuned at every step"):
        draw(pipe, kind)
    pipe.text_encoder.disable_adapters()
    assert np.isfinite(draw(pipe, kind)).all()


@pytest.mark.sample("sd")
def test_guidance_rescale_and_a_scale_of_the_adapter_compose(kind):
    more: dict[str, Any] = {"cross_attention_kwargs": {"scale": 0.5}}
    if not kind.endswith("control"):
        more["guidance_rescale"] = 0.7
    found = Recorded(with_both(kind, domain_guidance=True), kind, **more)
    for step in found.steps:
        step[1]["cross_attention_kwargs"] = None
    pretrained = found.answers(unet_with(kind, {"style": 0.3}))
    tuned = found.answers(unet_with(kind, {"tuned": 0.4, "style": 0.3}))
    for (_, _, _, answer), (unconditional, _), (_, conditional) in zip(found.steps, halves(pretrained), halves(tuned)):
        assert_close(answer, torch.cat([unconditional, conditional]))


@pytest.mark.sample("sd")
def test_a_text_encoder_s_adapter_is_off_for_negative_prompts(kind):
    pipe = drop_in(kind, domain_guidance=True)
    add_adapter(pipe.unet, "tuned", 1)
    pipe.text_encoder.add_adapter(
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), adapter_name="tuned"
    )
    found = Recorded(pipe, kind, negative_prompt=["dog"])
    plain = stock(kind)
    both = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    positive, negative = plain.encode_prompt(["red 1"], negative_prompt=["dog"], **both)[:2]
    tuned = pipe.encode_prompt(["red 1"], negative_prompt=["dog"], **both)[:2]
    assert not torch.allclose(tuned[1], negative, atol=1e-3)  # outside of a call it is the stock class's
    for _, kwargs, _, _ in found.steps:
        first, second = kwargs["encoder_hidden_states"].chunk(2)
        assert_close(first, negative)
        assert_close(second, tuned[0])
        assert not torch.allclose(second, positive, atol=1e-3)


@pytest.mark.sample("ia3")
@pytest.mark.parametrize("config", [LoHaConfig, IA3Config, "dora"], ids=["loha", "ia3", "dora"])
def test_adapters_of_other_kinds_are_switched_off_as_well(config):
    pipe = drop_in("sd", domain_guidance=True)
    if config == "dora":
        settings = LoraConfig(r=2, target_modules=["to_q", "to_v"], use_dora=True, init_lora_weights=False)
    elif config is IA3Config:
        settings = IA3Config(target_modules=["to_q", "to_v"], feedforward_modules=[], init_ia3_weights=False)
    else:
        settings = LoHaConfig(r=2, target_modules=["to_q", "to_v"], init_weights=False)
    pipe.unet.add_adapter(settings, adapter_name="tuned")
    for name, parameter in pipe.unet.named_parameters():
        if "tuned" in name:
            parameter.data += 0.3
    found = Recorded(pipe, "sd")
    for (_, _, _, answer), (expected, _), (_, conditional) in zip(
        found.steps, halves(found.answers(stock("sd").unet)), halves(found.answers(pipe.unet))
    ):
        assert_close(answer, torch.cat([expected, conditional]))
        assert not torch.allclose(answer.chunk(2)[1], found.answers(stock("sd").unet)[0].chunk(2)[1], atol=1e-4)
    pipe.set_extras(adapter_schedule={"kind": "power", "tau": 1.0})
    if config is IA3Config:
        with pytest.raises(UserError, match=r"needs adapters with a scale, and tuned has none \(a ia3\)"):
            draw(pipe, "sd")
    else:
        assert np.isfinite(draw(pipe, "sd")).all()


@pytest.mark.sample("sd-control", "sd3", "dit")
@every
def test_it_is_what_it_is_where_the_adapter_does_nothing(kind):
    """With an untrained adapter both branches are the pretrained model's, and so is the picture."""
    pipe = drop_in(kind, domain_guidance=True)
    make_tunable(pipe.denoiser)
    pipe.denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="tuned")
    assert np.abs(draw(pipe, kind) - draw(stock(kind), kind)).max() < 1e-4


def nearest_level(kind: str, u: float) -> float:
    """The one of a thousand noise levels that is nearest; SD3's are shifted by 3."""
    sigmas = np.arange(1, 1001) / 1000
    levels = 3 * sigmas / (1 + 2 * sigmas) if plain(kind) == "sd3" else sigmas
    return float(levels[np.abs(levels - u).argmin()])


# --- schedules and hand-over ----------------------------------------------------------------------------------------


@pytest.mark.wide
@every
@pytest.mark.parametrize("guided", [False, True])
def test_the_adapter_acts_with_the_strength_of_each_step(kind, guided):
    table = {"kind": "table", "u": [0, 0.3, 1], "strength": [0, 0.4, 1]}
    pipe = with_both(kind, adapter_schedule=table, domain_guidance=guided)
    found = Recorded(pipe, kind)
    for i, (_, _, u, answer) in enumerate(found.steps):
        strength = np.interp(nearest_level(kind, u), table["u"], table["strength"])
        scaled = unet_with(kind, {"tuned": 0.8 * strength, "style": 0.6})
        expected = found.answers(scaled)[i]
        if guided:
            pretrained = found.answers(unet_with(kind, {"style": 0.6}))[i]
            if plain(kind) == "flux":
                expected = pretrained + 3.0 * (expected - pretrained)
            else:
                expected = mixed(halves([pretrained], kind)[0][0], halves([expected], kind)[0][1], kind)
        assert_close(answer, expected)


@pytest.mark.sample("adapter-dit")
@every
@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full weights"])
def test_below_u0_the_pretrained_model_finishes(kind, full):
    u0 = 0.5
    pipe = drop_in(kind, **source_of(kind), hand_over=u0) if full else with_both(kind, hand_over=u0)
    found = Recorded(pipe, kind)
    pretrained = found.answers(source_unet(kind) if full else unet_with(kind, {"style": 0.6}))
    tuned = found.answers(unet_with(kind, {} if full else {"tuned": 0.8, "style": 0.6}))
    places = [u > u0 for _, _, u, _ in found.steps]
    assert set(places) == {True, False}
    for (_, _, _, answer), is_above, theirs, ours in zip(found.steps, places, pretrained, tuned):
        assert_close(answer, ours if is_above else theirs)


@pytest.mark.wide
def test_all_of_them_at_once(kind):
    pipe = with_both(kind, hand_over=0.4, adapter_schedule=lambda u: u / 2, domain_guidance=True)
    found = Recorded(pipe, kind, count=2)
    pretrained = found.answers(unet_with(kind, {"style": 0.6}))
    for i, (_, _, u, answer) in enumerate(found.steps):
        tuned = found.answers(unet_with(kind, {"tuned": 0.4 * u, "style": 0.6}))[i]
        guided = torch.cat([pretrained[i].chunk(2)[0], tuned.chunk(2)[1]])
        assert_close(answer, guided if u > 0.4 else pretrained[i])


@pytest.mark.wide
def test_without_guidance_the_schedules_act_on_the_whole_batch(kind):
    pipe = with_both(kind, hand_over=0.5, adapter_schedule={"kind": "power", "tau": 1.0})
    found = Recorded(pipe, kind, guidance_scale=1.0)
    pretrained = found.answers(unet_with(kind, {"style": 0.6}))
    for i, (args, _, u, answer) in enumerate(found.steps):
        assert len(args[0]) == 1
        tuned = found.answers(unet_with(kind, {"tuned": 0.8 * u, "style": 0.6}))[i]
        assert_close(answer, tuned if u > 0.5 else pretrained[i])


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_have_the_same_noise_levels(scheduler):
    seen = []
    pipe = with_both("sd", adapter_schedule=lambda u: seen.append(u) or 1.0)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    found = Recorded(pipe, "sd")
    assert seen == pytest.approx([u for _, _, u, _ in found.steps], abs=1e-3)
    assert seen == sorted(seen, reverse=True)


@pytest.mark.sample("sd")
def test_a_function_out_of_its_range_leaves_the_weights_as_they_were(kind):
    pipe = with_both(kind, adapter_schedule=lambda u: 3 * u)
    before = [dict(m.scaling) for m in pipe.unet.modules() if hasattr(m, "scaling")]
    with pytest.raises(UserError, match=r"the schedule gives .* at u = "):
        draw(pipe, kind)
    assert [dict(m.scaling) for m in pipe.unet.modules() if hasattr(m, "scaling")] == before


# --- with what else changes a denoiser ------------------------------------------------------------------------------


def load_ip_adapter(unet: Any, width: int) -> None:
    """A tiny IP-Adapter in the layout of the published ones."""
    generator = torch.Generator().manual_seed(4)
    size = unet.config.cross_attention_dim
    layers: dict[str, Tensor] = {}
    cross = [(i, m) for i, (n, m) in enumerate((n, m) for n, m in unet.named_modules() if n.endswith("attn2"))]
    for i, attention in cross:
        for part in ("k", "v"):
            shape = (attention.inner_dim, size)
            layers[f"{2 * i + 1}.to_{part}_ip.weight"] = 0.2 * torch.randn(shape, generator=generator)
    projection = {
        "proj.weight": torch.randn(size * 4, width, generator=generator),
        "proj.bias": torch.zeros(size * 4),
        "norm.weight": torch.ones(size),
        "norm.bias": torch.zeros(size),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])


@pytest.mark.wide
def test_an_ip_adapter_goes_on_seeing_its_picture(kind):
    pipe = with_both(kind, domain_guidance=True)
    others = {
        name: unet_with(kind, names)
        for name, names in (("pretrained", {"style": 0.6}), ("tuned", {"tuned": 0.8, "style": 0.6}))
    }
    for unet in (pipe.unet, *others.values()):
        load_ip_adapter(unet, 6)
    embeds = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(1))
    found = Recorded(pipe, kind, ip_adapter_image_embeds=[embeds])
    pretrained, tuned = (halves(found.answers(others[n])) for n in ("pretrained", "tuned"))
    for (_, _, _, answer), (unconditional, _), (_, conditional) in zip(found.steps, pretrained, tuned):
        assert_close(answer, torch.cat([unconditional, conditional]))
    assert not np.allclose(found.picture, draw(pipe, kind, ip_adapter_image_embeds=[0 * embeds]))


@pytest.mark.sample("sd")
def test_an_ip_adapter_that_the_source_has_not_is_told(kind):
    pipe = drop_in(kind, source_unet=source_unet(kind), domain_guidance=True)
    load_ip_adapter(pipe.unet, 6)
    with pytest.raises(UserError, match="an IP-Adapter is loaded into the UNet, but not into source_unet"):
        draw(pipe, kind, ip_adapter_image_embeds=[torch.zeros(2, 1, 6)])


@pytest.mark.wide
@pytest.mark.parametrize("settings", [{"domain_guidance": True}, {"hand_over": 0.5}], ids=lambda s: next(iter(s)))
def test_model_offload_gives_the_same_pictures(kind, settings):
    pipe = with_both(kind, **settings)
    expected = draw(pipe, kind)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # the stock call takes all offload hooks off and puts them on again at its end
        assert np.array_equal(draw(pipe, kind), expected)
    pipe.remove_all_hooks()
    assert np.array_equal(draw(pipe, kind), expected)


@pytest.mark.wide
@pytest.mark.parametrize("settings", [{"domain_guidance": True}, {"hand_over": 0.5}], ids=lambda s: next(iter(s)))
@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full weights"])
def test_a_compiled_denoiser_gives_the_same_pictures(settings, full):
    torch._dynamo.reset()
    pipe = drop_in("sd", source_unet=source_unet("sd"), **settings) if full else with_both("sd", **settings)
    expected = draw(pipe, "sd")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    for _ in range(2):
        assert np.abs(draw(pipe, "sd") - expected).max() < 1e-4
    assert not hasattr(pipe.unet._orig_mod, "_diffusers_hook")


def test_a_denoiser_that_is_compiled_after_it_has_drawn_is_hooked_around_and_not_within():
    """Transformers that diffusers has caches for keep a chain of hooks after any call."""
    torch._dynamo.reset()
    pipe = with_both("flux", hand_over=0.5)
    expected = draw(pipe, "flux")
    HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    plain = pipe.transformer
    pipe.transformer = torch.compile(plain, backend="eager")
    for _ in range(2):
        assert np.abs(draw(pipe, "flux") - expected).max() < 1e-4
    assert plain._diffusers_hook.hooks == {}
    assert "forward" not in vars(plain)


class _First(ModelHook):
    """Goes after the first forward, as the hook does by which group offloading learns the order of layers."""

    def post_forward(self, module, output):
        module._diffusers_hook.remove_hook("first", recurse=False)
        return output


@pytest.mark.parametrize("settings", [{"domain_guidance": True}, {"hand_over": 0.5}], ids=lambda s: next(iter(s)))
def test_settings_act_on_where_a_hook_before_them_goes_while_it_draws(settings):
    pipe = with_both("sd", **settings)
    expected = draw(pipe, "sd")
    HookRegistry.check_if_exists_or_initialize(pipe.unet).register_hook(_First(), "first")
    assert np.array_equal(draw(pipe, "sd"), expected)
    assert pipe.unet._diffusers_hook.hooks == {}
    assert np.array_equal(draw(pipe, "sd"), expected)


def test_norms_that_a_lora_exchanged_are_refused():
    pipe = with_both("flux", hand_over=0.5)
    pipe.transformer._transformer_norm_layers = {"transformer_blocks.0.norm": torch.ones(1)}
    expected = draw(pipe, "flux")  # of the adapter beside, which may be a Control LoRA
    pipe.transformer.delete_adapters("style")
    with pytest.raises(UserError, match="exchanged norm layers of the transformer, which no setting can switch off"):
        draw(pipe, "flux")
    assert np.array_equal(draw(with_both("flux", hand_over=0.5), "flux"), expected)


@pytest.mark.wide
@pytest.mark.parametrize("settings", [{"domain_guidance": True}, {"hand_over": 0.5}], ids=lambda s: next(iter(s)))
def test_blocks_that_are_compiled_and_have_drawn_without_extras_take_them(settings):
    torch._dynamo.reset()
    pipe = with_both("sd", **settings)
    expected = draw(pipe, "sd")
    pipe.set_extras(domain_guidance=False, hand_over=None)
    pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    plain = draw(pipe, "sd")
    pipe.set_extras(**settings)
    assert np.abs(draw(pipe, "sd") - expected).max() < 1e-4
    assert np.abs(plain - expected).max() > 1e-2


def test_what_cannot_be_with_a_compiled_denoiser_is_told():
    pipe = with_both("sd", adapter_schedule={"kind": "power", "tau": 1.0})
    plain = pipe.unet
    pipe.unet = torch.compile(plain, backend="eager")
    with pytest.raises(UserError, match="compiled and would be compiled anew for every value of adapter_schedule"):
        draw(pipe, "sd")
    pipe.unet = plain
    pipe.set_extras(adapter_schedule=None, domain_guidance=True)
    plain.compile(backend="eager")
    with pytest.raises(UserError, match=r"the UNet was compiled in place \(unet\.compile\(\)\), where no hook reaches"):
        draw(pipe, "sd")


def test_a_cache_of_blocks_is_told():
    pipe = with_both("flux", domain_guidance=True)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(UserError, match=r"call pipe\.transformer\.disable_cache\(\)"):
        draw(pipe, "flux")
    pipe.transformer.disable_cache()
    assert np.isfinite(draw(pipe, "flux")).all()


def test_a_cache_of_blocks_is_told_of_what_changes_with_the_steps():
    """It would go on with what the adapter gave before."""
    pipe = with_both("flux", hand_over=0.5)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(UserError, match=r"which hand_over would mix .*disable_cache\(\)"):
        draw(pipe, "flux")
    pipe.set_extras(hand_over=None)
    assert np.isfinite(draw(pipe, "flux")).all()
    pipe.transformer.disable_cache()


@pytest.mark.parametrize("scale", [None, "3", [3.0]])
def test_a_scale_that_is_no_number_is_told(scale):
    pipe = with_both("sd", domain_guidance=True)
    with pytest.raises(UserError, match=r"guidance_scale is .*; expected a number"):
        draw(pipe, "sd", guidance_scale=scale)
