"""Checkpoints as people have them: one file, damaged, or of another class; each refused by what it is."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from diffusers import ControlNetUnionModel
from safetensors.torch import save_file

from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_of, load_controlnet, load_family
from support.marks import need_pipeline
from support.tiny_flow import tiny_z_image
from support.tiny_models import tiny_pixart
from support.tiny_sd import tiny_xl_pipeline


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
        monkeypatch.setattr("difftuning_control.families.loading.at_least", lambda package, wanted: True)
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
