"""Checkpoints as people have them: one file, damaged, or of another class; each refused by what it is."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
from diffusers import AutoencoderTiny, ControlNetUnionModel
from safetensors.torch import load_file, save_file

from difftuning_control.errors import UserError
from difftuning_control.families.load_failures import model_not_loaded
from difftuning_control.families.loading import family_of, load_base, load_controlnet, load_family
from difftuning_control.recipe.inputs import ModelConfig
from difftuning_control.recipe.recipe import Recipe
from support.marks import need_pipeline
from support.tiny_flow import tiny_z_image
from support.tiny_models import tiny_pixart
from support.tiny_sd import tiny_pipeline, tiny_xl_pipeline


def test_a_union_controlnet_of_sdxl_is_not_taken_for_one_without_its_parts(tmp_path):
    """Its names are those of a plain one and more."""
    family = family_of(tiny_xl_pipeline())
    union = ControlNetUnionModel.from_unet(family.denoiser, conditioning_embedding_out_channels=(4, 8))
    union.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"\d+ of its tensors are none of a ControlNetModel, such as control_add_embed"):
        load_controlnet(family, str(tmp_path))
    plain = family.new_controlnet(0)
    plain.save_pretrained(tmp_path / "plain")
    found = load_controlnet(family, str(tmp_path / "plain"))
    torch.testing.assert_close(found.state_dict(), plain.state_dict(), atol=0, rtol=0)


def test_a_damaged_file_is_not_called_another_architecture(tmp_path):
    need_pipeline("ZImagePipeline")
    path = tmp_path / "union.safetensors"
    save_file({"control_layers.0.weight": torch.ones(64)}, path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"the ControlNet .*union.safetensors is damaged or no safetensors file"):
        load_controlnet(family_of(tiny_z_image()), str(path))


@pytest.mark.parametrize("name", ["model.safetensors", "notes.txt"])
def test_a_model_as_one_file_is_told_how_to_become_a_directory(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"is a file; expected a diffusers directory") as refusal:
        load_family(str(path))
    is_told = "from_single_file" in str(refusal.value) and "--from" in str(refusal.value)
    assert is_told == (name == "model.safetensors")


def test_a_pickle_is_told_apart_by_its_name_and_never_read(tmp_path):
    for name in ("model.ckpt", "model.PT", "model.bin"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        with pytest.raises(UserError, match=r"has its weights as a pickle .* is never loaded"):
            load_family(str(tmp_path / name))


@pytest.mark.parametrize("is_there", [False, True], ids=["without", "with"])
def test_a_tokenizer_of_sentencepiece_alone_names_the_packages_that_it_needs(tmp_path, monkeypatch, is_there):
    if importlib.util.find_spec("sentencepiece") is not None:
        pytest.skip("sentencepiece is installed")
    if is_there:  # where the file is damaged, transformers says the same
        monkeypatch.setattr("difftuning_control.families.load_failures.at_least", lambda package, wanted: True)
    tiny_pixart().save_pretrained(tmp_path)
    folder = tmp_path / "tokenizer"
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").write_bytes(b"of the original")
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "T5Tokenizer"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    said = "could not be loaded" if is_there else "needs more packages; `pip install sentencepiece protobuf`"
    with pytest.raises(UserError, match=said):
        load_family(str(tmp_path))


# --- what is missing, and variants ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A model of which there are weights of the variant fp16 alone."""
    folder = tmp_path_factory.mktemp("half") / "model"
    tiny_pipeline().save_pretrained(folder, variant="fp16")
    return folder


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_tensors_that_a_file_lacks_are_told_by_part(model_dir, part, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    file = folder / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    absent = [name for name in tensors if ".conv1." in name]
    save_file({name: tensor for name, tensor in tensors.items() if name not in absent}, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"the {part} of \S+ lacks {len(absent)} tensors, such as \S+\.conv1\.\w+: "):
        load_family(str(folder))


@pytest.mark.parametrize("asked", [None, "bf16"])
@pytest.mark.parametrize("checker", [False, True], ids=["plain", "with a checker"])
def test_a_variant_that_is_not_named_is_told(half, asked, checker, tmp_path):
    folder = shutil.copytree(half, tmp_path / "model")
    if checker:  # which is never loaded, listed or not
        index = json.loads((folder / "model_index.json").read_text())
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        (folder / "model_index.json").write_text(json.dumps(index))
        for place in (folder / "safety_checker", folder / "another"):
            place.mkdir()
            (place / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(
        UserError, match=r"has weights of the variant fp16 alone, such as \S+; give --model.variant fp16"
    ):
        load_family(str(folder), variant=asked)
    load_family(str(folder), variant="fp16")


def test_a_variant_that_is_not_there_and_a_file_that_diffusers_stops_at_are_told(model_dir, half, tmp_path):
    with pytest.raises(UserError, match=r"has no weights of model\.variant fp16; leave it out"):
        load_family(str(model_dir), variant="fp16")
    folder = shutil.copytree(half, tmp_path / "model")
    (folder / "unet" / "LICENSE").write_text("")
    error = IndexError("list index out of range")  # of diffusers, where it meets this file before the weights
    said = str(model_not_loaded(str(folder), str(folder), error, ["unet"], "fp16"))
    assert "has a file without an ending, unet/LICENSE" in said


def test_a_variant_on_the_hub_is_told_by_the_whole_sentence():
    files = ", ".join(f"'{part}/diffusion_pytorch_model.fp16.safetensors'" for part in ("unet", "vae") * 9)
    error = OSError(f"Could not find the necessary `safetensors` weights in {{{files}}} (variant=None)")
    assert "give --model.variant fp16." in str(model_not_loaded("some/model", "some/model", error, []))


def test_a_pickle_of_a_part_that_is_loaded_is_still_told(model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"has its weights as a pickle \(diffusion_pytorch_model.bin\)"):
        load_family(str(folder))


def test_a_base_that_was_saved_in_fewer_bits_is_not_trained_whole(model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the unet of \S+ was saved quantised \(bitsandbytes\), and method full"):
        load_base(Recipe(method="full", model=ModelConfig(str(folder))))


def test_an_autoencoder_for_previews_is_told_before_it_encodes(family):
    family.pipe.vae = AutoencoderTiny()
    with pytest.raises(UserError, match="vae is an AutoencoderTiny"):
        family.encode_moments(torch.zeros(1, 3, 16, 16))
