"""Training that begins from an adapter of somebody else's: it starts at what the file does, or is refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxControlNetModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_of
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.record import RunRecord
from difftuning_control.runs.start import Start, start_of
from difftuning_control.training.begin import Beginning
from support.lora_files import expected, random_lora, spelled, updates, written
from support.tiny_models import tiny_flux
from support.tiny_sd import tiny_pipeline, tiny_xl_pipeline

Q = ("to_q",)


def begun(family, place, **settings):
    """What the adapter that is to be trained adds to each layer at the start."""
    adapter = AdapterConfig(**{"rank": 2, "alpha": 1.0, "targets": "to_q"} | settings)
    beginning = Beginning(start_of(place), family, adapter)
    tuning = AdapterTuning(family, adapter)
    beginning.fill(tuning)
    return updates(family.denoiser)


@pytest.mark.sample("kohya-parts", "named")
@pytest.mark.parametrize("spelling", ["kohya", "kohya-parts", "named", "peft", "older", "bare", "lycoris"])
def test_it_begins_at_what_a_file_of_any_spelling_does(family, spelling, tmp_path):
    lora = {name: (a[:2], b[:, :2]) for name, (a, b) in random_lora(family.denoiser, Q).items()}
    path = written(spelled(lora, spelling, "unet", 3.0), tmp_path)
    torch.testing.assert_close(begun(family, path), expected(lora, 3.0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("place", [".", "adapter_model.safetensors"])
def test_it_begins_at_what_a_peft_directory_does(family, place, tmp_path):
    other = tiny_pipeline()
    config = LoraConfig(r=2, lora_alpha=7, target_modules=list(Q), use_rslora=True, init_lora_weights=False)
    get_peft_model(other.unet, config).save_pretrained(tmp_path)
    torch.testing.assert_close(begun(family, tmp_path / place), updates(other.unet), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_what_a_lora_would_leave_out_is_told(family, more, tmp_path):
    config = LoraConfig(r=2, target_modules=list(Q), init_lora_weights=False, **more)
    get_peft_model(tiny_pipeline().unet, config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has more than A and B"):
        begun(family, tmp_path)
    assert not hasattr(family.denoiser, "peft_config")


def test_a_second_text_encoder_s_lora_is_not_passed_over(tmp_path):
    family = family_of(tiny_xl_pipeline())
    lora = {name: (a[:2], b[:, :2]) for name, (a, b) in random_lora(family.denoiser, Q).items()}
    key = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
    size = family.pipe.text_encoder_2.config.hidden_size
    more = {f"{key}.lora_down.weight": torch.ones(2, size), f"{key}.lora_up.weight": torch.ones(size, 2)}
    path = written(spelled(lora, "kohya", "unet") | more, tmp_path)
    with pytest.raises(UserError, match="also has weights for the text_encoder_2, which do not train here"):
        begun(family, path)


def test_values_that_are_not_finite_are_told(family, tmp_path):
    path = written(spelled(random_lora(family.denoiser, Q), "kohya", "unet"), tmp_path)
    save_file({k: v * float("nan") for k, v in load_file(path).items()}, path)
    with pytest.raises(UserError, match="has values that are not finite"):
        begun(family, path)


def test_a_file_of_others_is_not_rounded_to_a_base_in_8_bits(tmp_path):
    family = family_of(tiny_flux())
    lora = {name: (a[:2], b[:, :2]) for name, (a, b) in random_lora(family.denoiser, Q).items()}
    path = written(spelled(lora, "named", "transformer", 3.0), tmp_path)
    family.quantise("float8")
    with pytest.raises(UserError, match="would be rounded to the 8 bits of this base"):
        Beginning(start_of(path), family)
    assert not hasattr(family.denoiser, "peft_config")


def test_a_controlnet_of_other_layers_is_refused_with_what_to_say(tmp_path):
    family = family_of(tiny_flux())
    family.new_controlnet(0).save_pretrained(tmp_path / "controlnet")
    family.controlnet = FluxControlNetModel.from_transformer(
        family.denoiser, num_layers=1, num_single_layers=2, load_weights_from_transformer=False
    )
    record = RunRecord(status="complete", recipe_values=Recipe(method="controlnet").to_dict())
    with pytest.raises(UserError, match=r"has other layers than the one that trains here; say the control\.init"):
        Beginning(Start(tmp_path, record), family)
