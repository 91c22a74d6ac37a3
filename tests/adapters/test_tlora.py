"""A T-LoRA is a LoRA whose components are masked by the timestep of each row: forward, gradients, and samples."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from difftuning_control import load_adapter
from difftuning_control.adapters.files import HEADER, LORA_FILE
from difftuning_control.adapters.kinds import ADAPTER, attach, own_parts
from difftuning_control.adapters.lora_start import Down
from difftuning_control.adapters.tlora import orthogonal_start, rank_limits, ranks
from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_of
from difftuning_control.families.sd import StableDiffusion
from difftuning_control.objective.noise import NoiseProcess
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.system.tensors import set_metadata
from support.tiny_sd import tiny_pipeline
from support.tuning import picture, tune

RANK, LEAST = 6, 2
TIMESTEPS = [999, 760, 500, 250, 3, 0]
INITS = ["orthogonal", "gaussian"]


def formula(t: int, rank: int = RANK, least: int = LEAST, total: int = 1000) -> int:
    """⌊(T − t)(r − r_min) / T⌋ + r_min, in whole numbers."""
    return (total - t) * (rank - least) // total + least


def moved(init: str = "orthogonal", checkpointing: bool = False) -> tuple[StableDiffusion, AdapterTuning]:
    """A T-LoRA that has trained, so that every part of it does something."""
    family = family_of(tiny_pipeline())
    tuning = AdapterTuning(family, AdapterConfig("tlora", rank=RANK, min_rank=LEAST, alpha=9.0, init=init), seed=1)
    tune(family, tuning, rate=0.1)
    for name, parameter in tuning.parameters().items():
        if ".lora_B." in name:  # the last component is active at timestep 0 alone, and has hardly trained
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    if checkpointing:
        family.denoiser.enable_gradient_checkpointing()
    return family, tuning


def batch(count: int = len(TIMESTEPS)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, 4, 8, 8, generator=generator), torch.randn(count, 16, 16, generator=generator)


def gradients(family: StableDiffusion, tuning: AdapterTuning, timesteps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The prediction for rows of these timesteps, and the gradients of its squared sum."""
    latents, prompts = batch(len(timesteps))
    family.denoiser.train()
    prediction = family.denoiser(latents, timesteps, prompts, return_dict=False)[0]
    prediction.square().sum().backward()
    found = {n: p.grad.clone() for n, p in tuning.parameters().items()}
    for parameter in tuning.parameters().values():
        parameter.grad = None
    return prediction.detach(), found


class ByHand(nn.Module):
    """W x + s (B S M A x − B₀ S₀ M A₀ x) for one layer, written out, with a mask for each row."""

    def __init__(self, layer, mask: Tensor, names: dict[str, str], leaves: dict[str, Tensor]):
        super().__init__()
        self.layer, self.mask, self.names, self.leaves = layer, mask, names, leaves

    def forward(self, x: Tensor) -> Tensor:
        down, up, scaling = self.layer.lora_A[ADAPTER], self.layer.lora_B[ADAPTER], self.layer.scaling[ADAPTER]
        a, b = (self.leaves[self.names[part]] for part in ("A", "B"))
        s = self.leaves[self.names["S"]] if "S" in self.names else torch.ones(RANK)
        rows = []
        for row, mask in zip(x, self.mask):
            update = b @ torch.diag(s * mask) @ a @ row.T
            if isinstance(down, Down):
                update = update - (-up.start) @ torch.diag(mask) @ down.start @ row.T
            rows.append(self.layer.base_layer(row) + scaling * update.T)
        return torch.stack(rows)


def by_hand(family: StableDiffusion, tuning: AdapterTuning) -> tuple[Tensor, dict[str, Tensor]]:
    """The same as `gradients` of all TIMESTEPS, from layers written out."""
    mask = torch.tensor([[float(k < formula(t)) for k in range(RANK)] for t in TIMESTEPS])
    leaves = {n: p.detach().clone().requires_grad_(True) for n, p in tuning.parameters().items()}
    other = copy.deepcopy(family.denoiser)
    tuned = [n for n, m in other.named_modules() if hasattr(m, "lora_A") and ADAPTER in m.lora_A]
    for name in tuned:
        parts = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "S": "lora_A.default.factor"}
        names = {k: f"{name}.{part}" for k, part in parts.items() if f"{name}.{part}" in leaves}
        parent, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(parent), leaf, ByHand(other.get_submodule(name), mask, names, leaves))
    latents, prompts = batch()
    prediction = other(latents, torch.tensor(TIMESTEPS), prompts, return_dict=False)[0]
    prediction.square().sum().backward()
    return prediction.detach(), {n: leaf.grad for n, leaf in leaves.items()}


# --- the rank -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "least"), [(16, 8), (6, 2), (7, 1), (4, 4), (1, 1), (13, 5)])
def test_the_rank_of_every_timestep_is_the_papers(rank, least):
    process = NoiseProcess.from_scheduler(tiny_pipeline().scheduler)
    expected = [formula(t, rank, least) for t in range(1000)]
    assert ranks(process.u, 1000, rank, least).tolist() == expected
    assert (expected[0], expected[-1]) == (rank, least)
    limits = torch.tensor(rank_limits(process, rank, least))
    assert len(limits) == rank - least
    found = [least + int((t <= limits).sum()) for t in range(1000)]
    assert found == expected
    off = [least + int((t + 0.4 <= limits).sum()) for t in range(1000)]  # a sampler's timesteps between two levels
    assert off == expected


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_in_flow_matching_the_rank_follows_sigma(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    process = NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=shift))
    found = ranks(process.u, len(process), 16, 8)
    assert found[-1] == 8
    assert found[0] == (16 if shift == 1 else 15)
    assert (found.diff() <= 0).all()
    assert ranks(torch.tensor([0.0, 0.5, 1.0]), 1000, 16, 8).tolist() == [16, 12, 8]
    limits = torch.tensor(rank_limits(process, 16, 8))
    assert [8 + int((t <= limits).sum()) for t in process.timesteps] == found.tolist()


# --- forward and gradients ------------------------------------------------------------------------------------------


@pytest.mark.sample("orthogonal-False")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_rows_of_different_timesteps_are_those_of_layers_written_out(init, checkpointing):
    family, tuning = moved(init, checkpointing)
    prediction, found = gradients(family, tuning, torch.tensor(TIMESTEPS))
    family.denoiser.disable_gradient_checkpointing()
    expected, by_layer = by_hand(family, tuning)
    torch.testing.assert_close(prediction, expected, atol=1e-5, rtol=1e-5)
    assert found.keys() == by_layer.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, by_layer[name], atol=1e-4, rtol=1e-4)
    latents, prompts = batch()
    for row, t in enumerate(TIMESTEPS):  # each row by itself, with the timestep as samplers give it
        with torch.no_grad():
            alone = family.denoiser(latents[row : row + 1], torch.tensor(t), prompts[row : row + 1])[0]
        torch.testing.assert_close(alone[0], prediction[row], atol=1e-5, rtol=1e-5)


@pytest.mark.sample("0-gaussian")
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("timestep", [999, 500, 1, 0])
def test_components_past_the_rank_have_no_gradient_at_all(init, timestep):
    family, tuning = moved(init)
    _, found = gradients(family, tuning, torch.full((3,), timestep))
    active = formula(timestep)
    for name, gradient in found.items():
        by_component = gradient.T if ".lora_B." in name else gradient
        assert (by_component[active:] == 0).all()
        assert (by_component[:active].reshape(active, -1) != 0).any(1).all()


@pytest.mark.wide
def test_gradient_checkpointing_changes_no_bit():
    plain, again = (gradients(*moved(checkpointing=on), torch.tensor(TIMESTEPS)) for on in (False, True))
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(g, again[1][n]) for n, g in plain[1].items())


@pytest.mark.wide
def test_at_the_full_rank_it_is_the_lora_of_all_components():
    family, _ = moved()
    own_parts(family.denoiser)[ADAPTER].remove()
    own_parts(family.denoiser)[ADAPTER].gate = torch.ones(1, 2 * RANK)
    latents, prompts = batch()
    with torch.no_grad():
        unmasked = family.denoiser(latents, torch.tensor(0), prompts)[0]
    other, _ = moved()
    with torch.no_grad():
        assert torch.equal(other.denoiser(latents, torch.tensor(0), prompts)[0], unmasked)
        assert not torch.allclose(other.denoiser(latents, torch.tensor(999), prompts)[0], unmasked, atol=1e-3)


def test_a_copy_masks_by_its_own_timesteps():
    family, _ = moved()
    latents, prompts = batch()
    other = copy.deepcopy(family.denoiser)
    with torch.no_grad():
        first = family.denoiser(latents, torch.tensor(0), prompts)[0]
        low = other(latents, torch.tensor(999), prompts)[0]
        assert own_parts(other)[ADAPTER] is not own_parts(family.denoiser)[ADAPTER]
        assert torch.equal(family.denoiser(latents, torch.tensor(999), prompts)[0], low)
        assert torch.equal(other(latents, timestep=torch.tensor(0), encoder_hidden_states=prompts)[0], first)


def test_rows_that_do_not_belong_to_the_timesteps_are_an_error():
    family, _ = moved()
    family.denoiser(torch.zeros(3, 4, 8, 8), torch.tensor([1, 500, 999]), torch.zeros(3, 16, 16))
    layer = family.denoiser.get_submodule("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
    with pytest.raises(ValueError, match="has 2 rows, the denoiser's timestep 3"):
        layer(torch.zeros(2, 5, 16))


def test_the_timestep_is_found_where_a_transformer_takes_it():
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        out_channels=4,
    )
    process = NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler())
    attach(model, AdapterConfig("tlora", rank=4, min_rank=1), 0, ("to_q", "to_k"), process)
    inputs = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8), torch.randn(2, 8)
    timesteps = torch.tensor([1000.0, 1.0])
    for call in (lambda: model(*inputs, timesteps), lambda: model(*inputs, timestep=timesteps)):
        call()
        assert own_parts(model)[ADAPTER].gate[:, :4].sum(1).tolist() == [1, 4]


# --- how it starts --------------------------------------------------------------------------------------------------


def test_the_start_is_orthogonal_with_the_last_singular_values():
    torch.manual_seed(0)
    found = orthogonal_start([(40, 24), (24, 24), (40, 24)], 6)
    for (a, s, b), (out, into) in zip(found, [(40, 24), (24, 24), (40, 24)]):
        assert (a.shape, s.shape, b.shape) == ((6, into), (6,), (out, 6))
        torch.testing.assert_close(a @ a.T, torch.eye(6), atol=1e-5, rtol=0)
        torch.testing.assert_close(b.T @ b, torch.eye(6), atol=1e-5, rtol=0)
        assert (s.diff() <= 0).all()
        drawn = [torch.linalg.svdvals(torch.randn(out, into) / 6)[-6:] for _ in range(50)]
        low, high = torch.stack(drawn).min(0)[0], torch.stack(drawn).max(0)[0]
        assert ((s >= 0.5 * low) & (s <= 2 * high)).all()
    assert not torch.equal(found[0][0], found[2][0])


def test_a_gaussian_start_is_a_loras():
    family = family_of(tiny_pipeline())
    tuning = AdapterTuning(family, AdapterConfig("tlora", rank=4, init="gaussian"), seed=5)
    lora = AdapterTuning(family_of(tiny_pipeline()), AdapterConfig("lora", rank=4), seed=5)
    assert all(torch.equal(p, lora.parameters()[n]) for n, p in tuning.parameters().items())


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.wide
@pytest.mark.parametrize("init", INITS)
def test_samples_are_those_of_a_lora_that_is_cut_by_hand_at_every_step(init, tmp_path):
    family, tuning = moved(init)
    tuning.save(tmp_path)
    masked = picture(family.pipe)

    stock = tiny_pipeline()
    stock.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert np.abs(picture(stock) - masked).max() > 1e-3
    full = {n: p.detach().clone() for n, p in stock.unet.named_parameters() if "lora_A" in n}
    forward, seen = stock.unet.forward, []

    def cut(sample, timestep, *args, **kwargs):
        seen.append(int(timestep))
        for name, parameter in stock.unet.named_parameters():
            if name in full:
                runs = full[name].clone().view(-1, RANK, full[name].shape[1])
                runs[:, formula(int(timestep)) :] = 0
                parameter.data = runs.flatten(0, 1)
        return forward(sample, timestep, *args, **kwargs)

    stock.unet.forward = cut
    np.testing.assert_allclose(picture(stock), masked, atol=1e-5)
    assert len({formula(t) for t in seen}) == len(seen) == 3

    loaded = tiny_pipeline()
    load_adapter(loaded, tmp_path)
    np.testing.assert_allclose(picture(loaded), masked, atol=1e-5)


def test_the_file_is_a_lora_of_both_terms_with_its_ranks_in_the_header(tmp_path):
    _, tuning = moved()
    tuning.save(tmp_path)
    tensors = load_file(tmp_path / LORA_FILE)
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {2 * RANK}
    assert {n.rsplit(".", 2)[1] for n in tensors} == {"lora_A", "lora_B"}
    with safe_open(tmp_path / LORA_FILE, "pt") as file:
        header = file.metadata()[HEADER]
    assert '"kind": "tlora"' in header
    assert f'"rank": {RANK}' in header


@pytest.mark.sample("{-*", "*12 rows")
@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("{", "cannot be read"),
        ('{"kind": "tlora"}', "cannot be read"),
        ('{"kind": "tlora", "rank": 2, "limits": [1, 2]}', "cannot be read"),
        ('{"kind": "tlora", "rank": 5, "limits": [1, 2]}', "is no T-LoRA of rank 5: .* has 12 rows"),
    ],
)
def test_a_header_that_does_not_belong_to_the_file_is_refused(header, said, tmp_path):
    _, tuning = moved()
    tuning.save(tmp_path)
    set_metadata(tmp_path / LORA_FILE, {HEADER: header})
    stock = tiny_pipeline()
    with pytest.raises(UserError, match=said):
        load_adapter(stock, tmp_path)
    assert not hasattr(stock.unet, "peft_config")


def test_its_mask_goes_when_diffusers_unloads_it(tmp_path):
    _, tuning = moved()
    tuning.save(tmp_path)
    stock = tiny_pipeline()
    load_adapter(stock, tmp_path)
    masked = picture(stock)
    stock.unload_lora_weights()
    load_adapter(stock, tmp_path)
    assert len(stock.unet._forward_pre_hooks) == 1
    np.testing.assert_array_equal(picture(stock), masked)


@pytest.mark.sample("EulerDiscreteScheduler")
@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_other_samplers_are_masked_too(scheduler, tmp_path):
    import diffusers

    _, tuning = moved()
    tuning.save(tmp_path)
    stock = tiny_pipeline()
    stock.scheduler = getattr(diffusers, scheduler).from_config(stock.scheduler.config, timestep_spacing="linspace")
    load_adapter(stock, tmp_path)
    seen = []
    own = own_parts(stock.unet)[ADAPTER]
    stock.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((float(args[1]), own.gate.sum().item())), with_kwargs=True
    )
    picture(stock)
    assert [count for _, count in seen] == [2 * formula(round(t)) for t, _ in seen]
    assert len(set(seen)) == 3
