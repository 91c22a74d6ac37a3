"""ControlNets of Z-Image: what the stock pipeline does, piece by piece."""

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from difftuning_control import attach, load_adapter, unload_adapter
from difftuning_control.adapters.kinds import own_parts
from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.errors import UserError
from difftuning_control.families.control import to_tensor
from difftuning_control.families.loading import family_of, load_controlnet, load_family
from difftuning_control.families.z_image import LENT
from difftuning_control.recipe.adapter import AdapterConfig
from support.control_checks import (
    assert_adds_exactly_nothing,
    assert_predicts_as_in_the_stock_pipeline,
    assert_samples_as_the_stock_pipeline,
    conditions,
)
from support.drawing import PROMPTS, TOLERANCE, generators
from support.flow_families import STOCK, shorten
from support.tiny_flow import tiny_z_image
from support.tiny_models import tiny_sd3

pytestmark = pytest.mark.skipif(
    not hasattr(diffusers, "ZImageControlNetModel"),
    reason=f"diffusers {diffusers.__version__} has no ZImageControlNetModel",
)
SIDE, LAYERS = 16, 7  # of which a new ControlNet copies the first and the sixth


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch):
    shorten(monkeypatch)


def settings_of(module) -> dict:
    """Its configuration, without what diffusers notes of it: which of them are defaults, which `from_config` resets."""
    return {k: v for k, v in module.config.items() if not k.startswith("_")}


def filled(controlnet, whole) -> None:
    """Something in what starts at zero."""
    torch.manual_seed(3)
    for name, parameter in controlnet.named_parameters():
        if not set(whole).isdisjoint(name.split(".")):
            parameter.data = torch.randn(parameter.shape) * 0.3


def controlled():
    """A family with a ControlNet that does something."""
    found = family_of(tiny_z_image(layers=LAYERS))
    found.controlnet = found.new_controlnet(0)
    filled(found.controlnet, found.controlnet_whole)
    return found


@pytest.fixture
def family():
    return controlled()


def stock_picture(family, control, calls=None, steps: int = 3, prompts=PROMPTS):
    """A call of the stock pipeline under these conditions; `calls` is filled with those of the transformer."""

    def keep(module, args, kwargs, out):
        if calls is not None:
            calls.append(STOCK["z_image"].read(args, kwargs, out))

    handle = family.denoiser.register_forward_hook(keep, with_kwargs=True)
    pictures = family.control_pipeline()(
        prompt=list(prompts),
        height=SIDE,
        width=SIDE,
        num_inference_steps=steps,
        guidance_scale=2.0,
        generator=generators(0, 1),
        output_type="pt",
        max_sequence_length=64,
        control_image=to_tensor(control, (-1.0, 1.0)),
        controlnet_conditioning_scale=1.0,
    ).images
    handle.remove()
    return pictures


@pytest.mark.parametrize("channels", [4, 9])
def test_predict_with_a_controlnet_is_the_call_in_the_stock_controlnet_pipeline(family, channels):
    """Also of one that takes a mask and a picture beside the condition, as the Union ones since 2.0 do."""
    calls, control = [], conditions(SIDE)
    if channels != 4:
        config = settings_of(family.controlnet) | {"control_in_dim": channels}
        config |= {"add_control_noise_refiner": "control_noise_refiner", "control_refiner_layers_places": [0]}
        family.controlnet = type(family.controlnet).from_config(config)
        filled(family.controlnet, family.controlnet_whole)
    stock_picture(family, control, calls)
    assert len(calls) == 3
    told, empty = family.encode_prompts(PROMPTS), family.encode_prompts(["", ""])
    rows = {name: torch.cat([told[name], empty[name]]) for name in told}
    assert_predicts_as_in_the_stock_pipeline(family, calls, rows, control)


@pytest.mark.parametrize("offload", [False, True])
def test_a_sample_under_a_condition_is_the_stock_controlnet_pipelines_picture(family, offload):
    control = conditions(SIDE)
    expected = stock_picture(family, control)
    family.offload = offload
    assert_samples_as_the_stock_pipeline(family, expected, control)


def test_a_new_controlnet_copies_layers_and_adds_exactly_nothing():
    family = family_of(tiny_z_image(layers=LAYERS))
    config = dict(family.denoiser.config)
    found = family.controlnet = family.new_controlnet(1)
    assert found.config.control_layers_places == [0, 5]
    assert dict(family.denoiser.config) == config
    family.check_controlnet(found, "of its own")
    weights, its = family.denoiser.state_dict(), found.state_dict()
    zeros = {n for n in its if n.split(".")[-2] in ("before_proj", "after_proj")}
    assert zeros
    assert not any(its[n].any() for n in zeros)
    places = {"control_layers.0": "layers.0", "control_layers.1": "layers.5"}
    places |= {"control_all_x_embedder": "all_x_embedder", "control_noise_refiner": "noise_refiner"}
    for name in its.keys() - zeros:
        ours = next(part for part in places if name.startswith(part))
        assert torch.equal(its[name], weights[places[ours] + name.removeprefix(ours)]), name
    latents = torch.randn(2, 4, 8, 8, generator=generators(0)[0])
    assert_adds_exactly_nothing(family, latents, conditions(SIDE))


def test_the_transformers_parts_are_lent_and_never_the_controlnets_own(family, tmp_path):
    own = set(family.controlnet.state_dict())
    stock_picture(family, conditions(SIDE), steps=1)
    family.predict(
        family.model,
        torch.randn(2, 4, 8, 8),
        torch.tensor([0.5, 0.5]),
        family.encode_prompts(PROMPTS) | {"control": conditions(SIDE)},
    )
    assert set(family.controlnet.state_dict()) == own
    assert not any(name.startswith(LENT) for name in own)
    family.save_controlnet(tmp_path, family.controlnet)
    loaded = load_controlnet(family_of(tiny_z_image(layers=LAYERS)), str(tmp_path))
    torch.testing.assert_close(loaded.state_dict(), family.controlnet.state_dict(), atol=0, rtol=0)


def test_a_controlnet_that_does_not_fit_is_refused_with_what_differs(family, tmp_path):
    for key, said in (("dim", "its dim is 7"), ("control_in_dim", "its control_in_dim is 3")):
        other = family.new_controlnet(0)
        other.register_to_config(**{key: 7 if key == "dim" else 3})
        with pytest.raises(UserError, match=f"does not fit this model: {said}"):
            family.check_controlnet(other, "there")
    family.new_controlnet(0).save_pretrained(tmp_path / "controlnet")
    tiny_z_image(layers=3).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="it adds to layer 5, and the model has 3"):
        load_controlnet(load_family(str(tmp_path / "model")), str(tmp_path / "controlnet"))


UNION = {
    "1.0": {"control_in_dim": 4, "add_control_noise_refiner": None},
    "2.0": {"control_in_dim": 9, "add_control_noise_refiner": "control_layers", "control_refiner_layers_places": [0]},
    "2.1": {
        "control_in_dim": 9,
        "add_control_noise_refiner": "control_noise_refiner",
        "control_refiner_layers_places": [0],
    },
}


@pytest.mark.parametrize("version", UNION)
def test_a_union_controlnet_is_read_from_its_file_as_diffusers_reads_it(family, version, tmp_path):
    """Its layout is what diffusers' own loader takes, which is told the configuration that ours finds out."""
    layers = 2 if version == "1.0" else 4
    places = list(range(0, LAYERS, LAYERS // layers))[:layers]
    made = type(family.controlnet).from_config(
        settings_of(family.controlnet) | {"control_layers_places": places} | UNION[version]
    )
    assert (made.control_noise_refiner is None) == (version == "2.0")
    torch.manual_seed(3)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.2
    state = made.state_dict()
    if version == "2.0":  # the published file has a refiner, which is not used
        state |= {"control_noise_refiner.0.before_proj.weight": torch.zeros(16, 16)}
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "union.safetensors")
    found = load_controlnet(family, str(tmp_path / "union.safetensors"))
    assert settings_of(found) == settings_of(made)
    made.save_config(tmp_path)
    theirs = type(made).from_single_file(str(tmp_path / "union.safetensors"), config=str(tmp_path))
    torch.testing.assert_close(found.state_dict(), theirs.state_dict(), atol=0, rtol=0)
    calls, control = [], conditions(SIDE)
    family.controlnet = found
    stock_picture(family, control, calls, steps=1)
    told, empty = family.encode_prompts(PROMPTS), family.encode_prompts(["", ""])
    rows = {n: torch.cat([told[n], empty[n]]) for n in told} | {"control": control.repeat(2, 1, 1, 1)}
    with torch.no_grad():
        torch.testing.assert_close(family.predict(family.model, *calls[0][:2], rows), calls[0][2], **TOLERANCE)


def test_a_file_that_is_no_controlnet_of_z_image_is_refused(family, tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="holds no ControlNet of Z-Image"):
        load_controlnet(family, str(tmp_path / "other.safetensors"))
    other = family_of(tiny_sd3())
    with pytest.raises(UserError, match="is a file; for a StableDiffusion3Pipeline give a directory"):
        load_controlnet(other, str(tmp_path / "other.safetensors"))


def tuned(folder, **adapter):
    """A family with a LoRA that does something, which is saved too."""
    found = controlled()
    tuning = AdapterTuning(found, AdapterConfig(**adapter), seed=1)
    torch.manual_seed(2)
    for parameter in found.denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * 0.2
    tuning.save(folder)
    return found


def test_a_tlora_on_the_refiners_is_masked_where_the_controlnet_runs_them(tmp_path):
    """The ControlNet runs them before the transformer does, which alone told the mask its timestep."""
    tuned(tmp_path, kind="tlora", rank=4, min_rank=1)
    family, seen = controlled(), []
    load_adapter(family.control_pipeline(), tmp_path, "style")
    mask = own_parts(family.denoiser)["style"]
    layer = next(m for n, m in family.denoiser.named_modules() if "noise_refiner" in n and n.endswith("lora_A.style"))
    layer.register_forward_hook(lambda *_: seen.append(mask.gate.sum(1).tolist()))
    stock_picture(family, conditions(SIDE))
    by_step = [seen[i : i + len(seen) // 3] for i in range(0, len(seen), len(seen) // 3)]
    assert len(by_step) == 3
    assert all(found == step[0] for step in by_step for found in step)  # in the ControlNet as in the transformer
    assert by_step[0] != by_step[-1]


@pytest.mark.parametrize("settings", [{"hand_over": 0.3}, {"domain_guidance": True}])
def test_settings_of_the_adapter_are_refused_where_the_controlnet_runs_tuned_layers(settings, tmp_path):
    tuned(tmp_path, rank=2)
    pipe = controlled().control_pipeline()
    load_adapter(pipe, tmp_path)
    attach(pipe, **settings)
    with pytest.raises(UserError, match="runs layers of the transformer that the adapter tuned"):
        pipe(PROMPTS[0], height=SIDE, width=SIDE, num_inference_steps=1, control_image=to_tensor(conditions(SIDE)[:1]))


@pytest.mark.parametrize("settings", [{"unconditional_strength": 1.0}, {}], ids=["ordinary", "none"])
def test_settings_that_change_nothing_there_are_let_through(settings, tmp_path):
    """Ordinary guidance, and none at all."""
    tuned(tmp_path, rank=2)
    given = {"height": SIDE, "width": SIDE, "num_inference_steps": 1, "output_type": "np"}
    given["control_image"] = to_tensor(conditions(SIDE)[:1])
    given["guidance_scale"] = 3.0 if settings else 0.0
    pipe = controlled().control_pipeline()
    load_adapter(pipe, tmp_path)
    expected = pipe(PROMPTS[0], **given, generator=generators(0)).images
    attach(pipe, domain_guidance=True, **settings)
    assert np.array_equal(pipe(PROMPTS[0], **given, generator=generators(0)).images, expected)


def test_all_weights_are_refused_there_too(tmp_path):
    pipe = controlled().control_pipeline()
    attach(pipe, source=tiny_z_image(seed=4, layers=LAYERS).transformer, hand_over=0.3)
    with pytest.raises(UserError, match="runs layers of the transformer that the adapter tuned"):
        pipe(PROMPTS[0], height=SIDE, width=SIDE, num_inference_steps=1, control_image=to_tensor(conditions(SIDE)[:1]))


def test_a_tlora_that_a_controlnet_was_put_beside_later_is_told_and_leaves_nothing(tmp_path):
    tuned(tmp_path, kind="tlora", rank=4, min_rank=1)
    family = controlled()
    load_adapter(family.pipe, tmp_path, "style")
    family.sample(PROMPTS, generators(0, 1), steps=1, guidance_scale=1.0, resolution=SIDE)  # at a timestep of its own
    with pytest.raises(UserError, match="load the adapter into the pipeline that has the ControlNet"):
        stock_picture(family, conditions(SIDE))
    unload_adapter(family.pipe, "style")
    pipe = family.control_pipeline()
    load_adapter(pipe, tmp_path, "style")
    hooks = family.controlnet._forward_pre_hooks
    assert len(hooks) == 1
    unload_adapter(pipe, "style")
    assert len(hooks) == 0
