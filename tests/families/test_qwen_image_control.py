"""ControlNets of Qwen-Image: what the stock pipeline does, piece by piece."""

import inspect
import json

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from difftuning_control.errors import UserError
from difftuning_control.families.control import to_tensor
from difftuning_control.families.loading import family_of, load_controlnet
from support.control_checks import (
    assert_adds_exactly_nothing,
    assert_predicts_as_in_the_stock_pipeline,
    assert_samples_as_the_stock_pipeline,
    conditions,
)
from support.drawing import PROMPTS, generators
from support.flow_families import STOCK, shorten
from support.tiny_flow import tiny_qwen_image

pytestmark = pytest.mark.skipif(
    not hasattr(diffusers, "QwenImageControlNetModel"),
    reason=f"diffusers {diffusers.__version__} has no QwenImageControlNetModel",
)
SIDE = 16


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch):
    shorten(monkeypatch)


@pytest.fixture
def family():
    """A ControlNet that adds something, and an autoencoder without a spread."""
    found = family_of(tiny_qwen_image(layers=3))
    found.controlnet = found.new_controlnet(0)
    torch.manual_seed(3)
    for name, parameter in found.controlnet.named_parameters():
        if name.startswith(found.controlnet_whole):
            parameter.data = torch.randn(parameter.shape) * 0.3
    found.pipe.vae.quant_conv.weight.data[4:] = 0
    found.pipe.vae.quant_conv.bias.data[4:] = -30
    return found


def stock_picture(family, control, calls=None):
    """A call of the stock pipeline under these conditions; `calls` is filled with those of the transformer."""

    def keep(module, args, kwargs, out):
        if calls is not None:
            calls.append(STOCK["qwen_image"].read(args, kwargs, out))

    handle = family.denoiser.register_forward_hook(keep, with_kwargs=True)
    pictures = family.control_pipeline()(
        prompt=list(PROMPTS),
        negative_prompt=["", ""],
        height=SIDE,
        width=SIDE,
        num_inference_steps=3,
        true_cfg_scale=3.0,
        generator=generators(0, 1),
        output_type="pt",
        max_sequence_length=64,
        control_image=to_tensor(control, (-1.0, 1.0)),
    ).images
    handle.remove()
    return pictures


def test_predict_with_a_controlnet_is_the_call_in_the_stock_controlnet_pipeline(family):
    calls, control = [], conditions(SIDE)
    stock_picture(family, control, calls)
    assert len(calls) == 6  # the second of each two is of the empty prompt, with what the ControlNet made of the other
    rows = family.encode_prompts(PROMPTS)
    assert_predicts_as_in_the_stock_pipeline(family, calls[::2], rows, control)


@pytest.mark.parametrize("offload", [False, True])
def test_a_sample_under_a_condition_is_the_stock_controlnet_pipelines_picture(family, offload):
    control = conditions(SIDE)
    expected = stock_picture(family, control)
    family.offload = offload
    assert_samples_as_the_stock_pipeline(family, expected, control)


@pytest.mark.parametrize(("layers", "blocks"), [(3, 3), (7, 4), (10, 5)])  # 7: two of its blocks read each of four
def test_a_new_controlnet_copies_the_first_blocks_and_adds_exactly_nothing(layers, blocks):
    family = family_of(tiny_qwen_image(layers=layers))
    torch.manual_seed(5)
    family.denoiser.txt_norm.weight.data = torch.rand(16) + 0.5  # which diffusers' own from_transformer leaves out
    config = dict(family.denoiser.config)
    found = family.controlnet = family.new_controlnet(1)
    assert len(found.transformer_blocks) == len(found.controlnet_blocks) == blocks
    assert dict(family.denoiser.config) == config
    family.check_controlnet(found, "of its own")
    weights, its = family.denoiser.state_dict(), found.state_dict()
    fresh = {n for n in its if n.startswith(family.controlnet_whole)}
    assert not any(its[n].any() for n in fresh)
    assert all(torch.equal(its[n], weights[n]) for n in its.keys() - fresh)
    latents = torch.randn(2, 4, 8, 8, generator=generators(0)[0])
    assert_adds_exactly_nothing(family, latents, conditions(SIDE))


def test_a_controlnet_that_does_not_fit_is_refused_with_what_differs(family):
    for key in ("in_channels", "num_attention_heads", "joint_attention_dim"):
        other = family.new_controlnet(0)
        other.register_to_config(**{key: 7})
        with pytest.raises(UserError, match=f"does not fit this model: its {key} is 7"):
            family.check_controlnet(other, "there")
    other = family.new_controlnet(0)
    other.register_to_config(extra_condition_channels=1)
    with pytest.raises(UserError, match="takes 1 channels beside the condition's"):
        family.check_controlnet(other, "there")


def test_a_qwen_image_that_edits_pictures_is_refused():
    pipe = tiny_qwen_image()
    pipe.transformer.register_to_config(zero_cond_t=True)
    with pytest.raises(UserError, match="zero_cond_t is true, as of a Qwen-Image that edits pictures"):
        family_of(pipe)


def test_blocks_of_a_controlnet_that_nobody_reads_do_not_train():
    """Seven layers read five blocks by twos, and so four of them."""
    family = family_of(tiny_qwen_image(layers=7))
    config = {k: v for k, v in family.new_controlnet(0).config.items() if not k.startswith("_")}
    family.controlnet = type(family.new_controlnet(0)).from_config(config | {"num_layers": 5})
    torch.manual_seed(3)
    for parameter in family.controlnet.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.2
    rows = family.encode_prompts(PROMPTS) | {"control": conditions(SIDE)}
    latents = torch.randn(2, 4, 8, 8, generator=generators(0)[0])
    family.denoiser.requires_grad_(False)
    family.predict(family.model, latents, torch.tensor([0.3, 0.9]), rows).square().mean().backward()
    still = {n for n, p in family.controlnet.named_parameters() if p.grad is None or not p.grad.any()}
    unused = family.unused_parameters(family.controlnet)
    assert still == {n for n, _ in family.controlnet.named_parameters() if n.startswith(unused)}
    assert "controlnet_blocks.4.weight" in still


def settings_of(controlnet) -> dict:
    known = inspect.signature(type(controlnet).__init__).parameters
    return {k: list(v) if isinstance(v, tuple) else v for k, v in controlnet.config.items() if k in known}


@pytest.mark.parametrize("form", ["directory", "file"])
def test_a_union_controlnet_is_read_and_drawn_with_as_diffusers_does(family, form, tmp_path):
    """As published: a configuration of an earlier diffusers, without `extra_condition_channels` and with keys that are
    gone; and its tensors alone, as they are kept for ComfyUI. It has no modes: the picture is all that it is told."""
    made = family.controlnet
    made.save_pretrained(tmp_path)
    config = {k: v for k, v in settings_of(made).items() if k != "extra_condition_channels"}
    config |= {"_class_name": "QwenImageControlNetModel", "guidance_embeds": False, "pooled_projection_dim": 768}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    found = load_controlnet(family, str(tmp_path if form == "directory" else weights))
    theirs = type(made).from_pretrained(tmp_path)
    assert settings_of(found) == settings_of(theirs)
    torch.testing.assert_close(found.state_dict(), theirs.state_dict(), atol=0, rtol=0)
    control = conditions(SIDE)
    family.controlnet = theirs
    expected = stock_picture(family, control)
    family.controlnet = found
    assert_samples_as_the_stock_pipeline(family, expected, control)


def test_a_file_of_another_architecture_is_refused(family, tmp_path):
    for tensors in ({"control_img_in.weight": torch.zeros(2, 2)}, {"controlnet_blocks.0.x_rms.weight": torch.zeros(2)}):
        save_file(tensors, tmp_path / "other.safetensors")
        with pytest.raises(UserError, match=r"no controlnet_x_embedder .* Fun and blockwise ones are other architect"):
            load_controlnet(family, str(tmp_path / "other.safetensors"))
    state = {n: t.contiguous() for n, t in family.controlnet.state_dict().items()}
    save_file(state | {"controlnet_x_embedder.weight": torch.zeros(16, 17)}, tmp_path / "mask.safetensors")
    with pytest.raises(UserError, match="takes 1 channels beside the condition's"):
        load_controlnet(family, str(tmp_path / "mask.safetensors"))
