"""LoRA files for kohya and ComfyUI, read back by the rules that those tools' names follow, give the fused weights."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoHaConfig, LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from difftuning_control.adapters.kinds import ADAPTER, LAYERS
from difftuning_control.adapters.tuning import merged
from difftuning_control.errors import UserError
from difftuning_control.families.loading import embedded_model
from difftuning_control.verbs.export.lora_formats import comfyui_tensors, kohya_tensors, lora_layers
from support.tiny_models import tiny_dit

SHALLOW = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
DEEP = {  # as Stable Diffusion 1.5
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (8, 16, 16, 16),
    "layers_per_block": 2,
}
UNETS: dict[str, dict[str, Any]] = {
    "shallow": SHALLOW,
    "deep": DEEP,
    "uneven": {**DEEP, "use_linear_projection": True, "layers_per_block": [1, 3, 2, 1]},
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 3],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
}
ALPHAS = [("shallow", 2, 2.0), ("shallow", 4, 1.0), *((name, 3, 7.0) for name in (*UNETS, "embedded"))]
OUTSIDE = ("conv_in", "conv_out", "time_embedding", "add_embedding")  # of any block
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def make_unet(name: str) -> UNet2DConditionModel:
    torch.manual_seed(0)
    if name == "embedded":
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(embedded_model() / "unet"))
    settings = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**settings, **UNETS[name]})


def modules_of(unet: nn.Module, targets: str) -> list[str]:
    """Names of the layers that can bear a LoRA: all, those in blocks, or the attention projections."""
    names = [n for n, m in unet.named_modules() if isinstance(m, LAYERS)]
    if targets == "blocks":
        return [n for n in names if not n.startswith(OUTSIDE)]
    return names if targets == "all" else [n for n in names if n.endswith(ATTENTION)]


def with_lora(unet: UNet2DConditionModel, targets: str, rank: int = 3, alpha: float = 7.0) -> UNet2DConditionModel:
    """The UNet with random adapters that change its weights much."""
    config = {"r": rank, "lora_alpha": alpha, "target_modules": modules_of(unet, targets), "init_lora_weights": False}
    unet.add_adapter(LoraConfig(**config), adapter_name=ADAPTER)
    return unet


# --- readers of their own, written from the rules of the names ------------------------------------------------------


def ldm_blocks(config: Any) -> Iterator[tuple[str, str]]:
    """(LDM's block and place in it, diffusers' name of what lies there), in the order in which LDM builds its UNet.

    The encoder is one list: the first convolution, then for each level its resnets, each followed by an attention
    where the level attends, then a downsampler, but for the last level. The decoder is one list that goes through the
    levels from below, each with one resnet more, whose last block also has the upsampler, but for the topmost level.
    """
    count, depths = len(config.down_block_types), config.layers_per_block
    depths = [depths] * count if isinstance(depths, int) else depths
    encoder: list[list[str]] = [["conv_in"]]
    for level, kind in enumerate(config.down_block_types):
        for i in range(depths[level]):
            found = [f"down_blocks.{level}.resnets.{i}"]
            encoder.append(found + [f"down_blocks.{level}.attentions.{i}"] * ("CrossAttn" in kind))
        encoder += [[f"down_blocks.{level}.downsamplers.0"]] * (level < count - 1)
    decoder: list[list[str]] = []
    for level, kind in enumerate(config.up_block_types):
        for i in range(depths[count - 1 - level] + 1):
            found = [f"up_blocks.{level}.resnets.{i}"]
            decoder.append(found + [f"up_blocks.{level}.attentions.{i}"] * ("CrossAttn" in kind))
        if level < count - 1:
            decoder[-1].append(f"up_blocks.{level}.upsamplers.0")
    for name, blocks in (("input_blocks", encoder), ("output_blocks", decoder)):
        for i, block in enumerate(blocks):
            yield from ((f"{name}.{i}.{j}", part) for j, part in enumerate(block))
    yield from (
        (f"middle_block.{i}", f"mid_block.{part}") for i, part in enumerate(("resnets.0", "attentions.0", "resnets.1"))
    )
    yield from (("time_embed", "time_embedding"), ("out.2", "conv_out"), ("label_emb.0", "add_embedding"))


INNER = {  # LDM's sequences of layers by number, diffusers' by name
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "op": "conv",
    "skip_connection": "conv_shortcut",
    "0": "linear_1",
    "2": "linear_2",
}


def from_ldm(unet: nn.Module, config: Any) -> dict[str, str]:
    """Diffusers' name of every layer of the UNet by LDM's."""
    found = {}
    names = {n for n, m in unet.named_modules() if isinstance(m, LAYERS)}
    for place, part in ldm_blocks(config):
        for name in (n for n in names if n == part or n.startswith(f"{part}.")):
            rest = name[len(part) + 1 :]
            inner = {v: k for k, v in INNER.items() if k != "op" or "downsamplers" in part}.get(rest, rest)
            found[f"{place}.{inner}".rstrip(".")] = name
    return found


def apply(tensors: dict[str, Tensor], names: dict[str, str], base: nn.Module) -> dict[str, Tensor]:
    """The base's weights with W + (alpha / r) · up · down for each layer of a file; every key must find its layer."""
    state, left = copy.deepcopy(base.state_dict()), dict(tensors)
    for key, name in names.items():
        if f"{key}.lora_down.weight" not in left:
            continue
        down, up, alpha = (left.pop(f"{key}.{part}") for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        weight = state[f"{name}.weight"]
        update = up.flatten(1).double() @ down.flatten(1).double() * (alpha.double() / down.shape[0])
        state[f"{name}.weight"] = (weight.double() + update.reshape(weight.shape)).float()
    assert not left, list(left)[:3]
    return state


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(found), dict(expected), atol=1e-6, rtol=1e-6)


def changed(found: dict[str, Tensor], base: nn.Module) -> set[str]:
    return {n.removesuffix(".weight") for n, t in base.state_dict().items() if not torch.equal(found[n], t)}


# --- the formats ----------------------------------------------------------------------------------------------------


@pytest.mark.sample("attention-embedded-3-7.0")
@pytest.mark.parametrize(("name", "rank", "alpha"), ALPHAS)
@pytest.mark.parametrize("targets", ["attention", "all"])
def test_comfyui_reads_every_layer_under_its_own_name(name, targets, rank, alpha):
    base = make_unet(name)
    unet = with_lora(make_unet(name), targets, rank, alpha)
    tensors = comfyui_tensors(lora_layers(unet, ADAPTER), unet)
    names = {f"diffusion_model.{k}": v for k, v in from_ldm(base, base.config).items()}
    assert set(names.values()) == set(modules_of(base, "all"))
    found = apply(tensors, names, base)
    assert changed(found, base) == set(modules_of(base, targets))
    assert_close(found, merged(unet).state_dict())


@pytest.mark.sample("blocks-shallow-3-7.0")
@pytest.mark.parametrize(("name", "rank", "alpha"), ALPHAS)
@pytest.mark.parametrize("targets", ["attention", "blocks"])
def test_kohya_reads_every_layer_by_its_path_in_the_unet_that_it_trains(name, targets, rank, alpha):
    base = make_unet(name)
    unet = with_lora(make_unet(name), targets, rank, alpha)
    tensors = kohya_tensors(lora_layers(unet, ADAPTER), unet)
    paths = from_ldm(base, base.config) if name == "sdxl" else {n: n for n in modules_of(base, "blocks")}
    found = apply(tensors, {f"lora_unet_{k.replace('.', '_')}": v for k, v in paths.items()}, base)
    assert changed(found, base) == set(modules_of(base, targets))
    assert_close(found, merged(unet).state_dict())


@pytest.mark.sample("shallow-blocks")
@pytest.mark.parametrize("targets", ["attention", "blocks"])
@pytest.mark.parametrize("name", ["shallow", "deep", "sdxl"])
def test_stock_diffusers_reads_kohyas_file_too(name, targets, tmp_path):
    unet, plain = with_lora(make_unet(name), targets), make_unet(name)
    layers = lora_layers(unet, ADAPTER)
    save_file(kohya_tensors(layers, unet), tmp_path / "lora.safetensors")
    stock = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
    state, alphas, *_ = stock.lora_state_dict(tmp_path, weight_name="lora.safetensors", unet_config=plain.config)
    stock.load_lora_into_unet(state, alphas, plain, adapter_name=ADAPTER)
    assert {layer.module for layer in lora_layers(plain, ADAPTER)} == {layer.module for layer in layers}
    assert_close(merged(plain).state_dict(), merged(unet).state_dict())


def test_alpha_is_such_that_the_scale_is_pefts_own():
    unet = make_unet("shallow")
    config = {"target_modules": ["to_q", "to_v"], "init_lora_weights": False, "r": 4, "lora_alpha": 6.0}
    patterns = {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"attn2.to_v": 1.0}, "use_rslora": True}
    unet.add_adapter(LoraConfig(**config, **patterns), adapter_name=ADAPTER)
    base = make_unet("shallow")
    tensors = comfyui_tensors(lora_layers(unet, ADAPTER), unet)
    names = {f"diffusion_model.{k}": v for k, v in from_ldm(base, base.config).items()}
    assert_close(apply(tensors, names, base), merged(unet).state_dict())
    assert len({t.item() for k, t in tensors.items() if k.endswith(".alpha")}) == 3


# --- refusals -------------------------------------------------------------------------------------------------------


def test_layers_that_sd_scripts_would_leave_out_are_refused():
    unet = with_lora(make_unet("shallow"), "all")
    with pytest.raises(UserError, match=r"sd-scripts would leave out the LoRA on conv_in, time_embedding.linear_1"):
        kohya_tensors(lora_layers(unet, ADAPTER), unet)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["to_q"], use_dora=True),
        LoraConfig(r=2, target_modules=["to_q"], lora_bias=True, init_lora_weights=False),
        LoHaConfig(r=2, target_modules=["to_q"]),
    ],
    ids=["dora", "bias", "loha"],
)
def test_adapters_that_are_no_plain_lora_are_refused(config):
    unet = make_unet("shallow")
    unet.add_adapter(config, adapter_name=ADAPTER)
    with pytest.raises(UserError, match=r"export it with --format diffusers\.$"):
        lora_layers(unet, ADAPTER)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"down_block_types": ("AttnDownBlock2D", "CrossAttnDownBlock2D")}, "AttnDownBlock2D"),
        ({"mid_block_type": "UNetMidBlock2D"}, "UNetMidBlock2D"),
    ],
)
def test_blocks_that_ldm_has_not_are_refused(changes, named):
    unet = with_lora(make_unet("shallow"), "attention")
    unet.register_to_config(**changes)
    with pytest.raises(UserError, match=rf"LDM's UNet has no block like {named}; export with --format diffusers\.$"):
        comfyui_tensors(lora_layers(unet, ADAPTER), unet)


@pytest.mark.parametrize("make", [kohya_tensors, comfyui_tensors])
def test_a_model_that_the_tools_do_not_know_is_refused(make):
    with pytest.raises(UserError, match=r"DiTTransformer2DModel.*(export with|use) --format .*diffusers\.$"):
        make([], tiny_dit().transformer)
