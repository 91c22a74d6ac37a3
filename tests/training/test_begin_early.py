"""A LoRA that training cannot begin from is refused before anything is encoded, with all that would fit it at once."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from difftuning_control.adapters.kinds import target_layers, target_names
from difftuning_control.adapters.native_names import plain_layers
from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_of
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.runs.start import start_of
from difftuning_control.training import preparation
from difftuning_control.training.begin import Beginning, check_beginning
from difftuning_control.verbs.train import train
from support.lora_files import Layers, random_lora, spelled, written
from support.tiny_sd import tiny_pipeline

FOUR = ("to_q", "to_k", "to_v", "to_out.0")
ENCODER = ("q_proj", "k_proj", "v_proj", "out_proj")


def lora_of(module, ends, rank: int = 2) -> Layers:
    """A and B of one rank for the layers whose names end so."""
    return {name: (a[:rank], b[:, :rank]) for name, (a, b) in random_lora(module, ends, rank).items()}


def of_encoder(pipe, ends, rank: int = 2) -> dict[str, torch.Tensor]:
    """What a kohya file has of the first text encoder."""
    tensors = {}
    for name, (a, b) in lora_of(pipe.text_encoder, ends, rank).items():
        key = f"lora_te_text_model_{name.removeprefix('text_model.').replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
    return tensors


def refusal(family, path, **settings) -> str:
    with pytest.raises(UserError) as error:
        check_beginning(start_of(path), family, AdapterConfig(**{"rank": 2} | settings))
    return str(error.value)


def test_a_file_of_another_rank_is_refused_before_anything_is_encoded(recipe, pipe, tmp_path, monkeypatch):
    path = written(spelled(lora_of(pipe.unet, FOUR, 4), "kohya", "unet", 4.0), tmp_path)
    monkeypatch.setattr(preparation, "prepare_inputs", lambda *given: pytest.fail("pictures were encoded"))
    begun = replace(recipe, training=replace(recipe.training, begin_from=str(path)), adapter=AdapterConfig(rank=2))
    said = f"adapter.rank is 2, and the LoRA {path} has the rank 4; give --adapter.rank 4."
    with pytest.raises(UserError, match=re.escape(said)):
        train(begun)


def test_rank_and_layers_are_told_together_and_what_is_said_fits(family, tmp_path):
    path = written(spelled(lora_of(family.denoiser, ("to_q", "ff.net.2"), 3), "kohya", "unet"), tmp_path)
    said = refusal(family, path)
    assert "adapter.rank is 2, and the LoRA" in said
    assert "adapter.targets is auto, and the LoRA" in said
    rank, targets = re.search(r"give --adapter\.rank (\d+) --adapter\.targets (\S+)\.$", said).groups()
    check_beginning(start_of(path), family, AdapterConfig(rank=int(rank), targets=targets))
    assert not hasattr(family.denoiser, "peft_config")


def test_layers_that_auto_names_are_told_as_auto(family, tmp_path):
    path = written(spelled(lora_of(family.denoiser, FOUR), "kohya", "unet"), tmp_path)
    assert refusal(family, path, targets="to_q").endswith("give --adapter.targets auto.")


def test_ranks_that_differ_are_named_with_their_layers(family, tmp_path):
    said = refusal(family, written(spelled(random_lora(family.denoiser, FOUR), "kohya", "unet"), tmp_path))
    assert re.search(r"its ranks differ between layers \(2 in unet\.\S+, 4 in unet\.\S+\), and one adapter\.rank", said)
    assert "--adapter" not in said  # no advice that would be refused in turn


def test_a_text_encoder_s_other_layers_are_told_to_be_out_of_reach(family, tmp_path):
    lora = spelled(lora_of(family.denoiser, FOUR), "kohya", "unet")
    path = written(lora | of_encoder(family.pipe, (*ENCODER, "fc1", "fc2")), tmp_path)
    for text_encoder in (False, True):
        said = refusal(family, path, text_encoder=text_encoder)
        assert "it also has weights for fc1, fc2 of the text encoder, of which q_proj, k_proj, v_proj, out_proj" in said


@pytest.mark.parametrize("is_there", [True, False])
def test_a_text_encoder_that_is_only_here_or_there_is_told(family, is_there, tmp_path):
    lora = spelled(lora_of(family.denoiser, FOUR), "kohya", "unet")
    path = written(lora | (of_encoder(family.pipe, ENCODER) if is_there else {}), tmp_path)
    assert f"give --adapter.text_encoder {str(is_there).lower()}." in refusal(family, path, text_encoder=not is_there)
    check_beginning(start_of(path), family, AdapterConfig(rank=2, text_encoder=is_there))


def test_other_forms_of_a_file_are_refused_early(family, tmp_path):
    name, layer = next((n, x) for n, x in plain_layers(family.denoiser).items() if n.endswith("to_q"))
    key, size = f"lora_unet_{name.replace('.', '_')}", layer.weight.shape
    path = tmp_path / "loha.safetensors"
    save_file({f"{key}.hada_w{i}_{p}": torch.zeros(2, *size[1:]) for i in (1, 2) for p in "ab"}, path)
    assert "is a LoHa" in refusal(family, path)
    plain = written(spelled(lora_of(family.denoiser, FOUR), "kohya", "unet"), tmp_path)
    assert "adapter.kind is dora, and" in refusal(family, plain, kind="dora")
    assert "is no peft directory" in refusal(family, plain, kind="loha")
    assert "does not fit what trains" in refusal(family, plain, kind="difffit", rank=None)


def test_a_lora_with_a_start_asks_for_one(family, tmp_path):
    """A file of twice the rank in its second half, by its header: the rank alone would be refused in turn."""
    header = {"difftuning_adapter": '{"kind": "tlora", "rank": 2, "limits": [500.0], "sign": 1}'}
    path = written(spelled(lora_of(family.denoiser, FOUR, 4), "named", "unet"), tmp_path, header)
    assert refusal(family, path, kind="tlora", init="gaussian").endswith("give --adapter.init orthogonal.")
    Beginning(start_of(path), family, AdapterConfig(kind="tlora", rank=2))


def test_checking_changes_no_random_number(family, tmp_path):
    config = LoraConfig(r=2, lora_alpha=2, target_modules=list(FOUR))
    get_peft_model(tiny_pipeline().unet, config).save_pretrained(tmp_path)  # for which peft draws numbers
    before = torch.get_rng_state()
    check_beginning(start_of(tmp_path), family, AdapterConfig(rank=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_names_of_layers_find_these_and_no_others(family):
    layers = set(plain_layers(family.denoiser))
    some = {name for name in layers if name.endswith(("to_q", "conv1")) and "up_blocks" not in name}
    names = target_names(family.denoiser, some)
    assert names is not None
    found = target_layers(family.denoiser, AdapterConfig(rank=1, targets=",".join(names)), ())[1]
    assert found.keys() == some


SAVED = {
    "lora": {"rank": 2, "text_encoder": True},
    "rslora": {"rank": 2, "alpha": 3.0, "rslora": True, "targets": "to_q, ff.net.2"},
    "convolutions": {"rank": 2, "targets": "conv1, to_k"},
    "pissa": {"rank": 2, "init": "pissa"},
    "dora": {"kind": "dora", "rank": 2},
    "tlora": {"kind": "tlora", "rank": 4},
    "loha": {"kind": "loha", "rank": 2},
    "lokr": {"kind": "lokr", "factor": 4},
    "oft": {"kind": "oft", "block_size": 4},
    "boft": {"kind": "boft"},
    "ia3": {"kind": "ia3", "targets": "to_k, to_v"},
    "difffit": {"kind": "difffit"},
}


@pytest.mark.parametrize("settings", SAVED.values(), ids=SAVED)
def test_what_the_same_settings_have_made_fits(family, settings, tmp_path):
    """Of every kind, without the record that its run would have; and it is what training then begins at."""
    config = AdapterConfig(**settings)
    made = AdapterTuning(family, config, seed=3)
    torch.manual_seed(5)
    with torch.no_grad():  # away from where every adapter of its kind starts
        for parameter in made.parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    made.save(tmp_path)
    other = family_of(tiny_pipeline())
    check_beginning(start_of(tmp_path), other, config)
    beginning = Beginning(start_of(tmp_path), other, config)
    tuning = AdapterTuning(other, config, seed=4)
    beginning.fill(tuning)
    if config.kind == "tlora":  # whose factor S is made part of A
        return
    for name, value in made.parameters().items():
        torch.testing.assert_close(tuning.parameters()[name], value, atol=1e-5, rtol=1e-4)
