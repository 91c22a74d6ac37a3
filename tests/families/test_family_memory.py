"""Flags that save memory change where and how weights are kept, and nothing else."""

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from difftuning_control.adapters.files import LORA_FILE
from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.errors import UserError
from difftuning_control.evaluation.drawing import sample_pictures
from difftuning_control.families.loading import family_of, load_base, load_family
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.inputs import ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.requests import SampleRequest
from difftuning_control.recipe.training import TrainingConfig
from difftuning_control.runs.finished import tuned_model
from difftuning_control.verbs.sample import sample_to_folder
from difftuning_control.verbs.train import train
from support.drawing import PROMPTS, generators
from support.tiny_models import tiny_flux, tiny_lumina2, tiny_pixart, tiny_sana, tiny_sd3, tiny_sdxl
from support.tiny_sd import tiny_pipeline

MAKERS = {"sd": tiny_pipeline, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(params=MAKERS)
def pipe(request):
    return MAKERS[request.param]()


def draw(family, prompts=PROMPTS):
    return family.sample(prompts, generators(0, 1), steps=2, guidance_scale=3.0, resolution=16)


# --- text encoders that make room -----------------------------------------------------------------------------------


class Encoders:
    """Counts forwards of a family's text encoders, and the times that they took the denoiser's place."""

    def __init__(self, family, monkeypatch):
        self.forwards = self.swaps = 0
        for name, module in family.modules.items():
            if name.startswith("text_encoder"):
                module.register_forward_hook(self.count)
        encoding = family.encoding

        @contextmanager
        def counted():
            self.swaps += 1
            with encoding():
                yield

        monkeypatch.setattr(family, "encoding", counted)

    def count(self, *_):
        self.forwards += 1


@pytest.mark.sample("sd", "flux")
def test_offloaded_encoders_encode_each_prompt_once_and_the_pictures_stay(pipe, monkeypatch):
    family = family_of(pipe)
    expected = draw(family)
    family.offload = True
    assert family.to("cpu") is family
    encoders = Encoders(family, monkeypatch)
    torch.testing.assert_close(draw(family), expected, atol=1e-5, rtol=1e-5)
    once = encoders.forwards
    assert (once > 0, encoders.swaps) == (True, 1)
    torch.testing.assert_close(draw(family), expected, atol=1e-5, rtol=1e-5)
    assert (encoders.forwards, encoders.swaps) == (once, 1)
    draw(family, [PROMPTS[0], "another"])
    assert encoders.swaps == 2


@pytest.mark.wide
def test_an_offloaded_run_draws_bank_and_grids_from_what_was_encoded_for_training(recipe, monkeypatch, tmp_path):
    plain = replace(
        recipe, training=replace(recipe.training, sample_every=3, sample_steps=2), output=str(tmp_path / "a")
    )
    run = train(plain).record
    found = []

    def load(*args, **options):
        assert options["offload"]
        found.append(load_family(*args, **options))
        found.append(Encoders(found[0], monkeypatch))
        return found[0]

    monkeypatch.setattr("difftuning_control.families.loading.load_family", load)
    cache = str(tmp_path / "cache of its own")
    offloaded = replace(
        plain,
        model=replace(plain.model, offload=True),
        output=str(tmp_path / "b"),
        data=replace(plain.data, cache=cache),
    )
    other = train(offloaded).record
    _, encoders = found
    assert encoders.swaps == 2  # the bank's prompts, then all of them
    for role, bands in run.losses.items():
        torch.testing.assert_close(other.losses[role].tuned.losses, bands.tuned.losses, atol=1e-4, rtol=1e-3)
    assert (tmp_path / "b" / "samples" / "step-000003.png").exists()


# --- weights in 8 bits ------------------------------------------------------------------------------------------------


@pytest.mark.sample("True-tiny_lumina2", "False-tiny_pixart")
@pytest.mark.parametrize("make", [tiny_sd3, tiny_flux, tiny_pixart, tiny_sana, tiny_lumina2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_8_bits_are_those_through_the_rounded_weights(make, checkpointing):
    """Storage alone is in 8 bits: forward and backward are those of a model whose weights were rounded once."""
    stored, plain = family_of(make()), family_of(make())
    stored.quantise("float8")
    parameters = dict(stored.denoiser.named_parameters())
    cast = {n for n, p in parameters.items() if p.dtype == FLOAT8}
    assert sum(parameters[n].numel() for n in cast) > 0.5 * sum(p.numel() for p in parameters.values())
    for name, parameter in plain.denoiser.named_parameters():
        if name in cast:
            parameter.data = parameter.data.to(FLOAT8).float()
    found = []
    for family in (stored, plain):
        tuning = AdapterTuning(family, AdapterConfig(rank=2), 3)
        if checkpointing:
            family.denoiser.enable_gradient_checkpointing()
        family.denoiser.train()
        for i, parameter in enumerate(tuning.parameters().values()):
            parameter.data = torch.randn(parameter.shape, generator=generators(i)[0]) * 0.1
        latents = torch.randn(2, 4, 8, 8, generator=generators(0)[0])
        timesteps = family.process.timesteps[torch.tensor([100, 800])]
        out = family.predict(family.denoiser, latents, timesteps, family.encode_prompts(PROMPTS))
        out.square().mean().backward()
        found.append((out.detach(), {n: p.grad for n, p in tuning.parameters().items() if p.grad is not None}))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)
    assert all(gradient.any() for n, gradient in found[0][1].items() if "1.attn.add_q_proj" not in n)


@pytest.mark.wide
@pytest.mark.parametrize(("make", "method"), [(tiny_sd3, "lora"), (tiny_flux, "lora"), (tiny_flux, "controlnet")])
def test_a_run_on_a_base_in_8_bits_is_drawn_on_the_same(make, method, recipe, tmp_path, monkeypatch):
    make().save_pretrained(tmp_path / "model")
    more = {"adapter": AdapterConfig(on="controlnet" if method == "controlnet" else "denoiser", rank=2)}
    run = replace(
        recipe,
        method=method,
        model=ModelConfig(str(tmp_path / "model"), quantization="float8", offload=True),
        data=replace(recipe.data, resolution=16),
        training=replace(recipe.training, mixed_precision="bf16"),
        **more,
    )
    run.control.fidelity.every = 0 if method == "controlnet" else 50
    record = train(run).record
    assert record.losses["target"].tuned.losses != record.losses["target"].base.losses
    family = load_base(run)
    kept = {p.dtype for p in family.denoiser.parameters()}
    assert kept == {FLOAT8, torch.bfloat16}
    before = sample_pictures(family, PROMPTS, seed=0, steps=2, guidance_scale=3.0, resolution=16)
    with tuned_model(family, run.output, record) as tuned:
        if method == "lora":
            factors = load_file(f"{run.output}/{LORA_FILE}")
            here = {n: p for n, p in tuned.denoiser.named_parameters() if ".lora_" in n}
            assert len(here) == len(factors)
            for name, parameter in here.items():
                key = "transformer." + name.replace(".default.", ".").replace(".default_0.", ".")
                torch.testing.assert_close(parameter.data.float(), factors[key], atol=1e-6, rtol=1e-2)
        control = torch.full((2, 3, 16, 16), 255, dtype=torch.uint8) if method == "controlnet" else None
        after = sample_pictures(tuned, PROMPTS, seed=0, steps=2, guidance_scale=3.0, resolution=16, control=control)
    assert [a.tobytes() for a in before] != [a.tobytes() for a in after]
    if method == "lora":
        drawn = str(tmp_path / "drawn")
        sample_to_folder(SampleRequest(PROMPTS, run.output, output=drawn, steps=2, guidance_scale=3.0))
        assert len(list((tmp_path / "drawn").glob("*.png"))) == 2


def test_8_bits_are_refused_where_they_do_not_work(model_dir, tmp_path):
    with pytest.raises(
        UserError,
        match=r"quantization is for transformers that are told prompts, and not for a StableDiffusionPipeline",
    ):
        load_family(str(model_dir), quantization="float8")
    with pytest.raises(UserError, match="method full trains them all"):
        Recipe("full", ModelConfig(quantization="float8"))


def test_the_8_bit_optimizer_without_its_package_is_refused_before_anything_is_written(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    settings = TrainingConfig(**{**vars(recipe.training), "optimizer": "adamw8bit"})
    with pytest.raises(UserError, match="optimizer is adamw8bit, which needs bitsandbytes"):
        train(replace(recipe, training=settings))
    assert not Path(recipe.output).exists()
