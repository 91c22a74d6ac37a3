"""LoRA files under the published names of each model: the names that the tools' own maps have, and the way back."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from difftuning_control.adapters.attached import denoiser_of, unload_adapter
from difftuning_control.adapters.foreign import read_foreign
from difftuning_control.adapters.kinds import ADAPTER
from difftuning_control.adapters.loading import load_adapter
from difftuning_control.adapters.native_names import encoder_layer, plain_layers
from difftuning_control.errors import UserError
from difftuning_control.families.tunable import make_tunable
from difftuning_control.verbs.export.lora_formats import comfyui_tensors, encoder_tensors, kohya_tensors, lora_layers
from support.pipeline_samples import draw, stock
from support.tiny_models import tiny_flux, tiny_lumina2, tiny_pixart, tiny_sana, tiny_sd3
from support.tiny_sd import tiny_pipeline, tiny_xl_pipeline

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out")
ENCODER = ("q_proj", "k_proj", "v_proj", "out_proj")
PIPES: dict[str, Any] = {
    "sd": tiny_pipeline,
    "xl": tiny_xl_pipeline,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "lumina2": tiny_lumina2,
    "pixart": tiny_pixart,
}
FORMATS = [(k, f) for k in PIPES for f in ("kohya", "comfyui") if (k, f) != ("pixart", "kohya")]

# a block's keys and the shapes of their weights, as ComfyUI's and sd-scripts' own maps have them; d is the width
FLUX_BLOCKS = {
    "double_blocks.0.img_attn.qkv": (96, 32),
    "double_blocks.0.img_attn.proj": (32, 32),
    "double_blocks.0.img_mlp.0": (128, 32),
    "double_blocks.0.img_mlp.2": (32, 128),
    "double_blocks.0.txt_attn.qkv": (96, 32),
    "double_blocks.0.txt_attn.proj": (32, 32),
    "double_blocks.0.txt_mlp.0": (128, 32),
    "double_blocks.0.txt_mlp.2": (32, 128),
    "single_blocks.0.linear1": (224, 32),
    "single_blocks.0.linear2": (32, 160),
}
SD3_BLOCKS = {
    "joint_blocks.0.x_block.attn.qkv": (96, 32),
    "joint_blocks.0.x_block.attn.proj": (32, 32),
    "joint_blocks.0.x_block.mlp.fc1": (128, 32),
    "joint_blocks.0.x_block.mlp.fc2": (32, 128),
    "joint_blocks.0.context_block.attn.qkv": (96, 32),
    "joint_blocks.0.context_block.attn.proj": (32, 32),
    "joint_blocks.0.context_block.mlp.fc1": (128, 32),
    "joint_blocks.0.context_block.mlp.fc2": (32, 128),
}


def tuned(module: Any, ends: tuple[str, ...], rank: int = 3, seed: int = 1) -> Any:
    """A model with a LoRA on its layers of these names, that changes it much."""
    make_tunable(module)
    names = [n for n in plain_layers(module) if n.endswith(ends)]
    module.add_adapter(LoraConfig(r=rank, lora_alpha=5, target_modules=names), adapter_name=ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def written(pipe: Any, format: str) -> dict[str, Tensor]:
    _, denoiser = denoiser_of(pipe)
    make = {"kohya": kohya_tensors, "comfyui": comfyui_tensors}[format]
    found = make(lora_layers(denoiser, ADAPTER), denoiser)
    parts = {n: lora_layers(m, ADAPTER) for n in ("text_encoder", "text_encoder_2") if (m := getattr(pipe, n, None))}
    return found | encoder_tensors(parts, pipe, format == "kohya")


def updates(tensors: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """B A of each layer of a file in diffusers' names."""
    ends = (".lora_A.weight", ".lora_B.weight")
    names = {k.removesuffix(ends[0]) for k in tensors if k.endswith(ends[0])}
    return {n: scale * tensors[n + ends[1]].flatten(1) @ tensors[n + ends[0]].flatten(1) for n in names}


@pytest.mark.parametrize(("kind", "expected"), [("flux", FLUX_BLOCKS), ("sd3", SD3_BLOCKS)], ids=["flux", "sd3"])
def test_a_block_has_the_names_and_shapes_that_the_tools_have(kind, expected):
    pipe = PIPES[kind]()
    tuned(pipe.transformer, ATTENTION + MLP)
    for format, prefix in (("comfyui", "diffusion_model."), ("kohya", "lora_unet_")):
        if kind == "flux" or format == "comfyui":
            layers = [x for x in lora_layers(pipe.transformer, ADAPTER) if x.module != "proj_out"]
        make = comfyui_tensors if format == "comfyui" else kohya_tensors
        found = make(layers, pipe.transformer)
        for name, (out, into) in expected.items():
            key = prefix + (name.replace(".", "_") if format == "kohya" else name)
            assert found[f"{key}.lora_up.weight"].shape[0] == out, key
            assert found[f"{key}.lora_down.weight"].shape[1] == into, key
            assert found[f"{key}.lora_up.weight"].shape[1] == len(found[f"{key}.lora_down.weight"])
        blocks = {k.split(".lora_")[0].split(".alpha")[0] for k in found}
        marks = ("double_blocks", "single_blocks", "joint_blocks")
        first = {b for b in blocks if any(f"{m}{'_' if format == 'kohya' else '.'}0" in b for m in marks)}
        assert len(first) == len(expected)


@pytest.mark.sample("flux-*", "sd3-kohya", "lumina2-comfyui", "sd-comfyui", "xl-kohya")
@pytest.mark.parametrize(("kind", "format"), FORMATS)
def test_what_is_written_is_read_back_at_its_rank(kind, format):
    pipe = PIPES[kind]()
    component, denoiser = denoiser_of(pipe)
    tuned(denoiser, ATTENTION)
    if kind in ("sd", "xl", "sd3", "flux"):
        tuned(pipe.text_encoder, ENCODER, seed=2)
    found = read_foreign(written(pipe, format), pipe, component)
    modules = {component: denoiser, "text_encoder": getattr(pipe, "text_encoder", None)}
    expected = {
        f"{prefix}.{x.module}": x.scale * x.up.flatten(1) @ x.down.flatten(1)
        for prefix, module in modules.items()
        if hasattr(module, "peft_config")
        for x in lora_layers(module, ADAPTER)
    }
    assert found is not None
    assert {len(v) for k, v in found.items() if k.endswith("lora_A.weight")} == {3}
    torch.testing.assert_close(updates(found), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.sample("flux-kohya", "sd3-comfyui", "sd-comfyui")
@pytest.mark.parametrize(("kind", "format"), [(k, f) for k, f in FORMATS if k in ("sd", "xl", "sd3", "flux")])
def test_a_file_of_either_form_draws_what_the_adapter_drew(kind, format, tmp_path):
    pipe, plain = stock(kind), stock(kind)
    _, denoiser = denoiser_of(pipe)
    tuned(denoiser, ATTENTION)
    tuned(pipe.text_encoder, ENCODER, seed=2)
    save_file({k: v.contiguous() for k, v in written(pipe, format).items()}, tmp_path / "lora.safetensors")
    before = draw(plain, kind)
    load_adapter(plain, tmp_path / "lora.safetensors")
    expected = draw(pipe, kind)
    assert np.abs(draw(plain, kind) - expected).max() < 1e-4
    assert np.abs(before - expected).max() > 1e-2
    unload_adapter(plain)
    assert np.array_equal(draw(plain, kind), before)
    load_adapter(plain, tmp_path / "lora.safetensors", strength=0.0)
    assert np.abs(draw(plain, kind) - before).max() < 1e-5


def test_a_fused_layer_of_others_has_one_rank_for_its_rows():
    """As sd-scripts trains it: q, k and v share their downs."""
    pipe = tiny_flux()
    down, up = torch.randn(2, 32), torch.randn(96, 2)
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
    found = read_foreign(tensors, pipe, "transformer")
    assert found is not None
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        place = f"transformer.transformer_blocks.0.attn.{name}"
        assert torch.equal(found[f"{place}.lora_A.weight"], down)
        assert torch.equal(found[f"{place}.lora_B.weight"], 0.5 * up[32 * i : 32 * i + 32])


def test_the_last_modulation_has_its_halves_the_other_way_round():
    pipe = tiny_flux()
    tuned(pipe.transformer, ("norm_out.linear",))
    (layer,) = lora_layers(pipe.transformer, ADAPTER)
    found = comfyui_tensors([layer], pipe.transformer)
    up = found["diffusion_model.final_layer.adaLN_modulation.1.lora_up.weight"]
    assert torch.equal(up, torch.cat([layer.up[32:], layer.up[:32]]))
    back = read_foreign(found, pipe, "transformer")
    assert back is not None
    torch.testing.assert_close(back["transformer.norm_out.linear.lora_B.weight"], layer.up * 5 / 3)


def test_different_scales_of_one_published_layer_become_part_of_it():
    pipe = tiny_flux()
    config = {"target_modules": ["to_q", "to_k"], "r": 3, "lora_alpha": 6, "alpha_pattern": {"to_k": 1.5}}
    pipe.transformer.add_adapter(LoraConfig(init_lora_weights=False, **config), adapter_name=ADAPTER)
    layers = lora_layers(pipe.transformer, ADAPTER)
    back = read_foreign(comfyui_tensors(layers, pipe.transformer), pipe, "transformer")
    assert back is not None
    expected = {f"transformer.{x.module}": x.scale * x.up @ x.down for x in layers}
    assert len({x.scale for x in layers}) == 2
    torch.testing.assert_close(updates(back), expected, atol=1e-5, rtol=1e-5)


def test_text_encoders_have_the_tools_names():
    for make, kohya, comfyui in ((tiny_pipeline, "lora_te", "clip_l"), (tiny_xl_pipeline, "lora_te1", "clip_l")):
        pipe = make()
        tuned(pipe.text_encoder, ("layers.0.self_attn.q_proj",))
        parts = {"text_encoder": lora_layers(pipe.text_encoder, ADAPTER)}
        (layer,) = parts["text_encoder"]
        assert encoder_layer(pipe.text_encoder, layer.module) == "text_model.encoder.layers.0.self_attn.q_proj"
        for is_kohya, key in (
            (True, f"{kohya}_text_model_encoder_layers_0_self_attn_q_proj"),
            (False, f"text_encoders.{comfyui}.transformer.text_model.encoder.layers.0.self_attn.q_proj"),
        ):
            assert {k.split(".lora_")[0].removesuffix(".alpha") for k in encoder_tensors(parts, pipe, is_kohya)} == {
                key
            }


def test_a_file_for_another_model_is_refused_and_leaves_the_pipeline_as_it_was(tmp_path):
    pipe, other = tiny_flux(), tiny_sd3()
    tuned(other.transformer, ATTENTION)
    save_file(written(other, "comfyui"), tmp_path / "lora.safetensors")
    before = {n: p.clone() for n, p in pipe.transformer.named_parameters()}
    with pytest.raises(UserError, match="does not fit this model"):
        load_adapter(pipe, tmp_path / "lora.safetensors")
    torch.testing.assert_close(dict(pipe.transformer.named_parameters()), before, atol=0, rtol=0)


def test_sd_scripts_does_not_know_every_model():
    pipe = tiny_pixart()
    tuned(pipe.transformer, ATTENTION)
    layers = lora_layers(pipe.transformer, ADAPTER)
    with pytest.raises(UserError, match=r"sd-scripts has no PixArtTransformer2DModel .*--format comfyui or diffusers"):
        kohya_tensors(layers, pipe.transformer)
    sana = tiny_sana()
    tuned(sana.transformer, ("to_q",))
    with pytest.raises(UserError, match="how other tools name the layers of a SanaTransformer2DModel is not known"):
        comfyui_tensors(lora_layers(sana.transformer, ADAPTER), sana.transformer)
    flux = tiny_flux()
    tuned(flux.transformer, ("norm_out.linear",))
    with pytest.raises(UserError, match=r"would leave out the LoRA on final_layer\.adaLN_modulation\.1"):
        kohya_tensors(lora_layers(flux.transformer, ADAPTER), flux.transformer)


def test_lumina2_s_refiners_and_grouped_heads():
    """Keys and values of fewer heads are fewer rows."""
    pipe = tiny_lumina2()
    tuned(pipe.transformer, ATTENTION)
    found = comfyui_tensors(lora_layers(pipe.transformer, ADAPTER), pipe.transformer)
    names = {k.split(".lora_")[0] for k in found if ".lora_" in k}
    for part in ("layers", "noise_refiner", "context_refiner"):
        assert f"diffusion_model.{part}.0.attention.qkv" in names
        assert f"diffusion_model.{part}.0.attention.out" in names
    assert found["diffusion_model.layers.0.attention.qkv.lora_up.weight"].shape == (16 + 8 + 8, 9)


def test_qwen_image_has_diffusers_names():
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    tuned(transformer, ATTENTION)
    layers = lora_layers(transformer, ADAPTER)
    found = comfyui_tensors(layers, transformer)
    assert {k.split(".lora_")[0] for k in found if ".lora_" in k} == {f"diffusion_model.{x.module}" for x in layers}
