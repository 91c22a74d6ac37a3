"""What a model does on a device beside the CPU: where its parts lie, what is copied, how much is done at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from difftuning_control import cli
from difftuning_control.adapters.tlora import RankMask
from difftuning_control.evaluation.losses import BandValidator
from difftuning_control.families.loading import family_of
from difftuning_control.objective.batch import LatentBatch
from difftuning_control.objective.difftuning import DiffTuningObjective
from difftuning_control.objective.noise import NoiseProcess, looked_up
from difftuning_control.objective.rows import moved
from difftuning_control.objective.variance import variational_bound
from difftuning_control.recipe import inputs
from difftuning_control.verbs.runners import RUNNERS
from support.marks import need_pipeline, needs_bitsandbytes
from support.other_device import DEVICE, Watch
from support.tiny_flow import tiny_chroma, tiny_flux2_klein, tiny_krea2
from support.tiny_models import tiny_dit, tiny_flux, tiny_pixart, tiny_sd3, tiny_sdxl
from support.tiny_sd import tiny_pipeline

MODELS = {
    "sd": tiny_pipeline,
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "dit": tiny_dit,
    "pixart": tiny_pixart,
    "chroma": tiny_chroma,
    "krea2": tiny_krea2,
    "flux2": tiny_flux2_klein,
}


# --- where things lie ---------------------------------------------------------------------------------


@pytest.mark.sample("sd3")
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart", "chroma", "krea2", "flux2"])
def test_a_pipeline_whose_text_encoders_stay_on_the_cpu_draws_on_the_device(name):
    """diffusers before 0.40 takes the first component by name, a text encoder; of the meta device 0.42 does too."""
    family = family_of(MODELS[name]())
    kind, family.offload = type(family.pipe), True
    family.to(DEVICE)
    assert family.pipe.text_encoder.device.type == "cpu"
    assert family.pipe._execution_device == DEVICE
    assert isinstance(family.pipe, kind)
    assert type(family.pipe).__name__ == kind.__name__


@needs_bitsandbytes
@needs_bitsandbytes
def test_weights_in_8_bits_move_with_the_module_around_them():
    from difftuning_control.families.quantised import quantise_linears

    module = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    quantise_linears(module, "int8", torch.float32)
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    fresh = [(layer.weight.CB.clone(), layer.weight.SCB.clone()) for layer in module]
    module.to(torch.device("cpu"))
    for layer, (weight, factors) in zip(module, fresh):
        assert torch.equal(layer.weight.CB, weight)
        assert layer.weight.CB.data_ptr() == layer.weight.data_ptr()  # one copy of it
        assert torch.equal(layer.weight.SCB, factors)
    expected = module(x)
    module.to(torch.device("cpu"))
    torch.testing.assert_close(module(x), expected, atol=0, rtol=0)


def test_the_gate_of_a_tlora_goes_where_the_layer_is():
    """A timestep may be a plain number, whose gate is on the CPU."""
    mask = RankMask(tiny_pipeline().unet, 3, [500.0, 200.0])
    mask._see(nn.Identity(), (), {mask.name: 300})
    assert mask.gate is not None
    assert mask.gate.tolist() == [[1, 1, 0]]
    with Watch():
        assert mask._apply(nn.Identity(), (), torch.empty(2, 4, 3, device=DEVICE)).device == DEVICE


# --- what is copied ---------------------------------------------------------------------------------


@pytest.mark.sample("flux", "sd")
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_copied_to_the_device_in_a_forward(name):
    family = family_of(MODELS[name]())
    told = family.encode_prompts(["", ""])
    if family.takes_sizes:
        told["sizes"] = torch.zeros(2, 6, dtype=torch.long)
    told = {key: value.to(DEVICE) for key, value in told.items()}
    places = family.native_resolution // family.vae_scale_factor
    latents = torch.empty(2, family.latent_channels, places, places, device=DEVICE)
    timesteps = family.process.timesteps[:2].to(DEVICE)
    family.denoiser.to(DEVICE)
    with Watch() as watch:
        assert family.denoiser_inputs(latents, timesteps, told)
    assert watch.waits == []
    if name != "krea2":  # which asks whether a mask masks anything
        with Watch():
            assert family.predict(family.denoiser, latents, timesteps, told).shape[2:] == latents.shape[2:]


def test_rows_are_scaled_by_numbers_that_lie_on_the_cpu():
    need_pipeline("Flux2KleinPipeline")
    family = family_of(tiny_flux2_klein())
    latents = torch.randn(1, family.latent_channels, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = family.scale_latents(latents)
    other = family_of(tiny_flux2_klein())
    other.scale_latents(latents)
    other.to(DEVICE)
    torch.testing.assert_close(other.scale_latents(latents), expected, atol=0, rtol=0)


def test_only_a_gpu_of_cuda_is_copied_to_while_nobody_waits():
    """Apple's reads the CPU's memory later, when others may have it; nor does it have float64."""
    process = NoiseProcess.from_scheduler(tiny_dit().scheduler)
    levels, latents = torch.tensor([0, 500]), torch.empty(2, 4, 2, 2, device=DEVICE)
    with Watch() as watch:
        looked_up(process.alphas, levels, DEVICE)
        moved(torch.ones(2), latents)
        LatentBatch(torch.ones(2, 1), {}, torch.tensor([True, False])).to(DEVICE, torch.float32)
        variational_bound(process, latents, latents, latents, latents, levels)
        variational_bound(process, latents, latents, latents, latents, levels.to(DEVICE))
    assert watch.waits
    assert (watch.later, watch.doubles) == ([], [])


# --- how much is done at once ---------------------------------------------------------------------------------


def test_few_large_pictures_are_encoded_and_decoded_at_once(family, monkeypatch):
    pixels = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (mean, std), seen = family.encode_moments(pixels), []
    drawn = family.decode(mean)
    for name in ("encode", "decode"):
        original = getattr(family.pipe.vae, name)
        monkeypatch.setattr(
            family.pipe.vae, name, lambda x, *a, original=original, **k: seen.append(len(x)) or original(x, *a, **k)
        )
    monkeypatch.setattr(inputs, "PIXELS_AT_ONCE", 2 * 16 * 16)
    torch.testing.assert_close(family.encode_moments(pixels), (mean, std))
    torch.testing.assert_close(family.decode(mean), drawn)
    assert seen == [2, 2, 1] * 2
    monkeypatch.setattr(inputs, "PIXELS_AT_ONCE", 1)
    assert len(family.encode_moments(pixels)[0]) == 5


def test_few_rows_of_large_pictures_are_measured_at_once(family, monkeypatch):
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = LatentBatch(latents, family.encode_prompts([""] * 5), torch.zeros(5, dtype=torch.bool))
    objective = DiffTuningObjective.from_scheduler(family.pipe.scheduler, preset="plain")
    validator, seen = BandValidator(family, objective, batch, bands=2), []
    expected = validator.rows(family.denoiser)
    family.denoiser.register_forward_hook(lambda module, args, output: seen.append(len(output[0])))
    monkeypatch.setattr(inputs, "PIXELS_AT_ONCE", family.vae_scale_factor**2 * 64)
    torch.testing.assert_close(validator.rows(family.denoiser), expected)
    assert seen == [2, 2, 1] * 2


def test_too_little_memory_is_one_sentence(monkeypatch, capsys):
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free. Of the allocated memory 9 GiB …"

    def full(command):
        raise torch.OutOfMemoryError(said)

    monkeypatch.setitem(RUNNERS, "recipes", full)
    with pytest.raises(SystemExit) as ended:
        cli.main(["recipes"])
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "GPU 0 has 1.00 GiB free); say --training.gradient_checkpointing true" in line
    monkeypatch.setitem(RUNNERS, "recipes", lambda command: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        cli.main(["recipes"])


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (lambda: torch.empty(1 << 58), "the computer has too little memory (can't allocate memory"),
        (lambda: bytearray(1 << 62), "the computer has too little memory (an allocation failed); lower"),
        (
            lambda: (_ for _ in ()).throw(RuntimeError("MPS backend out of memory (9 GB)")),
            "the GPU has too little memory",
        ),
    ],
)
def test_so_is_too_little_of_other_memory(raised, said, monkeypatch, capsys):
    monkeypatch.setitem(RUNNERS, "recipes", lambda command: raised())
    with pytest.raises(SystemExit) as ended:
        cli.main(["recipes"])
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert said in line
