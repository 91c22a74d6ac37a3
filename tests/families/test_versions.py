"""What differs between the versions of diffusers and transformers that this package runs beside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from difftuning_control.errors import UserError
from difftuning_control.families.loading import embedded_model, load_controlnet_model, load_family
from difftuning_control.families.older_form import write_older_form
from difftuning_control.system.installed import at_least
from support.tiny_tokenizers import tiny_gemma_tokenizer, tiny_t5_tokenizer, tiny_tokenizer

FORMS = ("vocab.json", "merges.txt")


@pytest.mark.parametrize(("wanted", "is_met"), [("0.35.2", True), ("0.9", True), ("99", False)])
def test_versions_are_compared_by_number_and_not_by_letter(wanted, is_met):
    assert at_least("diffusers", wanted) is is_met


def test_a_model_and_a_controlnet_are_loaded_in_the_precision_that_was_asked_for(model_dir, tmp_path):
    """Diffusers before 0.40 takes it by another name, and says nothing of the new one."""
    family = load_family(str(model_dir), torch.bfloat16)
    assert {module.dtype for module in (family.denoiser, family.pipe.vae, family.pipe.text_encoder)} == {torch.bfloat16}
    ControlNetModel.from_unet(load_family(str(model_dir)).denoiser).save_pretrained(tmp_path)
    assert load_controlnet_model(ControlNetModel, str(tmp_path), torch.bfloat16).dtype == torch.bfloat16


def test_the_embedded_tokenizer_says_the_same_in_both_of_its_forms():
    folder = embedded_model() / "tokenizer"
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert json.loads((folder / FORMS[0]).read_text(encoding="utf-8")) == model["vocab"]
    lines = (folder / FORMS[1]).read_text(encoding="utf-8").splitlines()
    assert lines[1:] == [" ".join(pair) for pair in model["merges"]]
    words = CLIPTokenizer.from_pretrained(folder)("line icon: red Apple, 2 dogs!").input_ids
    assert words == [2021, 629, 578, 281, 543, 1160, 267, 273, 648, 786, 256, 2022]


def test_a_saved_pipeline_is_read_by_older_transformers_too(model_dir, tmp_path):
    family = load_family(str(model_dir))
    family.save_pipeline(tmp_path / "saved")
    kept = tmp_path / "saved" / "tokenizer"
    assert {*FORMS} <= {path.name for path in kept.iterdir()}
    for newer in kept.glob("tokenizer.json"):
        newer.unlink()
    text = "a red apple, 3 dogs"
    again = CLIPTokenizer.from_pretrained(kept)
    assert again(text).input_ids == family.pipe.tokenizer(text).input_ids


def test_text_encoders_are_saved_under_the_names_of_every_version(model_dir, tmp_path):
    """Transformers 4 finds no other, and would begin with random weights."""
    family = load_family(str(model_dir))
    family.save_pipeline(tmp_path / "saved")
    assert names(tmp_path / "saved" / "text_encoder") == names(embedded_model() / "text_encoder") == {"text_model"}
    again = load_family(str(tmp_path / "saved"))
    assert again.fingerprints == family.fingerprints
    prompts = ["a red square", ""]
    assert torch.equal(again.encode_prompts(prompts)["prompt_embeds"], family.encode_prompts(prompts)["prompt_embeds"])


def test_the_text_encoder_of_the_embedded_model_is_the_same_under_every_version():
    assert load_family("embedded").fingerprints["text_encoder"] == "80d6ec09208b29ab"


@pytest.mark.skipif(at_least("transformers", "5"), reason="needs transformers older than 5")
def test_a_text_encoder_that_transformers_4_would_leave_random_is_refused(model_dir, tmp_path):
    saved = shutil.copytree(model_dir, tmp_path / "saved")
    file = saved / "text_encoder" / "model.safetensors"
    save_file(
        {key.removeprefix("text_model."): tensor for key, tensor in load_file(file).items()}, file, {"format": "pt"}
    )
    with pytest.raises(UserError, match=r"text_encoder of .* was saved by transformers 5, .* install transformers 5"):
        load_family(str(saved))


def names(folder: Path) -> set[str]:
    """The modules that hold the tensors of a saved text encoder."""
    return {key.partition(".")[0] for file in folder.glob("*.safetensors") for key in load_file(file)}


def test_tokenizers_of_other_kinds_are_left_as_they_are(tmp_path):
    tiny_t5_tokenizer().save_pretrained(tmp_path / "tokenizer_2")
    before = sorted(path.name for path in (tmp_path / "tokenizer_2").iterdir())
    write_older_form(tmp_path)
    assert sorted(path.name for path in (tmp_path / "tokenizer_2").iterdir()) == before


def test_tiny_tokenizers_are_the_same_under_every_version():
    text = "a red apple"
    assert tiny_tokenizer()(text).input_ids == [514, 320, 513, 64, 79, 79, 75, 324, 515]
    assert tiny_t5_tokenizer()(text).input_ids == [3, 4, 3, 21, 8, 7, 3, 4, 19, 19, 15, 8, 1]
    assert tiny_gemma_tokenizer()(text).input_ids == [2, 69, 4, 86, 73, 72, 4, 69, 84, 84, 80, 73]
