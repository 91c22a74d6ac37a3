"""DiffFit trains biases, norms and scale factors, and nothing else; it comes off without a trace."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from difftuning_control import load_adapter, unload_adapter
from difftuning_control.adapters.difffit import GAMMA, DiffFit, branch_ends, small_weights
from difftuning_control.adapters.files import DIFFFIT_FILE
from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_of
from difftuning_control.recipe.adapter import AdapterConfig
from support.tiny_sd import tiny_pipeline
from support.tuning import picture, tune

CONFIG = AdapterConfig("difffit")


def test_biases_norms_and_scale_factors_train_and_no_matrix():
    family = family_of(tiny_pipeline())
    before = {n: p.clone() for n, p in family.denoiser.named_parameters()}
    tuning = AdapterTuning(family, CONFIG)
    names = set(tuning.parameters())
    biases = {n for n in before if n.endswith(".bias")}
    norms = {n for n in before if n.endswith(".weight") and before[n].ndim == 1}
    gammas = {n for n in names if n.endswith(GAMMA)}
    assert names == biases | norms | gammas
    blocks = [m for m in family.denoiser.modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert len(gammas) == 3 * len(blocks)  # two attentions and a feed-forward each
    tune(family, tuning)
    after = dict(family.denoiser.named_parameters())
    assert {n for n in before if not torch.equal(before[n], after[n])} == biases | norms
    assert all((after[n] != 1).any() for n in gammas)


def test_a_scale_factor_multiplies_the_branch_by_hand():
    unet = tiny_pipeline().unet
    block = next(m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock")
    hidden, prompts = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    own = DiffFit(unet)
    gammas = {n: torch.rand(16) + 0.5 for n in own.parameters if n.endswith(GAMMA)}
    own.set({n: p.detach() for n, p in own.parameters.items()} | gammas)
    inside = [getattr(layer, GAMMA).detach().clone() for layer in branch_ends(block).values()]
    with torch.no_grad():
        found = block(hidden, encoder_hidden_states=prompts)
        own.remove()
        expected = hidden + inside[0] * block.attn1(block.norm1(hidden))
        expected = expected + inside[1] * block.attn2(block.norm2(expected), prompts)
        expected = expected + inside[2] * block.ff(block.norm3(expected))
    torch.testing.assert_close(found, expected)


def test_the_file_holds_what_trains_under_the_denoisers_names_and_nothing_more(tmp_path):
    family = family_of(tiny_pipeline())
    tuning = AdapterTuning(family, CONFIG)
    tune(family, tuning)
    tuning.save(tmp_path)
    saved = load_file(tmp_path / DIFFFIT_FILE)
    assert {n: tuple(t.shape) for n, t in saved.items()} == DiffFit.shapes(tiny_pipeline().unet)
    assert all(torch.equal(saved[n], p) for n, p in tuning.parameters().items())
    assert sum(t.numel() for t in saved.values()) < 0.2 * sum(p.numel() for p in family.denoiser.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_comes_off_bit_for_bit_with_the_types_of_the_base(tmp_path, dtype):
    family = family_of(tiny_pipeline().to(dtype))
    base = {n: p.clone() for n, p in family.denoiser.state_dict().items()}
    tuning = AdapterTuning(family, CONFIG)
    tune(family, tuning)
    tuning.save(tmp_path)
    unload_adapter(family.pipe)
    found = family.denoiser.state_dict()
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in base.items()}
    assert all(torch.equal(t, base[n]) for n, t in found.items())
    assert not any(m._forward_hooks for m in family.denoiser.modules())
    load_adapter(family.pipe, tmp_path)
    unload_adapter(family.pipe)
    assert all(torch.equal(t, base[n]) for n, t in family.denoiser.state_dict().items())


def test_half_the_strength_is_half_of_every_change(tmp_path):
    family = family_of(tiny_pipeline())
    tuning = AdapterTuning(family, CONFIG)
    tune(family, tuning)
    tuning.save(tmp_path)
    stock = tiny_pipeline()
    base = small_weights(copy.deepcopy(stock.unet))
    load_adapter(stock, tmp_path, strength=0.5)
    for name, parameter in small_weights(stock.unet).items():
        expected = (base[name] + tuning.parameters()[name]) / 2
        torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=1e-5)


def test_gradient_checkpointing_changes_nothing():
    found = []
    for checkpointing in (False, True):
        family = family_of(tiny_pipeline())
        tuning = AdapterTuning(family, CONFIG)
        if checkpointing:
            family.denoiser.enable_gradient_checkpointing()
        tune(family, tuning)
        found.append({n: p.detach() for n, p in tuning.parameters().items()})
        found.append(picture(family.pipe))
    assert all(torch.equal(p, found[2][n]) for n, p in found[0].items())
    np.testing.assert_array_equal(found[1], found[3])


def test_joint_attention_and_single_blocks_end_in_scale_factors_too():
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    torch.manual_seed(0)
    sd3 = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        out_channels=4,
    )
    flux = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    ends = {
        "sd3": {n.split(".", 2)[2] for n in branch_ends(sd3)},
        "flux": {n.split(".", 2)[2] for n in branch_ends(flux)},
    }
    joint = {"attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2"}
    assert ends == {"sd3": joint, "flux": joint | {"proj_out"}}
    inputs = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 8), torch.randn(1, 8), torch.tensor([500.0])
    with torch.no_grad():
        before = sd3(*inputs)[0]
        own = DiffFit(sd3)
        assert torch.equal(sd3(*inputs)[0], before)
        own.set({n: p + 0.1 for n, p in own.parameters.items()})
        assert not torch.allclose(sd3(*inputs)[0], before, atol=1e-3)
        own.remove()
        assert torch.equal(sd3(*inputs)[0], before)


def test_a_model_without_transformer_blocks_is_refused():
    with pytest.raises(UserError, match="has no transformer block"):
        DiffFit(nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3)))
