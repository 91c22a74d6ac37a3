"""Settings on stock pipelines of any task: their pictures against forwards and formulas by hand, and nothing left."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from difftuning_control import attach, detach
from difftuning_control.errors import UserError
from difftuning_control.pipelines.guiding import BY_CLASS
from support.other_tasks import BASED, EVERY, STEPS, TRUE_CFG, component_of, inputs, made
from support.pipeline_samples import add_adapter, draw, drop_in, same_traces, stock, traces
from support.tiny_models import tiny_sdxl

TOLERANCE = 1e-5
RESCALED = ("Qwen", "Lumina2")


def with_adapter(name: str, strength: float = 1.0) -> Any:
    """A pipeline with an adapter that changes what it draws, at a strength."""
    pipe = made(name)
    denoiser = getattr(pipe, component_of(pipe))
    add_adapter(denoiser, "tuned", 1, ["to_q", "to_v"])
    denoiser.set_adapters(["tuned"], [strength])
    return pipe


def picture(pipe: Any, name: str, **given: Any) -> np.ndarray:
    return pipe(**inputs(name, **given)).images


def rows_of(value: Any, which: slice, rows: int) -> Any:
    """Rows of a batch, in arguments of any nesting; Z-Image's are lists."""
    if isinstance(value, Tensor) and value.ndim and len(value) == rows:
        return value[which]
    if isinstance(value, list) and len(value) == rows and rows > 1:
        return value[which]
    if isinstance(value, (list, tuple)):
        return type(value)(rows_of(v, which, rows) for v in value)
    return {k: rows_of(v, which, rows) for k, v in value.items()} if isinstance(value, dict) else value


def by_hand(name: str, w: float, weaker: float = 0.0) -> np.ndarray:
    """The picture of two forwards and the formula: a stock pipeline whose denoiser is two, one forward of each a step.

    ε = ε_weaker(∅) + w (ε_tuned(c) − ε_weaker(∅)) is put in for both branches, so that the pipeline's own formula
    gives it whatever that is; where the pipeline scales it to the length of ε_tuned(c) afterwards, the two themselves.
    """
    pipe, component = made(name), component_of(made(name))
    tuned, pretrained = (getattr(with_adapter(name, s), component) for s in (1.0, weaker))
    guiding = BY_CLASS[name]
    waiting: list[Any] = []

    def joined(first: Any, second: Any) -> Any:
        return [*first, *second] if isinstance(first, list) else torch.cat([first, second])

    def formula(unconditional: Any, conditional: Any) -> Any:
        if isinstance(conditional, list):
            return [formula(u, c) for u, c in zip(unconditional, conditional)]
        return unconditional + w * (conditional - unconditional)

    def halves(*args: Any, **kwargs: Any) -> Any:
        sample = args[0] if args else kwargs["hidden_states"]
        rows, first = len(sample), guiding.rows == "unconditional first"
        which = [slice(0, rows // 2), slice(rows // 2, rows)]
        cut = [(rows_of(args, w_, rows), rows_of(kwargs, w_, rows)) for w_ in which]
        no, yes = cut if first else cut[::-1]
        guided = formula(pretrained(*no[0], **no[1])[0], tuned(*yes[0], **yes[1])[0])
        return (joined(guided, guided),)

    def turns(*args: Any, **kwargs: Any) -> Any:
        """The step's first forward waits for the second: it gives 0, and the second what makes 0 the right one."""
        if name.startswith(RESCALED):
            waiting.append(None)
            return (tuned if len(waiting) % 2 else pretrained)(*args, **kwargs)
        if not waiting:
            waiting.append(tuned(*args, **kwargs)[0])
            return (torch.zeros_like(waiting[0]),)
        guided = formula(pretrained(*args, **kwargs)[0], waiting.pop())
        return (guided / (1 - w),)  # the pipeline's own: n + w (0 − n)

    getattr(pipe, component).forward = halves if guiding.rows.endswith("first") else turns
    return picture(pipe, name)


@pytest.mark.sample(
    "StableDiffusionImg2Img*",
    "StableDiffusionXLInpaint*",
    "StableDiffusionControlNetInpaint*",
    "StableDiffusion3Img2Img*",
    "FluxInpaint*",
    "ZImageImg2Img*",
    "QwenImageInpaint*",
    "ChromaPipeline",
)
@pytest.mark.parametrize("name", EVERY)
def test_domain_guidance_is_two_forwards_and_the_formula(name):
    pipe = with_adapter(name)
    ordinary = picture(pipe, name)
    attach(pipe, domain_guidance=True)
    found = picture(pipe, name)
    w = inputs(name)["true_cfg_scale" if name.startswith(TRUE_CFG) else "guidance_scale"]
    w += name.startswith("Z")  # whose formula is c + s (c − ∅)
    assert np.abs(found - by_hand(name, w)).max() < TOLERANCE
    assert np.abs(found - ordinary).max() > 100 * TOLERANCE


def test_the_unconditional_rows_may_have_a_share_of_the_adapter():
    """0 is Domain Guidance, 1 the ordinary pipeline, and between them the adapter's weight is."""
    name, w = "StableDiffusionImg2ImgPipeline", 3.0
    pipe = with_adapter(name)
    ordinary = picture(pipe, name)
    found = [picture(attach(pipe, unconditional_strength=k), name) for k in (0.0, 0.4, 1.0)]
    assert np.array_equal(found[0], picture(attach(pipe, domain_guidance=True, unconditional_strength=None), name))
    assert np.abs(found[1] - by_hand(name, w, 0.4)).max() < TOLERANCE
    assert np.array_equal(found[2], ordinary)
    apart = [np.abs(one - found[1]).max() for one in (found[0], found[2])]
    assert min(apart) > 100 * TOLERANCE


@pytest.mark.sample("flux", "sd3")
@pytest.mark.parametrize("kind", ["sd", "xl", "sd3", "flux", "dit", "sd-control"])
def test_the_share_composes_with_a_schedule_and_is_saved(kind, tmp_path):
    """k s(u) in the unconditional rows: a pipeline of the adapter at k, with Domain Guidance's formula by turns."""
    table = {"kind": "table", "u": [0, 1], "strength": [0.5, 0.5]}
    pipe = drop_in(kind, adapter_schedule=table, unconditional_strength=0.5)
    add_adapter(pipe.denoiser, "tuned", 1)
    found = draw(pipe, kind)
    pipe.save_pretrained(tmp_path / "saved")
    again = type(pipe).from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert again.extras.unconditional_strength == 0.5
    assert np.abs(draw(again, kind) - found).max() < TOLERANCE
    half = drop_in(kind, unconditional_strength=0.5)
    add_adapter(half.denoiser, "tuned", 1)
    half.denoiser.set_adapters(["tuned"], [0.5])
    assert np.abs(draw(half, kind) - found).max() < TOLERANCE
    half.set_extras(domain_guidance=False)
    assert half.extras.unconditional_strength == 0
    assert np.abs(draw(half, kind) - found).max() > TOLERANCE


@pytest.mark.sample("StableDiffusionXLImg2Img*", "FluxImg2Img*", "ZImagePipeline")
@pytest.mark.parametrize("name", ["StableDiffusionXLImg2ImgPipeline", "FluxImg2ImgPipeline", *EVERY[len(BASED) :]])
def test_detached_it_is_what_it_was(name):
    pipe = with_adapter(name)
    before, own = picture(pipe, name), (type(pipe), dict(vars(pipe)), dict(pipe.config))
    left = traces(getattr(pipe, component_of(pipe)))
    assert attach(pipe, domain_guidance=True, hand_over=0.4) is pipe
    assert isinstance(pipe, own[0])
    assert type(pipe).__name__ == name
    during = picture(pipe, name)
    assert np.abs(during - before).max() > 100 * TOLERANCE
    assert same_traces(traces(getattr(pipe, component_of(pipe))), left)
    assert detach(pipe) is pipe
    now = {k: v for k, v in vars(pipe).items() if k in own[1]}
    assert type(pipe) is own[0]
    assert now.keys() == own[1].keys()
    assert "encode_prompt" not in vars(pipe)
    assert dict(pipe.config) == own[2]
    assert np.array_equal(picture(pipe, name), before)
    assert detach(pipe) is pipe


@pytest.mark.sample("Lumina2Pipeline")
@pytest.mark.parametrize(
    "name", [name for name in EVERY if name.startswith(("Lumina2", "Sana", "PixArt", "Z", "Qwen", "Chroma"))]
)
def test_below_u0_the_pretrained_model_goes_on(name):
    """At every family's own times: u0 = 1 is the pretrained picture, 0 the tuned one, and between them neither."""
    pipe, plain = with_adapter(name), made(name)
    tuned, pretrained = picture(pipe, name), picture(plain, name)
    middle = float(pipe.scheduler.timesteps.sort().values[STEPS // 2]) / 1000 + 0.002
    found = {u0: picture(attach(pipe, hand_over=u0), name) for u0 in (0.0, middle, 1.0)}
    assert np.array_equal(found[0.0], tuned)
    assert np.abs(found[1.0] - pretrained).max() < TOLERANCE
    assert min(np.abs(found[middle] - other).max() for other in (tuned, pretrained)) > TOLERANCE


def test_a_control_schedule_acts_on_a_stock_pipeline():
    name = "StableDiffusionControlNetImg2ImgPipeline"
    pipe = with_adapter(name)
    before = picture(pipe, name)
    late = {"kind": "table", "u": [0, 0.3, 0.4, 1], "strength": [1, 1, 0, 0]}
    found = picture(attach(pipe, control_schedule=late), name)
    assert np.abs(found - before).max() > TOLERANCE
    (use,) = pipe.control_use
    assert use.run > 0
    assert use.skipped > 0
    attach(pipe, control_schedule=None)
    assert np.array_equal(picture(pipe, name), before)


def test_full_weights_take_their_source():
    name = "StableDiffusionInpaintPipeline"
    tuned, pretrained = made(name, 3), made(name)
    pipe = attach(made(name, 3), source=pretrained.unet, hand_over=1.0)
    tuned.unet.load_state_dict(pretrained.unet.state_dict())
    assert np.array_equal(picture(pipe, name), picture(tuned, name))
    with pytest.raises(UserError, match="source_unet does not belong to this model"):
        attach(made(name), source=stock("xl").unet, domain_guidance=True)
    with pytest.raises(UserError, match="unconditional_strength between 0 and 1 needs an adapter"):
        picture(attach(pipe, unconditional_strength=0.5), name)


def test_a_text_encoder_s_adapter_acts_on_negative_prompts_with_its_share():
    name = "StableDiffusionImg2ImgPipeline"
    pipe, seen = with_adapter(name), []
    add_adapter(pipe.text_encoder, "tuned", 1, ["q_proj", "v_proj"])
    keep = pipe.unet.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["encoder_hidden_states"]), with_kwargs=True
    )
    picture(attach(pipe, domain_guidance=True), name)
    keep.remove()
    detach(pipe)
    with torch.no_grad():
        tuned = pipe.encode_prompt(["red 1"], "cpu", 1, True, ["dog"])
        pipe.text_encoder.disable_adapters()
        plain = pipe.encode_prompt(["red 1"], "cpu", 1, True, ["dog"])
    assert (seen[0] - torch.cat([plain[1], tuned[0]])).abs().max() < TOLERANCE
    assert (tuned[1] - plain[1]).abs().max() > 10 * TOLERANCE


def test_an_ip_adapter_s_picture_goes_on_being_seen():
    """Its projection hangs on the UNet, which the weights are switched in."""
    pipe = with_adapter("StableDiffusionImg2ImgPipeline")
    name = "StableDiffusionImg2ImgPipeline"
    torch.manual_seed(4)
    size, layers = pipe.unet.config.cross_attention_dim, {}
    cross = [m for n, m in pipe.unet.named_modules() if n.endswith("attn2")]
    for i, attention in enumerate(cross):
        for part in ("k", "v"):
            layers[f"{2 * i + 1}.to_{part}_ip.weight"] = 0.2 * torch.randn(attention.inner_dim, size)
    projection = {"proj.weight": torch.randn(size * 4, 6), "proj.bias": torch.zeros(size * 4)}
    projection |= {"norm.weight": torch.ones(size), "norm.bias": torch.zeros(size)}
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    embeds = torch.randn(2, 1, 6)
    ordinary = picture(pipe, name, ip_adapter_image_embeds=[embeds])
    found = picture(attach(pipe, domain_guidance=True), name, ip_adapter_image_embeds=[embeds])
    other = picture(pipe, name, ip_adapter_image_embeds=[0 * embeds])
    assert min(np.abs(found - one).max() for one in (ordinary, other)) > 100 * TOLERANCE


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_pipeline_whose_guidance_is_not_known_is_refused():
    base = stock("sd")
    for klass, why in (
        (diffusers.StableDiffusionPAGPipeline, "its batches have third rows"),
        (diffusers.StableDiffusionInstructPix2PixPipeline, "its batches have third rows"),
        (diffusers.StableDiffusionSAGPipeline, "how it does guidance is not known"),
    ):
        known = {k: v for k, v in base.components.items() if k != "image_encoder" or "SAG" not in klass.__name__}
        pipe = klass(**known, requires_safety_checker=False)
        with pytest.raises(UserError, match=f"a {klass.__name__} cannot take settings of Diff-Tuning: {why}"):
            attach(pipe, domain_guidance=True)
        assert type(pipe) is klass

    class Mine(diffusers.StableDiffusionPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return None

    with pytest.raises(UserError, match="a Mine cannot take settings"):
        attach(Mine(**base.components, requires_safety_checker=False), hand_over=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unconditional_strength": 1.5}, r"unconditional_strength is 1\.5; expected 0 to 1"),
        ({"unconditional_strength": 0.5, "domain_guidance": False}, "give domain_guidance=True, or unconditional_str"),
        ({"control_schedule": {"kind": "power", "tau": 1}}, "the pipeline has none; leave it out"),
        ({"hand_over": 2}, "hand_over is 2; expected 0 to 1"),
    ],
)
def test_a_value_out_of_its_range_leaves_the_pipeline_as_it_was(settings, message):
    pipe = made("StableDiffusionImg2ImgPipeline")
    with pytest.raises(UserError, match=message):
        attach(pipe, **settings)
    assert type(pipe) is diffusers.StableDiffusionImg2ImgPipeline


def test_a_drop_in_has_its_own_settings():
    with pytest.raises(UserError, match=r"has settings of its own; give them to its set_extras"):
        attach(drop_in("sd"), domain_guidance=True)


def test_guidance_without_a_second_prediction_is_refused():
    pipe = with_adapter("QwenImagePipeline")
    given = inputs("QwenImagePipeline") | {"negative_prompt_embeds": None, "negative_prompt_embeds_mask": None}
    with pytest.raises(UserError, match='acts on the negative prompt, and there is none; give a negative_prompt, " "'):
        attach(pipe, domain_guidance=True)(**given)
    base = stock("flux")
    fill = diffusers.FluxFillPipeline(
        **{k: v for k, v in base.components.items() if "image_enc" not in k and "feat" not in k}
    )
    add_adapter(fill.transformer, "tuned", 1)
    attach(fill, domain_guidance=True)
    with pytest.raises(UserError, match="needs a second prediction with a scale, and a FluxFillPipeline has none"):
        fill(
            prompt="red",
            image=inputs("FluxInpaintPipeline")["image"],
            mask_image=inputs("FluxInpaintPipeline")["image"],
        )


@pytest.mark.parametrize("kind", ["sd", "xl", "sd-control"])
@pytest.mark.parametrize("given", [{"strength": 0.5}, {"image_": 1}, {"mask_image": None}], ids=str)
def test_arguments_that_a_class_does_not_use_are_refused(kind, given):
    pipe = drop_in(kind)
    (name,) = given
    with pytest.raises(UserError, match=f"a {type(pipe).__name__} does not use {name}; leave it out"):
        draw(pipe, kind, **given)
    plain = stock(kind)
    draw(plain, kind, **given)  # which swallows it
    with pytest.raises(UserError, match=f"does not use {name}"):
        draw(attach(plain), kind, **given)


def test_a_copy_of_an_attached_pipeline_is_detached_by_itself():
    pipe = attach(made("StableDiffusionImg2ImgPipeline"), hand_over=0.5)
    other = copy.deepcopy(pipe)
    detach(other)
    assert type(other) is diffusers.StableDiffusionImg2ImgPipeline
    assert type(pipe) is not type(other)
    again = diffusers.StableDiffusionPipeline.from_pipe(pipe)
    assert type(again) is diffusers.StableDiffusionPipeline


def test_a_control_schedule_acts_on_a_union_of_conditions():
    """Whose scales are a list in every forward."""
    union = pytest.importorskip("diffusers.models.controlnets.controlnet_union").ControlNetUnionModel
    base = tiny_sdxl()
    width = base.unet.config.block_out_channels[0]
    own = dict(union.from_unet(base.unet, load_weights_from_unet=False).config)
    own |= {"num_trans_channel": width, "num_trans_head": 2, "num_proj_channel": width}
    own |= {"conditioning_embedding_out_channels": (16, 32)}
    torch.manual_seed(0)
    controlnet = union(**{name: value for name, value in own.items() if not name.startswith("_")})
    for parameter in controlnet.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    parts = {n: m for n, m in base.components.items() if n not in ("image_encoder", "feature_extractor")}
    pipe = diffusers.StableDiffusionXLControlNetUnionPipeline(**parts, controlnet=controlnet)
    condition = Image.fromarray(np.full((16, 16, 3), 200, np.uint8))

    def drawn():
        asked = {"control_image": [condition], "control_mode": [0], "num_inference_steps": 3, "output_type": "np"}
        return pipe("red", height=16, width=16, generator=torch.Generator().manual_seed(0), **asked).images

    stock = drawn()
    attach(pipe, control_schedule={"kind": "constant", "psi": 1.0})
    assert np.array_equal(drawn(), stock)
    attach(pipe, control_schedule={"kind": "power", "tau": 1})
    assert not np.array_equal(drawn(), stock)
