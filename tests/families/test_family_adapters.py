"""Adapters that act by what is inside a transformer: DiffFit's ends of branches, T-LoRA where parts are recomputed."""

from __future__ import annotations

import pytest
import torch
from diffusers import ControlNetModel

from difftuning_control import load_adapter
from difftuning_control.adapters.difffit import GAMMA, DiffFit, branch_ends
from difftuning_control.adapters.tuning import AdapterTuning, check_adapter
from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_of
from difftuning_control.families.loss import compute_loss
from difftuning_control.objective.batch import LatentBatch
from difftuning_control.objective.difftuning import DiffTuningObjective
from difftuning_control.recipe.adapter import AdapterConfig
from support.flow_families import STOCK, need
from support.tensors import differing
from support.tiny_models import tiny_flux, tiny_lumina2, tiny_pixart, tiny_sana, tiny_sd3, tiny_sdxl

MAKERS = {
    **{name: stock.make for name, stock in STOCK.items()},
    "flux": tiny_flux,
    "lumina2": tiny_lumina2,
    "pixart": tiny_pixart,
    "sana": tiny_sana,
    "sd3": tiny_sd3,
}
BLOCKS = ("transformer_blocks", "single_transformer_blocks", "layers", "noise_refiner", "context_refiner")


def loss_of(family) -> torch.Tensor:
    """The mean loss of two rows whose prompts have different lengths."""
    generator = torch.Generator().manual_seed(3)
    conditioning = family.encode_prompts(["red 1", "a blue six and more"])
    objective = DiffTuningObjective.from_scheduler(family.pipe.scheduler, "plain")
    latents, noise = torch.randn(2, 2, family.latent_channels, 4, 4, generator=generator)
    batch = LatentBatch(latents, conditioning, torch.zeros(2, dtype=torch.bool))
    levels = objective.sample_levels(batch.is_retention, generator)
    return compute_loss(family, family.denoiser, objective, batch, noise, levels).mean()


def blocks_of(denoiser) -> list[tuple[str, torch.nn.Module]]:
    found = [(name, module) for name, module in denoiser.named_modules() if name.rpartition(".")[0] in BLOCKS]
    assert found
    return found


@pytest.mark.sample("flux2", "sana")
@pytest.mark.parametrize("name", MAKERS)
def test_difffit_scales_every_branch_of_every_block(name):
    """With γ = 0 nothing comes out of a block but what went in."""
    if name in STOCK:
        need(name)
    family = family_of(MAKERS[name]())
    own, unchanged = DiffFit(family.denoiser), []
    own.set({n: torch.zeros_like(p) if n.endswith(GAMMA) else p.detach() for n, p in own.parameters.items()})

    def compare(block, args, kwargs, output):
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        outputs = output if isinstance(output, tuple) else (output,)
        for tensor in (t for t in outputs if isinstance(t, torch.Tensor)):
            unchanged.append(any(tensor.shape == t.shape and torch.equal(tensor, t) for t in given))

    blocks = blocks_of(family.denoiser)
    for _, block in blocks:
        block.register_forward_hook(compare, with_kwargs=True)
    with torch.no_grad():
        loss_of(family)
    assert len(unchanged) >= len(blocks)
    assert all(unchanged)


KINDS = {
    "dora": {"rank": 2},
    "loha": {"rank": 2},
    "lokr": {},
    "oft": {"block_size": 4},
    "boft": {"block_size": 4},
    "ia3": {},
}


@pytest.mark.sample("lokr")
@pytest.mark.parametrize("kind", KINDS)
def test_every_factor_moves_and_draws_the_same_once_saved_and_loaded(kind, tmp_path):
    def drawn(family) -> torch.Tensor:
        family.denoiser.eval()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            return family.sample(["red 1"], [generator], steps=2, guidance_scale=1.0, resolution=16)

    family, other = (family_of(tiny_flux(sharp=True)) for _ in range(2))
    tuning = AdapterTuning(family, AdapterConfig(kind, **KINDS[kind]), seed=3)
    before = {name: p.detach().clone() for name, p in tuning.parameters().items()}
    optimizer = torch.optim.Adam(tuning.parameters().values(), 0.05)  # without decay, which moves all
    for _ in range(3):
        loss_of(family).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert differing(tuning.parameters(), before) == set(before)
    tuning.save(tmp_path)
    base, tuned = drawn(other), drawn(family)
    load_adapter(other.pipe, tmp_path)
    torch.testing.assert_close(drawn(other), tuned, atol=1e-5, rtol=1e-5)
    assert (tuned - base).abs().max() > 1e-2


def test_a_branch_whose_end_is_not_known_is_refused():
    class OddFeedForward(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.last_of_all = torch.nn.Linear(2, 2)

    with pytest.raises(UserError, match=r"the end of 0 \(OddFeedForward\); use another kind"):
        branch_ends(torch.nn.Sequential(OddFeedForward()))


@pytest.mark.parametrize("kind", ["lora", "tlora"])
def test_recomputed_parts_of_chroma_are_under_the_mask_of_the_text(kind):
    need("chroma")

    def gradients(recomputed: bool) -> dict[str, torch.Tensor]:
        family = family_of(MAKERS["chroma"]())
        tuning = AdapterTuning(family, AdapterConfig(kind, rank=4), seed=1)
        for number, parameter in enumerate(tuning.parameters().values()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.data += 0.1 * noise
        if recomputed:
            family.checkpoint_activations()
        family.denoiser.train()
        loss_of(family).backward()
        return {name: parameter.grad for name, parameter in tuning.parameters().items()}

    plain, again = gradients(False), gradients(True)
    assert all(torch.equal(gradient, again[name]) for name, gradient in plain.items())


@pytest.mark.parametrize("make", [tiny_flux, tiny_sdxl])
def test_a_text_encoder_that_no_adapter_trains_is_refused_before_anything_is_done(make):
    with pytest.raises(UserError, match=r"adapter.text_encoder is true, which the family .* does not train yet"):
        check_adapter(family_of(make()), AdapterConfig(rank=4, text_encoder=True))


def test_a_controlnet_of_sdxl_may_have_other_attention_layers_than_the_unet():
    """Those published as small have fewer; what it adds has the same sizes."""
    family = family_of(tiny_sdxl())
    own = dict(ControlNetModel.from_unet(family.denoiser, load_weights_from_unet=False).config)
    own |= {"transformer_layers_per_block": 2, "conditioning_embedding_out_channels": (16, 32)}
    family.controlnet = ControlNetModel.from_config(own)
    family.check_controlnet(family.controlnet, "small")
    embeds = family.encode_prompts(["red"])
    control = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with torch.no_grad():
        found = family.predict(family.model, torch.zeros(1, 4, 8, 8), torch.tensor([3]), embeds | {"control": control})
    assert found.shape == (1, 4, 8, 8)
