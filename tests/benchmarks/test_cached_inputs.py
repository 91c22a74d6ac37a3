"""Tuning with cached latents and embeddings against the same loop that encodes every step, in one run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.data.batches import BatchSource, TargetSet
from difftuning_control.data.embeddings import cached_embeddings
from difftuning_control.data.framing import Framing
from difftuning_control.data.latents import cached_moments
from difftuning_control.data.sources import load_images
from difftuning_control.families.loading import load_family
from difftuning_control.families.loss import compute_loss
from difftuning_control.objective.difftuning import DiffTuningObjective
from difftuning_control.recipe.adapter import AdapterConfig

pytestmark = pytest.mark.benchmark
STEPS, ROUNDS, BATCH = 8, 3, 32


def test_steps_per_second_with_cached_inputs_against_encoding_every_step(tmp_path: Path, capsys):
    family = load_family("embedded")
    data = load_images("embedded/icons")
    captions = [e.caption for e in data.examples]
    framing = Framing(family.native_resolution)
    moments = cached_moments(family, data, framing, tmp_path, lambda count: None)
    embeddings = cached_embeddings(family, captions, tmp_path, lambda count: None)
    objective = DiffTuningObjective.from_scheduler(family.pipe.scheduler, preset="plain")
    source = BatchSource(
        family, objective, TargetSet(moments, captions, captions), embeddings, None, "empty", 0.0, BATCH, 0
    )
    optimizer = torch.optim.AdamW(AdapterTuning(family, AdapterConfig(rank=16)).parameters().values(), 1e-4)

    def step(number: int, encode: bool) -> None:
        rows = source.rows(number)
        if encode:  # what a loop without a cache does: read, decode, VAE, text encoder
            examples = [data.examples[i % len(data)] for i in range(BATCH)]
            pixels = torch.cat([framing.pixels(e) for e in examples])
            mean, std = family.encode_moments(pixels)
            rows.batch.latents = family.scale_latents(mean + std * torch.randn_like(mean))
            rows.batch.conditioning = family.encode_prompts([e.caption for e in examples])
        losses = compute_loss(family, family.denoiser, objective, rows.batch, rows.noise, rows.levels)
        objective.combine(losses, rows.levels, rows.batch.is_retention).backward()
        optimizer.step()
        optimizer.zero_grad()

    rates: dict[bool, list[float]] = {False: [], True: []}
    for encode in (False, True):
        step(0, encode)
    for _ in range(ROUNDS):  # in turn, so that a noisy machine is noisy for both
        for encode in (False, True):
            begun = time.perf_counter()
            for number in range(STEPS):
                step(number, encode)
            rates[encode].append(STEPS / (time.perf_counter() - begun))
    cached, encoding = (sorted(rates[encode])[ROUNDS // 2] for encode in (False, True))
    with capsys.disabled():
        print(
            f"\ncached {cached:.2f} steps/s, encoding every step {encoding:.2f} steps/s, ratio {cached / encoding:.2f}"
        )
        print(f"  rounds: cached {[round(r, 2) for r in rates[False]]}, encoding {[round(r, 2) for r in rates[True]]}")
    assert cached > encoding
