"""What every family must hold before anything trains: loading, cached embeddings, the hand-over, and T-LoRA's ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difftuning_control.adapters.tlora import ranks
from difftuning_control.adapters.tuning import AdapterTuning
from difftuning_control.data.embeddings import cached_embeddings
from difftuning_control.families.loading import family_of, load_family
from difftuning_control.pipelines.guidance import hand_over
from difftuning_control.recipe.adapter import AdapterConfig
from support.drawing import PROMPTS, TOLERANCE, generators
from support.tensors import in_memory


def assert_loaded_it_is_the_saved_one(family: Any, side: int, tmp_path: Path) -> None:
    """A model that was saved has the same fingerprints, and draws the same bit by bit."""
    family.pipe.save_pretrained(tmp_path)
    loaded = load_family(str(tmp_path))
    assert loaded.fingerprints == family.fingerprints
    assert loaded.sampler_settings() == family.sampler_settings()
    settings = {"steps": 2, "guidance_scale": 3.0, "resolution": side}
    expected = family.sample(PROMPTS, generators(0, 1), **settings)
    torch.testing.assert_close(loaded.sample(PROMPTS, generators(0, 1), **settings), expected, atol=0, rtol=0)


def assert_embeddings_are_cached(family: Any, tmp_path: Path) -> None:
    """They are read again, and made again when the encoder changes."""
    first = cached_embeddings(family_of(family.pipe), PROMPTS, tmp_path, lambda _: None)
    torch.testing.assert_close(in_memory(first), family.encode_prompts(["", *PROMPTS]), **TOLERANCE)
    again = cached_embeddings(family_of(family.pipe), PROMPTS, tmp_path, lambda _: None)
    torch.testing.assert_close(in_memory(again), in_memory(first), atol=0, rtol=0)
    assert len(list(tmp_path.iterdir())) == 1
    next(family.pipe.text_encoder.parameters()).data.add_(0.1)
    cached_embeddings(family_of(family.pipe), PROMPTS, tmp_path, lambda _: None)
    assert len(list(tmp_path.iterdir())) == 2


def assert_the_pretrained_model_takes_over(family: Any, side: int, between_at: float) -> None:
    """At u₀ = 0 the tuned model draws, at 1 the pretrained one, at `between_at` neither alone."""

    def sample():
        return family.sample(PROMPTS, generators(0, 1), steps=4, guidance_scale=3.0, resolution=side)

    base = sample()
    tuning = AdapterTuning(family, AdapterConfig(rank=2))
    for name, parameter in tuning.parameters().items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generators(1)[0])
    tuned = sample()
    assert not torch.allclose(base, tuned, atol=1e-3)
    for u0, expected in ((0.0, tuned), (1.0, base)):
        with hand_over(family, u0):
            torch.testing.assert_close(sample(), expected, **TOLERANCE)
    with hand_over(family, between_at):
        between = sample()
    assert not torch.allclose(between, base, atol=1e-4)
    assert not torch.allclose(between, tuned, atol=1e-4)


def assert_a_tlora_has_the_papers_ranks(family: Any, latents: Tensor) -> None:
    """At five noise levels, with two rows of noisy latents."""
    tuning = AdapterTuning(family, AdapterConfig(kind="tlora", rank=4, min_rank=1))
    rows, seen = family.encode_prompts(PROMPTS), list[int]()
    layer = next(m for n, m in family.denoiser.named_modules() if n.endswith("lora_A.default"))
    layer.register_forward_hook(lambda module, args, out: seen.append(int(out.flatten(0, -2).any(0).sum())))
    levels = torch.searchsorted(family.process.u, torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0]))
    for level in levels:
        with torch.no_grad():
            family.predict(family.denoiser, latents, family.process.timesteps[level.expand(2)], rows)
    assert tuning.parameters()
    expected = ranks(family.process.u[levels], len(family.process), 4, 1)
    forwards = len(seen) // len(levels)  # Qwen-Image 2.1 has one for each row
    assert forwards in (1, 2)
    assert seen == (2 * expected).repeat_interleave(forwards).tolist()  # and as many to take the start away again
    assert len(set(seen)) >= 3
