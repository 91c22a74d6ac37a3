"""The drop-ins are the stock pipelines where nothing is asked of them, and keep their properties where something is."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback

from difftuning_control.errors import UserError
from difftuning_control.families.hub import in_precision
from difftuning_control.pipelines.guidance import TunedWeights, tuned_weights
from support.marks import needs
from support.pipeline_samples import (
    EVERY,
    MORE,
    OURS,
    SIDE,
    STEPS,
    UNETS,
    add_adapter,
    arguments,
    denoiser_of,
    draw,
    drop_in,
    plain,
    same_traces,
    source_of,
    source_unet,
    stock,
    traces,
)

every = pytest.mark.parametrize("kind", EVERY, indirect=True)
# every extra at once, on an adapter named `tuned`
ALL = {"domain_guidance": True, "adapter_schedule": {"kind": "power", "tau": 0.5}, "hand_over": 0.3}


def settings_for(kind: str) -> dict:
    control = {"control_schedule": {"kind": "table", "u": [0, 0.4, 0.6, 1], "strength": [0, 0, 0.5, 1]}}
    return ALL | (control if kind.endswith("control") else {})


@pytest.fixture(params=UNETS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["off", "on"])
def pipe(request: pytest.FixtureRequest, kind: str):
    """Ours, with all extras off or on."""
    found = drop_in(kind)
    if request.param == "on":
        add_adapter(denoiser_of(found), "tuned", 1)
        found.set_extras(**settings_for(kind))
    return found


# --- with the extras off --------------------------------------------------------------------------------------------


def takes(kind: str, given: dict) -> bool:
    """Whether a stock pipeline's call has these arguments; a DiT is told a class and little else."""
    return set(given) - {"count"} <= set(inspect.signature(OURS[kind].__call__).parameters)


@pytest.mark.sample("num_inference_steps-sd")
@every
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"count": 3},
        {"num_images_per_prompt": 2, "generator": None, "count": 2},
        {"guidance_scale": 1.0},
        {"negative_prompt": ["dog"]},
        {"output_type": "latent"},
        {"num_inference_steps": 1},
    ],
    ids=lambda given: ", ".join(given) or "plain",
)
def test_pictures_are_those_of_the_stock_class(kind, given):
    others = set(given) - {"count", "negative_prompt"}  # what hardly differs from family to family
    if not takes(kind, given) or (kind not in UNETS and (others or (given and kind.endswith("control")))):
        pytest.skip("the stock class takes no such argument, or it is the others' code")
    torch.manual_seed(0)
    expected = draw(stock(kind), kind, **given)
    torch.manual_seed(0)
    found = draw(drop_in(kind), kind, **given)
    assert np.array_equal(np.asarray(found), np.asarray(expected))


@every
def test_nothing_is_hooked(kind, monkeypatch):
    """So that the speed is the stock class's: its own `__call__` runs and nothing else does."""
    pipe = drop_in(kind)
    monkeypatch.setattr("difftuning_control.pipelines.hooks.HookRegistry", None)
    monkeypatch.setattr("difftuning_control.pipelines.sampling.bound", None)
    assert draw(pipe, kind).shape == (1, SIDE, SIDE, 3)


@pytest.mark.sample("dit")
@every
def test_an_adapter_acts_as_in_the_stock_class(kind):
    pipe, ours = stock(kind), drop_in(kind)
    for one in (pipe, ours):
        add_adapter(denoiser_of(one), "tuned", 1)
    name = "cross_attention_kwargs" if kind in UNETS else "joint_attention_kwargs"
    scale = {} if kind == "dit" else {name: {"scale": 0.5}}
    assert np.array_equal(draw(ours, kind, **scale), draw(pipe, kind, **scale))


@pytest.mark.sample("sd-control")
@every
def test_the_call_has_the_stock_signature(kind):
    ours, theirs = inspect.signature(drop_in(kind).__call__), inspect.signature(stock(kind).__call__)
    added = set(ours.parameters) - set(theirs.parameters)
    assert added == ({"preprocess"} if kind.endswith("control") else set())
    assert all(ours.parameters[n].default == p.default for n, p in theirs.parameters.items())
    assert drop_in(kind).__call__.__doc__ == stock(kind).__call__.__doc__


@pytest.mark.sample("sd", "xl-control", "flux", "dit")
@every
def test_components_go_into_stock_classes(kind):
    pipe = drop_in(kind)
    again = type(stock(kind))(**pipe.components, **MORE.get(plain(kind), {}))
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(again, kind), draw(pipe, kind))


# --- properties of the stock classes, with extras off and on --------------------------------------------------------


@pytest.mark.sample("on-sd", "off-xl-control")
def test_the_same_seed_gives_the_same_picture(pipe, kind):
    assert np.array_equal(draw(pipe, kind), draw(pipe, kind))


@pytest.mark.sample("on-sd", "off-xl-control")
def test_a_row_of_a_batch_is_the_picture_alone(pipe, kind):
    batch = draw(pipe, kind, count=3)
    for i in range(3):
        given = {n: [v[i]] for n, v in arguments(kind, 3).items() if isinstance(v, list)}
        alone = draw(pipe, kind, **given)
        assert np.abs(batch[i] - alone[0]).max() < 1e-4


@pytest.mark.sample("on-sd", "off-xl-control")
def test_several_pictures_a_prompt(pipe, kind):
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    found = draw(pipe, kind, count=2, num_images_per_prompt=2, generator=generators)
    assert found.shape == (4, SIDE, SIDE, 3)
    assert np.abs(found[0] - draw(pipe, kind)[0]).max() < 1e-4
    assert not np.allclose(found[0], found[1])


@pytest.mark.sample("on-sd", "off-xl-control")
def test_a_tuple_holds_what_the_output_class_holds(pipe, kind):
    assert np.array_equal(pipe(**arguments(kind, return_dict=False))[0], draw(pipe, kind))


@pytest.mark.sample("on-sd", "off-xl-control")
def test_embeddings_may_be_given_instead_of_prompts(pipe, kind):
    found = pipe.encode_prompt(["red 1"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    given = dict(zip(names, found)) | {"prompt": None}
    assert np.abs(draw(pipe, kind, **given) - draw(pipe, kind)).max() < 1e-5


@pytest.mark.sample("on-sd", "off-xl-control")
def test_callbacks_see_and_change_every_step(pipe, kind):
    seen = []

    def look(its, step, timestep, values):
        seen.append((step, float(timestep), values["latents"].clone()))
        values["latents"] = torch.zeros_like(values["latents"]) if step == STEPS - 1 else values["latents"]
        return values

    found = draw(pipe, kind, output_type="latent", callback_on_step_end=look)
    assert [s for s, _, _ in seen] == list(range(STEPS))
    assert not found.any()


@pytest.mark.sample("on-sd", "off-xl-control")
def test_guidance_can_be_changed_while_sampling(pipe, kind):
    """diffusers' recipe of dynamic guidance: it is switched off in a callback, and the batch is halved."""

    def stop_guidance(its, step, timestep, values):
        if step == 1:
            its._guidance_scale = 0.0
            for name in values:
                if name != "latents":
                    values[name] = values[name].chunk(2)[-1]
        return values

    if kind.endswith("control"):
        pytest.skip("the stock ControlNet pipelines do not hand the condition over to a callback in halves")
    names = ["latents", "prompt_embeds"]
    if kind == "xl":
        names += ["add_text_embeds", "add_time_ids"]
    found = draw(
        pipe, kind, callback_on_step_end=stop_guidance, callback_on_step_end_tensor_inputs=names, output_type="latent"
    )
    assert torch.isfinite(found).all()
    assert not torch.equal(found, draw(pipe, kind, output_type="latent"))


@pytest.mark.sample("on-sd", "off-xl-control")
def test_interrupting_ends_the_call_quietly(pipe, kind):
    calls = []

    def stop(its, step, timestep, values):
        calls.append(step)
        its._interrupt = True
        return values

    assert draw(pipe, kind, callback_on_step_end=stop).shape == (1, SIDE, SIDE, 3)
    assert calls == [0]


@pytest.mark.sample("on-sd-dtype1", "off-xl-control-dtype0")
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float64, id="dtype0", marks=needs("transformers", "5")),  # whose masks were in 32 bits
        pytest.param(torch.bfloat16, id="dtype1"),
    ],
)
def test_dtype_moves(pipe, kind, dtype):
    latents = torch.randn(1, 4, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(0))
    expected = draw(pipe, kind, latents=latents)
    pipe.to(dtype)
    assert {m.dtype for m in pipe.components.values() if isinstance(m, torch.nn.Module)} == {dtype}
    found = draw(pipe, kind, latents=latents.to(dtype))
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    if dtype is torch.float64:
        assert np.abs(found - expected).max() < 1e-2


@pytest.mark.sample("on-*")
@every
def test_after_a_call_nothing_is_left(pipe, kind):
    modules = [denoiser_of(pipe), *([pipe.controlnet] if kind.endswith("control") else [])]
    before = [traces(m) for m in modules]
    draw(pipe, kind)
    assert all(same_traces(b, traces(m)) for b, m in zip(before, modules))
    if plain(kind) != "flux":  # whose stock class leaves a registry without hooks behind
        assert not any(hasattr(m, "_diffusers_hook") for m in modules)


@pytest.mark.sample("on-0-KeyboardInterrupt-sd", "off-3-ValueError-flux", "on-3-ValueError-xl-control")
@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind != "dit"], indirect=True)
@pytest.mark.parametrize(("step", "error"), [(0, KeyboardInterrupt), (STEPS - 1, ValueError)])
def test_an_exception_in_a_callback_leaves_nothing(pipe, kind, step, error):
    modules = [denoiser_of(pipe), *([pipe.controlnet] if kind.endswith("control") else [])]
    before, picture = [traces(m) for m in modules], draw(pipe, kind)

    def fail(its, index, timestep, values):
        if index == step:
            raise error
        return values

    with pytest.raises(error):
        draw(pipe, kind, callback_on_step_end=fail)
    assert all(same_traces(b, traces(m)) for b, m in zip(before, modules))
    assert np.array_equal(draw(pipe, kind), picture)


@pytest.mark.sample("on-sd", "off-xl-control")
def test_a_copy_is_a_pipeline_of_its_own(pipe, kind):
    other = copy.deepcopy(pipe)
    expected = draw(pipe, kind)
    for parameter in pipe.unet.parameters():
        parameter.data.zero_()
    assert np.array_equal(draw(other, kind), expected)


@pytest.mark.sample("sd")
def test_a_pickled_pipeline_is_the_same(kind):
    """As a stock one can be handed to another process, before it has drawn."""
    pipe = drop_in(kind, **source_of(kind), adapter_schedule=ALL["adapter_schedule"], hand_over=0.3)
    again = pickle.loads(pickle.dumps(pipe))
    assert again.extras.adapter_schedule(0.25) == 0.5
    for one in (pipe, again):
        one.set_extras(adapter_schedule=None)
    assert np.array_equal(draw(again, kind), draw(pipe, kind))


@pytest.mark.sample("on-sd")
def test_a_callback_may_draw_with_another_pipeline_of_the_same_modules(pipe, kind):
    """The stock class and ours, with another setting; each of these pictures is as if drawn alone."""
    more = {"controlnet": pipe.controlnet} if kind.endswith("control") else {}
    scheduler = type(pipe.scheduler).from_config
    plain = type(stock(kind)).from_pipe(
        pipe, **in_precision(torch.float32), scheduler=scheduler(pipe.scheduler.config), **more
    )
    ours = OURS[kind].from_pipe(plain, scheduler=scheduler(pipe.scheduler.config), **more)
    add_adapter(pipe.unet, "other", 2)
    ours.set_extras(tuned_adapters=["other"], domain_guidance=True)
    for one in (plain, ours):
        one.set_progress_bar_config(disable=True)
    adapters = ["other"] if pipe.extras.tuned_adapters is None and not pipe.extras.is_active else ["tuned", "other"]
    pipe.unet.set_adapters(adapters)
    if "tuned" in adapters:
        pipe.set_extras(tuned_adapters="tuned")
    ways = [(plain, 3.0), (plain, 1.0), (ours, 3.0)]
    expected, picture, found = [draw(p, kind, guidance_scale=w) for p, w in ways], draw(pipe, kind), []

    def preview(its, step, timestep, values):
        found.extend(draw(p, kind, guidance_scale=w) for p, w in ways if step == 1)
        return values

    assert np.array_equal(draw(pipe, kind, callback_on_step_end=preview), picture)
    assert all(np.array_equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.sample("sd", "xl-control", "flux", "dit")
@every
def test_two_calls_at_once_with_the_same_unet_are_told(kind):
    pipe = drop_in(kind, **source_of(kind), hand_over=0.5)
    with (
        tuned_weights(pipe.denoiser, TunedWeights([], [], pipe.source)),
        pytest.raises(UserError, match=f"another call is sampling with this {type(pipe.denoiser).__name__}"),
    ):
        draw(pipe, kind)
    assert np.isfinite(draw(pipe, kind)).all()


def test_a_cutoff_of_diffusers_own_ends_domain_guidance(kind):
    cutoff = {"sd": SDCFGCutoffCallback, "xl": SDXLCFGCutoffCallback}
    if kind not in cutoff:
        pytest.skip("diffusers has one that hands the condition over for SDXL only")
    pipe = drop_in(kind, source_unet=source_unet(kind), domain_guidance=True)
    found = draw(pipe, kind, callback_on_step_end=cutoff[kind](cutoff_step_ratio=None, cutoff_step_index=1))
    assert np.isfinite(found).all()
    assert not np.allclose(found, draw(pipe, kind))


@pytest.mark.sample("sd")
def test_freeu_acts_in_the_source_as_well(kind):
    """Else the two halves of guidance would differ by it."""
    pipe = drop_in(kind, source_unet=stock(kind).unet, domain_guidance=True)
    plain = stock(kind)
    for one in (pipe, plain):
        one.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert np.abs(draw(pipe, kind) - draw(plain, kind)).max() < 1e-4
    pipe.disable_freeu()
    assert np.abs(draw(pipe, kind) - draw(stock(kind), kind)).max() < 1e-4


@every
def test_no_undecorated_call_passes_the_extras_over(kind):
    """diffusers' `__call__.__wrapped__`, which people take for gradients, would be the stock class's."""
    assert hasattr(type(stock(kind)).__call__, "__wrapped__")
    assert not hasattr(OURS[kind].__call__, "__wrapped__")


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.sample(
    "sd-settings0-domain_guidance is 1; expected True or False", "sd-settings4-expected names of adapters"
)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"domain_guidance": 1}, "domain_guidance is 1; expected True or False"),
        ({"hand_over": 1.5}, "hand_over is 1.5; expected 0 to 1"),
        ({"hand_over": -0.1}, "hand_over is -0.1; expected 0 to 1"),
        ({"tuned_adapters": []}, "expected names of adapters"),
        ({"tuned_adapters": [3]}, "expected names of adapters"),
        ({"tuned_adapters": 5}, "tuned_adapters is 5; expected names of adapters"),
        ({"adapter_schedule": {"kind": []}}, r"the schedule's kind is \[\]; expected one of"),
        ({"adapter_schedule": {"kind": "table", "u": [0.2, 1], "strength": [0, 1]}}, "covers u from 0.2 to 1"),
        ({"adapter_schedule": {"kind": "table", "u": [0, 1], "strength": [0, 1.2]}}, "from 0 to 1"),
    ],
)
def test_settings_out_of_their_range_are_refused_and_not_taken(kind, settings, message):
    pipe = drop_in(kind, hand_over=0.2)
    before, config = pipe.extras, dict(pipe.config)
    with pytest.raises(UserError, match=message):
        pipe.set_extras(**settings)
    assert pipe.extras == before
    assert dict(pipe.config) == config
    with pytest.raises(UserError, match=message):
        drop_in(kind, **settings)


def test_an_unknown_setting_is_refused(kind):
    with pytest.raises(TypeError, match="handover"):
        drop_in(kind).set_extras(handover=0.2)


@pytest.mark.sample("*-sd", "*-flux", "*-dit")
@every
@pytest.mark.parametrize("settings", [{"domain_guidance": True}, {"hand_over": 0.5}])
def test_nothing_to_switch_off_is_told(kind, settings):
    with pytest.raises(UserError, match="nothing to switch off: no adapter acts in the denoiser"):
        draw(drop_in(kind, **settings), kind)


@pytest.mark.sample("*-sd", "0.0-sd3", "0.7-dit")
@pytest.mark.parametrize("kind", [*UNETS, "sd3", "flux", "dit"], indirect=True)
@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_guidance_at_which_domain_guidance_does_nothing_is_told(kind, scale):
    pipe = drop_in(kind, **source_of(kind), domain_guidance=True)
    name = "true_cfg_scale" if plain(kind) == "flux" else "guidance_scale"
    with pytest.raises(UserError, match=f"domain_guidance does nothing at {name} {scale:g}"):
        draw(pipe, kind, **{name: scale})


@pytest.mark.sample("sd", "xl-control", "flux", "dit")
@every
def test_a_source_of_another_model_is_told(kind):
    (name,) = source_of(kind)
    others = {"sd": "xl", "xl": "sd", "sd3": "dit", "flux": "sd3", "dit": "flux"}
    with pytest.raises(UserError, match=f"{name} does not belong to this model: its [a-z_]+ is "):
        drop_in(kind, **{name: source_unet(others[plain(kind)])})


@pytest.mark.sample("dit")
@every
def test_an_adapter_that_does_not_act_is_told(kind):
    pipe = drop_in(kind, tuned_adapters="other", domain_guidance=True)
    add_adapter(pipe.denoiser, "tuned", 1)
    with pytest.raises(UserError, match=r"names other, which does not act in the \w+ \(acting: tuned\)"):
        draw(pipe, kind)
    pipe.set_extras(tuned_adapters="tuned")
    draw(pipe, kind)
    pipe.denoiser.disable_adapters()
    with pytest.raises(UserError, match=r"names tuned, which does not act in the \w+ \(acting: none\)"):
        draw(pipe, kind)


@pytest.mark.sample("sd", "xl-control", "flux", "dit")
@every
def test_a_fused_adapter_does_not_count(kind):
    pipe = drop_in(kind, domain_guidance=True)
    add_adapter(pipe.denoiser, "tuned", 1)
    pipe.denoiser.fuse_lora()
    with pytest.raises(UserError, match="nothing to switch off"):
        draw(pipe, kind)


@pytest.mark.sample("sd", "xl-control", "flux", "dit")
@every
def test_several_adapters_must_be_told_apart(kind):
    pipe = drop_in(kind, domain_guidance=True)
    for i, name in enumerate(("tuned", "style")):
        add_adapter(pipe.denoiser, name, i)
    pipe.denoiser.set_adapters(["tuned", "style"])
    with pytest.raises(UserError, match=r"several adapters act in the \w+ \(tuned, style\); say which were tuned"):
        draw(pipe, kind)


def test_a_schedule_without_an_adapter_is_told(kind):
    pipe = drop_in(kind, source_unet=source_unet(kind), adapter_schedule={"kind": "power", "tau": 1.0})
    with pytest.raises(UserError, match="adapter_schedule has no adapter to act on"):
        draw(pipe, kind)


@pytest.mark.sample("sd-control")
def test_a_scheduler_without_noise_levels_is_told(kind):
    from diffusers import EDMEulerScheduler

    pipe = drop_in(kind, source_unet=source_unet(kind), hand_over=0.5)
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(UserError, match="schedules over u do not work with this scheduler: EDMEulerScheduler"):
        draw(pipe, kind)
