"""What trains moves, what does not stays bit for bit, and stock diffusers loads the result."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from difftuning_control.adapters.files import LORA_FILE
from difftuning_control.adapters.tuning import AdapterTuning, FullTuning
from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_of
from difftuning_control.recipe.adapter import AdapterConfig
from support.tiny_sd import tiny_pipeline
from support.tuning import picture, tune, weights

# --- what moves -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["auto", "to_q, conv1,ff.net.2"])
def test_lora_moves_every_a_and_b_and_no_weight_of_the_base(family, pipe, targets):
    base = weights(pipe)
    tuning = AdapterTuning(family, AdapterConfig(rank=2, targets=targets))
    before = copy.deepcopy(tuning.parameters())
    assert {n.split(".lora_")[1][0] for n in before} == {"A", "B"}
    tune(family, tuning)
    torch.testing.assert_close(weights(pipe), base, atol=0, rtol=0)
    assert all((after != before[n]).any() for n, after in tuning.parameters().items())


def test_full_tuning_moves_every_weight_of_the_denoiser_and_no_other(family, pipe):
    base = weights(pipe)
    tuning = FullTuning(family)
    assert set(tuning.parameters()) == set(pipe.unet.state_dict())
    tune(family, tuning)
    moved = {name for name, value in weights(pipe).items() if (value != base[name]).any()}
    assert moved == {name for name in base if name.startswith("unet.")}


def test_a_new_adapter_predicts_what_the_base_does(family, pipe):
    before = picture(pipe)
    AdapterTuning(family, AdapterConfig(rank=2, alpha=8.0))
    np.testing.assert_array_equal(picture(pipe), before)


def test_the_seed_alone_decides_how_an_adapter_starts(family):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = AdapterTuning(family, AdapterConfig(rank=2), 4).parameters()
    assert torch.equal(torch.rand(1), expected)
    for seed, same in ((4, True), (5, False)):
        other = AdapterTuning(family_of(tiny_pipeline()), AdapterConfig(rank=2), seed).parameters()
        assert all(torch.equal(other[n], p) == (same or ".lora_B" in n) for n, p in first.items())


def test_an_adapter_on_a_base_in_lower_precision_trains_in_float32(tmp_path):
    family = family_of(tiny_pipeline().to(torch.bfloat16))
    base = weights(family.pipe)
    tuning = AdapterTuning(family, AdapterConfig(rank=2))
    tune(family, tuning)
    assert {p.dtype for p in tuning.parameters().values()} == {torch.float32}
    torch.testing.assert_close(weights(family.pipe), base, atol=0, rtol=0)
    tuning.save(tmp_path)
    saved = load_file(tmp_path / LORA_FILE)
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert sorted(t.sum().item() for t in saved.values()) == sorted(
        p.sum().item() for p in tuning.parameters().values()
    )


# --- what stock diffusers makes of it -------------------------------------------------------------------------------


@pytest.mark.sample("to_q,conv1-2-7.0")
@pytest.mark.parametrize(("rank", "alpha"), [(4, None), (4, 1.0), (2, 7.0)])
@pytest.mark.parametrize("targets", ["auto", "to_q,conv1"])
def test_a_saved_lora_gives_the_trained_pictures_in_a_stock_pipeline(family, pipe, tmp_path, rank, alpha, targets):
    before = picture(pipe)
    tuning = AdapterTuning(family, AdapterConfig(rank=rank, alpha=alpha, targets=targets))
    tune(family, tuning)
    tuning.save(tmp_path)
    trained = picture(pipe)
    assert np.abs(trained - before).max() > 0.01
    stock = tiny_pipeline()
    stock.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    np.testing.assert_allclose(picture(stock), trained, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == [LORA_FILE]


def test_a_saved_pipeline_gives_the_trained_pictures_when_stock_diffusers_loads_it(family, pipe, tmp_path):
    before = picture(pipe)
    tuning = FullTuning(family)
    tune(family, tuning, rate=1e-3)
    tuning.save(tmp_path)
    trained = picture(pipe)
    assert np.abs(trained - before).max() > 0.01
    stock = DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert type(stock) is StableDiffusionPipeline
    np.testing.assert_allclose(picture(stock), trained, atol=1e-5)
    assert not [p for p in Path(tmp_path).rglob("*") if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        ("to_queue", "to_queue"),
        ("to_q,nothing_such", "nothing_such"),
        ("o_q", "o_q"),
        ("", "nothing"),
        (" , ", "nothing"),
        ("attn1", "attn1"),
        ("to_q,norm1", "norm1"),
    ],
)
def test_targets_that_cannot_bear_an_adapter_are_refused_by_name_and_nothing_is_attached(family, pipe, targets, named):
    before = list(pipe.unet.state_dict())
    with pytest.raises(UserError, match=f"adapter.targets names {named}[, ]"):
        AdapterTuning(family, AdapterConfig(rank=2, targets=targets))
    assert list(pipe.unet.state_dict()) == before
