"""LoRA files in the forms that people have: read whole and at their scale, or refused by what they are."""

from __future__ import annotations

import json
import os
import pickle
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from difftuning_control.adapters.attached import denoiser_of, merge_adapter, unload_adapter
from difftuning_control.adapters.loading import load_adapter
from difftuning_control.adapters.native_names import known_layers, plain_layers
from difftuning_control.adapters.snapshot import save_adapters
from difftuning_control.errors import UserError
from support.lora_files import PEFT, SPELLINGS, Layers, expected, random_lora, spelled, updates, written
from support.marks import need_pipeline
from support.tiny_flow import tiny_flux2_klein, tiny_qwen_image, tiny_z_image
from support.tiny_models import tiny_flux, tiny_pixart, tiny_sana, tiny_sd3
from support.tiny_sd import tiny_pipeline, tiny_xl_pipeline

PIPES: dict[str, Any] = {
    "sd": tiny_pipeline,
    "xl": tiny_xl_pipeline,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "flux2": tiny_flux2_klein,
    "z": tiny_z_image,
    "qwen": tiny_qwen_image,
    "sana": tiny_sana,
    "pixart": tiny_pixart,
}
NEWER = {"flux2": "Flux2KleinPipeline", "z": "ZImagePipeline", "qwen": "QwenImagePipeline"}


def pipe_of(kind: str) -> Any:
    """A tiny pipeline, which tests leave as it was."""
    if kind in NEWER:
        need_pipeline(NEWER[kind])
    return _made(kind)


@cache
def _made(kind: str) -> Any:
    return PIPES[kind]()


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def assert_adds(pipe: Any, path: Path, changes: dict[str, Tensor], atol: float = 1e-5) -> None:
    """Loaded it adds just these changes to the denoiser, and unloaded the pipeline is as it was."""
    denoiser = denoiser_of(pipe)[1]
    before = {n: p.clone() for n, p in denoiser.state_dict().items()}
    load_adapter(pipe, path)
    torch.testing.assert_close(updates(denoiser), changes, atol=atol, rtol=1e-4)
    unload_adapter(pipe)
    assert_same(before, denoiser.state_dict())


def assert_refused(pipe: Any, path: Path, said: str) -> None:
    """Refused in one sentence, and the pipeline is as it was."""
    before = {n: p.clone() for n, p in denoiser_of(pipe)[1].state_dict().items()}
    with pytest.raises(UserError, match=said) as refusal:
        load_adapter(pipe, path)
    assert str(refusal.value).endswith(".")
    assert ".." not in str(refusal.value)
    assert_same(before, denoiser_of(pipe)[1].state_dict())


# --- spellings ------------------------------------------------------------------------------------------------------


@pytest.mark.sample("sd-kohya", "sd-bare", "flux-kohya-parts", "sd3-comfyui", "sana-comfyui", "pixart-lycoris")
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", PIPES)
def test_diffusers_names_are_read_in_every_spelling(kind, spelling, tmp_path):
    pipe = pipe_of(kind)
    component, denoiser = denoiser_of(pipe)
    lora = random_lora(denoiser)
    for alpha in (None, 3.0):
        path = written(spelled(lora, spelling, component, alpha), tmp_path)
        assert_adds(pipe, path, expected(lora, alpha))


@pytest.mark.sample("flux-bare", "flux-peft", "sd3-named", "z-lycoris")
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", ["sd", "xl", "sd3", "flux", "flux2", "z", "pixart"])
def test_published_names_are_read_in_every_spelling(kind, spelling, tmp_path):
    pipe = pipe_of(kind)
    component, denoiser = denoiser_of(pipe)
    layers, lora, changes = plain_layers(denoiser), Layers(), {}
    for i, published in enumerate(p for p in known_layers(denoiser) if not p.is_swapped):
        rows = [layers[name].weight for name in published.modules]
        if rows[0].ndim == 4:
            continue
        generator = torch.Generator().manual_seed(i)
        a, b = (torch.randn(size, generator=generator) for size in ((2, rows[0].shape[1]), (sum(map(len, rows)), 2)))
        lora[published.name] = (a, b)
        changes |= {name: part @ a for name, part in zip(published.modules, b.split([len(r) for r in rows]))}
    assert len(lora) > 5
    assert_adds(pipe, written(spelled(lora, spelling, component), tmp_path), changes)


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_attention_processors_of_the_first_diffusers_are_read(prefix, tmp_path):
    pipe = pipe_of("sd")
    lora = random_lora(pipe.unet)
    tensors = {}
    for name, (a, b) in lora.items():
        older = prefix + name.replace(".to_out.0", ".to_out").replace(".to_", ".processor.to_") + "_lora"
        tensors |= {f"{older}.down.weight": a, f"{older}.up.weight": b}
    assert_adds(pipe, written(tensors, tmp_path), expected(lora))


def test_a_convolution_s_three_factors_are_one_lora(tmp_path):
    """LoCon with `use_cp`: up · mid · down, a 1×1, a 3×3 and a 1×1 convolution."""
    pipe = pipe_of("sd")
    name = "down_blocks.0.resnets.0.conv1"
    out, into = pipe.unet.get_submodule(name).weight.shape[:2]
    down, mid, up = torch.randn(2, into, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(out, 2, 1, 1)
    key = f"lora_unet_{name.replace('.', '_')}"
    tensors = {f"{key}.lora_{part}.weight": t for part, t in (("down", down), ("mid", mid), ("up", up))}
    path = written(tensors | {f"{key}.alpha": torch.tensor(1.0)}, tmp_path)
    impulse = torch.eye(into * 9).reshape(into * 9, into, 3, 3)
    steps = torch.nn.functional.conv2d(impulse, down)
    steps = torch.nn.functional.conv2d(torch.nn.functional.conv2d(steps, mid), up).flatten(1)
    assert_adds(pipe, path, {name: 0.5 * steps.T})


def test_factors_of_a_linear_layer_may_be_written_as_convolutions(tmp_path):
    """And the other way round: `proj_in` is either, by the version of Stable Diffusion."""
    pipe = pipe_of("sd")
    lora = random_lora(pipe.unet, ("to_q", "proj_in"))
    assert {a.ndim for a, _ in lora.values()} == {2, 4}
    other = {
        n: (a[..., None, None], b[..., None, None]) if a.ndim == 2 else (a[..., 0, 0], b[..., 0, 0])
        for n, (a, b) in lora.items()
    }
    assert_adds(pipe, written(spelled(other, "kohya", "unet"), tmp_path), expected(lora))


@pytest.mark.parametrize("spelling", ["kohya", "native"])
def test_different_ranks_keep_their_scale_when_saved_again(spelling, tmp_path):
    pipe, other = pipe_of("sd"), tiny_pipeline()
    lora = random_lora(pipe.unet)
    native = {f"unet.{n}.{end}": t for n, its in lora.items() for end, t in zip(PEFT, its)}
    tensors, alpha = (native, None) if spelling == "native" else (spelled(lora, "kohya", "unet", 3.0), 3.0)
    load_adapter(pipe, written(tensors, tmp_path))
    save_adapters(pipe, ["default"], tmp_path / "kept")
    unload_adapter(pipe)
    kept = {"weight_name": "pytorch_lora_weights.safetensors", "adapter_name": "default"}
    other.load_lora_weights(tmp_path / "kept" / "default", **kept)
    other.set_adapters(["default"], [0.5])
    halves = {name: 0.5 * change for name, change in expected(lora, alpha).items()}
    torch.testing.assert_close(updates(other.unet), halves, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "atol"), [("float16", 0.05), ("bfloat16", 0.3), ("float8_e4m3fn", 3.0)])
@pytest.mark.parametrize("spelling", ["kohya", "named"])
def test_lower_precisions_are_read(dtype, atol, spelling, tmp_path):
    pipe = pipe_of("sd")
    lora = random_lora(pipe.unet)
    half = getattr(torch, dtype)
    tensors = {k: v.to(half) for k, v in spelled(lora, spelling, "unet", 1.0).items()}
    rounded = {n: (a.to(half).float(), b.to(half).float()) for n, (a, b) in lora.items()}
    assert_adds(pipe, written(tensors, tmp_path), expected(rounded, 1.0), atol=1e-5)
    differs = max((x - y).abs().max() for x, y in zip(expected(rounded).values(), expected(lora).values()))
    assert 0 < differs < atol


@pytest.mark.parametrize("alpha", [torch.tensor(3), torch.tensor([3.0]), torch.tensor([[3.0]]).half()], ids=str)
def test_alpha_may_be_of_any_dtype_and_shape_of_one_number(alpha, tmp_path):
    pipe = pipe_of("sd")
    lora = random_lora(pipe.unet)
    tensors = spelled(lora, "kohya", "unet", 1.0)
    tensors = {key: alpha if key.endswith(".alpha") else value for key, value in tensors.items()}
    assert_adds(pipe, written(tensors, tmp_path), expected(lora, 3.0))


def test_what_a_header_says_of_the_base_changes_nothing(tmp_path):
    pipe = pipe_of("sd")
    lora = random_lora(pipe.unet)
    header = {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_alpha": "1", "ss_network_dim": "128"}
    assert_adds(pipe, written(spelled(lora, "kohya", "unet", 3.0), tmp_path, header), expected(lora, 3.0))


# --- text encoders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["lora_te_", "lora_te1_", "text_encoders.clip_l.transformer.", "base_model.model.text_encoder."]
)
def test_a_text_encoder_s_lora_is_read_and_comes_off_by_itself(prefix, tmp_path):
    pipe = pipe_of("sd")
    lora = random_lora(pipe.text_encoder, ("q_proj", "fc1"))
    tensors = {}
    for name, (a, b) in lora.items():
        theirs = f"text_model.{name.removeprefix('text_model.')}"
        key = prefix + (theirs.replace(".", "_") if prefix.endswith("_") else theirs)
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(3.0)}
    path = written(tensors, tmp_path)
    load_adapter(pipe, path)
    torch.testing.assert_close(updates(pipe.text_encoder), expected(lora, 3.0), atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="has an adapter default already"):
        load_adapter(pipe, path)
    assert updates(pipe.text_encoder)
    unload_adapter(pipe)
    assert not any("lora" in name for name, _ in pipe.text_encoder.named_parameters())


def test_both_text_encoders_of_sdxl_are_read(tmp_path):
    pipe = tiny_xl_pipeline()
    tensors, wanted = {}, {}
    for number, part in ((1, "text_encoder"), (2, "text_encoder_2")):
        wanted[part] = lora = random_lora(getattr(pipe, part), ("q_proj",))
        for name, (a, b) in lora.items():
            key = f"lora_te{number}_text_model_{name.removeprefix('text_model.').replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
    load_adapter(pipe, written(tensors, tmp_path))
    for part, lora in wanted.items():
        torch.testing.assert_close(updates(getattr(pipe, part)), expected(lora), atol=1e-5, rtol=1e-4)
    merge_adapter(pipe)


def test_a_text_encoder_that_diffusers_would_pass_over_is_told(tmp_path):
    """FLUX's T5, by the names of sd-scripts and of OneTrainer."""
    pipe = pipe_of("flux")
    lora = spelled(random_lora(pipe.transformer), "kohya", "transformer")
    for prefix in ("lora_te3", "lora_te2"):
        key = f"{prefix}_encoder_block_0_layer_0_SelfAttention_q"
        more = {f"{key}.lora_down.weight": torch.ones(2, 32), f"{key}.lora_up.weight": torch.ones(16, 2)}
        assert_refused(pipe, written(lora | more, tmp_path), "diffusers leaves out the layers of its text_encoder_2")


# --- refusals -------------------------------------------------------------------------------------------------------


KEY = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
MORE = {  # beside a whole LoRA, or alone
    "dora": (f"{KEY}.dora_scale", "is a DoRA"),
    "loha": (f"{KEY}.hada_w1_a", "is a LoHa"),
    "lokr": (f"{KEY}.lokr_w1", "is a LoKr"),
    "oft": (f"{KEY}.oft_blocks", "is an OFT"),
    "ia3": (f"{KEY}.on_input", "is an IA3"),
    "glora": (f"{KEY}.a1.weight", "is a GLoRA"),
    "diff": ("lora_unet_conv_in.diff", "changes of whole weights"),
    "diff_b": ("lora_unet_conv_in.diff_b", "changes of whole weights"),
    "norm": ("lora_unet_conv_norm_out.w_norm", "changes of whole weights"),
    "bias": (f"{KEY}.lora_up.bias", "is a LoRA with biases"),
    "control": ("lora_controlnet", "is a Control LoRA"),
    "counter": ("global_step", "has global_step, which is no part of a LoRA"),
}


@pytest.mark.parametrize("form", MORE)
def test_a_form_that_is_not_read_is_named_and_never_left_out(form, tmp_path):
    key, said = MORE[form]
    pipe = pipe_of("sd")
    lora = spelled(random_lora(pipe.unet), "kohya", "unet", 1.0)
    for given in (lora, {}):
        assert_refused(pipe, written(given | {key: torch.ones(2, 2)}, tmp_path), rf"{said}.*; expected the A and B")


@pytest.mark.sample("flux-dora", "sd3-dora", "pixart-loha", "sana-loha")
@pytest.mark.parametrize("form", ["dora", "loha"])
@pytest.mark.parametrize("kind", PIPES)
def test_other_forms_are_refused_for_every_family(kind, form, tmp_path):
    pipe = pipe_of(kind)
    component, denoiser = denoiser_of(pipe)
    lora = random_lora(denoiser)
    tensors = spelled(lora, "comfyui", component)
    if form == "dora":
        tensors |= {f"diffusion_model.{n}.dora_scale": torch.ones(len(b), 1) for n, (_, b) in lora.items()}
    else:
        tensors = {
            f"diffusion_model.{n}.hada_w{i}_{x}": t
            for n, its in lora.items()
            for i in (1, 2)
            for x, t in zip("ba", its)
        }
    assert_refused(pipe, written(tensors, tmp_path), "is a DoRA" if form == "dora" else "is a LoHa")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("emb_params", "is a textual inversion"),
        ("ip_adapter.1.to_k_ip.weight", "is an IP-Adapter"),
        (
            "model.diffusion_model.input_blocks.0.0.weight",
            "has model.diffusion_model.input_blocks.0.0.weight, which is no part",
        ),
        ("conv_in.weight", "has conv_in.weight, which is no part"),
    ],
)
def test_a_file_of_something_else_is_refused_by_what_it_is(key, said, tmp_path):
    assert_refused(pipe_of("sd"), written({key: torch.ones(2, 2)}, tmp_path), said)


def test_a_file_without_tensors_is_refused(tmp_path):
    assert_refused(pipe_of("sd"), written({}, tmp_path), "holds no tensors")


@pytest.mark.parametrize("spelling", ["kohya", "comfyui", "named", "older", "bare"])
def test_a_layer_that_the_model_has_not_is_never_left_out(spelling, tmp_path):
    for kind, component in (("sd", "unet"), ("flux", "transformer")):
        pipe = pipe_of(kind)
        lora = random_lora(denoiser_of(pipe)[1]) | {"nowhere.to_q": (torch.ones(2, 16), torch.ones(16, 2))}
        path = written(spelled(lora, spelling, component), tmp_path)
        assert_refused(pipe, path, r"it has weights for \S*nowhere.to_q, which is no layer")


@pytest.mark.parametrize("spelling", ["kohya", "comfyui", "named", "peft"])
def test_half_of_a_lora_is_told(spelling, tmp_path):
    pipe = pipe_of("sd")
    tensors = spelled(random_lora(pipe.unet), spelling, "unet")
    tensors.pop(next(reversed(tensors)))
    assert_refused(pipe, written(tensors, tmp_path), r"is not whole: A or B of \S+ is missing")


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.ones(0)], ids=["two", "none"])
def test_an_alpha_that_is_not_one_number_is_told(alpha, tmp_path):
    pipe = pipe_of("sd")
    tensors = spelled(random_lora(pipe.unet), "kohya", "unet", 1.0)
    key = next(key for key in tensors if key.endswith(".alpha"))
    assert_refused(pipe, written(tensors | {key: alpha}, tmp_path), "has an alpha of .*; expected one number")


@pytest.mark.parametrize(
    "shapes", [((0, 16), (16, 0)), ((), ()), ((2, 16), (16, 3)), ((2, 16, 1), (16, 2, 1))], ids=str
)
def test_factors_of_impossible_shapes_are_told(shapes, tmp_path):
    down, up = (torch.ones(shape) for shape in shapes)
    path = written({f"{KEY}.lora_down.weight": down, f"{KEY}.lora_up.weight": up}, tmp_path)
    assert_refused(pipe_of("sd"), path, r"has A and B of .* of shapes .*; expected \(r, in\) and \(out, r\)")


def test_a_fused_layer_s_lora_of_zeros_is_told(tmp_path):
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{key}.lora_down.weight": torch.ones(2, 32), f"{key}.lora_up.weight": torch.zeros(96, 2)}
    assert_refused(pipe_of("flux"), written(tensors, tmp_path), "adds nothing, since every B in it is zero")


def test_two_loras_of_one_layer_are_told(tmp_path):
    pipe = pipe_of("sd")
    lora = random_lora(pipe.unet)
    tensors = spelled(lora, "kohya", "unet") | spelled(lora, "comfyui", "unet")
    assert_refused(pipe, written(tensors, tmp_path), "has more than one LoRA for unet.")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spelling", ["kohya", "native"])
def test_values_that_are_not_finite_are_told(value, spelling, tmp_path):
    pipe = pipe_of("sd")
    lora = random_lora(pipe.unet)
    native = {f"unet.{n}.{end}": t for n, its in lora.items() for end, t in zip(PEFT, its)}
    tensors = spelled(lora, "kohya", "unet", 1.0) if spelling == "kohya" else native
    key = next(reversed(tensors))
    said = rf"has values that are not finite, such as in {re.escape(key)}"
    assert_refused(pipe, written(tensors | {key: tensors[key] * value}, tmp_path), said)


def test_a_lora_of_another_family_is_told(tmp_path):
    sd, xl, flux = pipe_of("sd"), pipe_of("xl"), pipe_of("flux")
    files = {
        "unet": spelled(random_lora(xl.unet), "kohya", "unet"),
        "transformer": spelled(random_lora(flux.transformer), "kohya", "transformer"),
    }
    for pipe, component in ((sd, "unet"), (sd, "transformer"), (xl, "transformer"), (flux, "unet")):
        assert_refused(
            pipe, written(files[component], tmp_path), "does not fit this model: it (was made|has weights) for"
        )


# --- files and folders ----------------------------------------------------------------------------------------------


NO_FILES = {
    "empty": b"",
    "html": b"<!DOCTYPE html><html></html>",
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
    "pickle": pickle.dumps([1]),
    "zip": b"PK\3\4",
}


@pytest.mark.parametrize("content", NO_FILES.values(), ids=NO_FILES)
def test_a_file_that_is_none_is_told(content, tmp_path):
    (tmp_path / "lora.safetensors").write_bytes(content)
    assert_refused(pipe_of("sd"), tmp_path / "lora.safetensors", "is damaged or no safetensors file; give a whole one")


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="Windows has no such permissions")
def test_a_file_that_may_not_be_read_is_not_called_damaged():
    pipe, me = pipe_of("sd"), os.geteuid()
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        file = Path(folder) / "lora.safetensors"
        save_file({"a": torch.zeros(1)}, file)
        file.chmod(0)
        try:
            if me == 0:  # who may read everything
                os.seteuid(65534)
            with pytest.raises(UserError, match=r"lora\.safetensors cannot be read \(Permission denied\); ask"):
                load_adapter(pipe, file)
        finally:
            os.seteuid(me)


def test_a_folder_with_files_of_other_names_says_which(tmp_path):
    pipe = pipe_of("sd")
    lora = random_lora(pipe.unet)
    path = written(spelled(lora, "kohya", "unet"), tmp_path)
    assert_refused(pipe, tmp_path, rf"holds no adapter; .* such as {re.escape(str(path))} \(1 lie there\)")
    path.rename(tmp_path / "pytorch_lora_weights.safetensors")
    written({"conv_in.weight": torch.ones(1)}, tmp_path)
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"\x80\x02.")
    assert_adds(pipe, tmp_path, expected(lora))


def test_a_peft_file_is_read_with_the_configuration_beside_it(tmp_path):
    """Its alpha lies there."""
    pipe, other = pipe_of("sd"), tiny_pipeline()
    tuned = get_peft_model(other.unet, LoraConfig(r=2, lora_alpha=7, target_modules=["to_q"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path)
    changes = updates(other.unet)
    for place in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert_adds(pipe, place, changes)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v * float("nan") for k, v in load_file(file).items()}, file)
    assert_refused(pipe, tmp_path, "has values that are not finite")


@pytest.mark.parametrize("more", [{"modules_to_save": ["conv_out"]}, {"bias": "lora_only"}], ids=str)
def test_a_peft_directory_that_trains_the_model_s_own_layers_is_refused(more, tmp_path):
    pipe = pipe_of("sd")
    get_peft_model(tiny_pipeline().unet, LoraConfig(r=2, target_modules=["to_q"], **more)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert_refused(pipe, tmp_path, r"layers or biases of the model itself \(modules_to_save, bias\)")


# --- what only diffusers reads --------------------------------------------------------------------------------------


def test_a_lokr_that_diffusers_reads_is_read(tmp_path):
    pipe = pipe_of("z")
    lora = random_lora(pipe.transformer)
    tensors, changes = {}, {}
    for name, (a, b) in lora.items():
        w1, w2 = torch.randn(2, 2), torch.randn(len(b) // 2, a.shape[1] // 2)
        tensors |= {f"diffusion_model.{name}.lokr_w1": w1, f"diffusion_model.{name}.lokr_w2": w2}
        changes[name] = torch.kron(w1, w2)
    assert_adds(pipe, written(tensors, tmp_path), changes)


def test_a_file_of_xlabs_is_read_or_refused_where_diffusers_would_leave_a_part_out(tmp_path):
    pipe = pipe_of("flux")
    sizes = {"qkv_lora1": 96, "proj_lora1": 32}
    tensors = {}
    for name, rows in sizes.items():
        key = f"double_blocks.0.processor.{name}"
        tensors |= {f"{key}.down.weight": torch.randn(2, 32), f"{key}.up.weight": torch.randn(rows, 2)}
    key = "double_blocks.0.processor.proj_lora1"
    load_adapter(pipe, written(tensors, tmp_path))
    found = updates(pipe.transformer)["transformer_blocks.0.attn.to_out.0"]
    torch.testing.assert_close(found, tensors[f"{key}.up.weight"] @ tensors[f"{key}.down.weight"])
    unload_adapter(pipe)
    beyond = {k.replace("blocks.0", "blocks.7"): v for k, v in tensors.items()}
    assert_refused(pipe, written(tensors | beyond, tmp_path), "does not fit this model|diffusers leaves out")
