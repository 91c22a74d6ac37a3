"""Frozen weights in 4 or 8 bits by bitsandbytes, and its optimizer; skipped where it is not installed."""

import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.errors import UserError
from difftuning_control.evaluation.drawing import sample_pictures
from difftuning_control.families.loading import family_of, load_base, load_family
from difftuning_control.families.quantised import plain_state, quantise_linears
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.inputs import ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.finished import tuned_model
from difftuning_control.system.digests import digest_of_file
from difftuning_control.verbs.train import train
from support.drawing import PROMPTS, generators
from support.marks import needs_bitsandbytes
from support.tiny_models import tiny_flux, tiny_lumina2, tiny_pixart, tiny_sana, tiny_sd3
from support.trainings import interrupted_after, resumed

MODELS = {"sd3": tiny_sd3, "flux": tiny_flux, "pixart": tiny_pixart, "sana": tiny_sana, "lumina2": tiny_lumina2}
SIDES = {"sana": 32, "lumina2": 64}
LORA_FILE = "pytorch_lora_weights.safetensors"


@pytest.mark.sample("pixart-nf4", "lumina2-int8")
@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_through_the_rounded_weights(name, kind):
    quantised, plain = family_of(MODELS[name]()), family_of(MODELS[name]())
    count = sum(p.numel() for p in plain.denoiser.parameters())
    quantised.quantise(kind)
    kept = {n: p for n, p in quantised.denoiser.named_parameters() if p.dtype in (torch.uint8, torch.int8)}
    assert sum(p.numel() for p in kept.values()) * (2 if kind == "nf4" else 1) > 0.5 * count
    rounded = plain_state(quantised.denoiser)
    for key, parameter in plain.denoiser.named_parameters():
        assert (rounded[key] - parameter).norm() <= 0.12 * parameter.norm() + 1e-6  # 4 bits: 9 % of a normal density
        parameter.data = rounded[key].float()
    found = []
    for family in (quantised, plain):
        tuning = AdapterTuning(family, AdapterConfig(rank=2), 3)
        family.denoiser.train()
        for i, parameter in enumerate(tuning.parameters().values()):
            parameter.data = torch.randn(parameter.shape, generator=generators(i)[0]) * 0.1
        latents = torch.randn(2, 4, 8, 8, generator=generators(0)[0])
        timesteps = family.process.timesteps[torch.tensor([100, 800])]
        out = family.predict(family.denoiser, latents, timesteps, family.encode_prompts(PROMPTS))
        out.square().mean().backward()
        gradients = [p.grad.flatten() for p in tuning.parameters().values() if p.grad is not None]
        found.append((out.detach(), torch.cat(gradients)))
    off = 1e-4 if kind == "nf4" else 0.1  # int8 rounds the inputs too
    for ours, expected in zip(*found):
        assert (ours - expected).norm() < off * expected.norm()


@pytest.mark.wide
@needs_bitsandbytes
@pytest.mark.parametrize(
    ("name", "kind", "method"),
    [("flux", "nf4", "lora"), ("sd3", "int8", "lora"), ("lumina2", "nf4", "lora"), ("flux", "nf4", "controlnet")],
)
def test_a_run_on_a_quantised_base_is_drawn_on_the_same(name, kind, method, recipe, tmp_path):
    MODELS[name]().save_pretrained(tmp_path / "model")
    side = SIDES.get(name, 16)
    run = replace(
        recipe,
        method=method,
        model=ModelConfig(str(tmp_path / "model"), quantization=kind, offload=True),
        adapter=AdapterConfig(on="controlnet" if method == "controlnet" else "denoiser", rank=2),
        data=replace(recipe.data, resolution=side),
        training=replace(recipe.training, mixed_precision="bf16"),
    )
    run.control.fidelity.every = 0 if method == "controlnet" else 50
    record = train(run).record
    assert record.losses["target"].tuned.losses != record.losses["target"].base.losses
    family = load_base(run)
    assert family.fingerprints == record.fingerprints.base
    settings = {"seed": 0, "steps": 2, "guidance_scale": 3.0, "resolution": side}
    before = sample_pictures(family, PROMPTS, **settings)
    control = torch.full((2, 3, 16, 16), 255, dtype=torch.uint8) if method == "controlnet" else None
    with tuned_model(family, run.output, record) as tuned:
        if method == "lora":
            factors = load_file(f"{run.output}/{LORA_FILE}")
            here = {n: p for n, p in tuned.denoiser.named_parameters() if ".lora_" in n}
            assert len(here) == len(factors)
            for key, parameter in here.items():
                saved = factors["transformer." + key.replace(".default.", ".").replace(".default_0.", ".")]
                torch.testing.assert_close(parameter.data.float(), saved, atol=1e-6, rtol=1e-2)
        after = sample_pictures(tuned, PROMPTS, **settings, control=control)
    assert [a.tobytes() for a in before] != [a.tobytes() for a in after]


@pytest.mark.wide
@needs_bitsandbytes
def test_a_run_with_the_8_bit_optimizer_resumes_bit_by_bit(recipe, tmp_path):
    training = replace(recipe.training, optimizer="adamw8bit", max_steps=4, checkpoint_every=2, validate_every=0)
    tiny_flux().save_pretrained(tmp_path / "model")
    whole = replace(
        recipe,
        method="full",
        model=ModelConfig(str(tmp_path / "model")),
        adapter=AdapterConfig(),
        training=training,
        data=replace(recipe.data, resolution=16),
        output=str(tmp_path / "whole"),
    )
    broken = replace(whole, output=str(tmp_path / "broken"))
    train(whole)
    with pytest.raises(KeyboardInterrupt), interrupted_after(3):
        train(broken)
    state = load_file(tmp_path / "broken" / "checkpoint-2" / "optimizer.safetensors")
    assert any(t.dtype == torch.uint8 and t.numel() >= 4096 for t in state.values())
    train(resumed(broken))
    file = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    assert digest_of_file(tmp_path / "whole" / file) == digest_of_file(tmp_path / "broken" / file)


@needs_bitsandbytes
@pytest.mark.parametrize("inputs", [32, 64, 96, 160])
def test_a_layer_of_any_width_is_read_back_as_it_was_rounded(inputs):
    """Rows of different size, so that a wrong block's factor shows."""
    model = nn.Sequential(nn.Linear(inputs, 48))
    weight = model[0].weight.data * torch.linspace(0.1, 3, 48)[:, None]
    model[0].weight.data = weight.clone()
    quantise_linears(model, "nf4", torch.float32)
    assert (plain_state(model)["0.weight"] - weight).norm() <= 0.12 * weight.norm()
    assert not any(parameter.requires_grad for parameter in model[0].parameters() if parameter.ndim == 2)


def test_what_a_quantised_base_cannot_do_is_refused(recipe, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="quantization nf4 is for weights that do not train, and method full"):
        Recipe("full", ModelConfig(quantization="nf4"))
    for adapter in (AdapterConfig("dora"), AdapterConfig(init="pissa"), AdapterConfig(init="orthogonal")):
        with pytest.raises(UserError, match="do not go together; use lora or tlora"):
            Recipe(model=ModelConfig(quantization="int8"), adapter=adapter)
    tiny_flux().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"quantization is nf4, which needs bitsandbytes; run pip install '.*\[quan"):
        load_family(str(tmp_path), quantization="nf4")
