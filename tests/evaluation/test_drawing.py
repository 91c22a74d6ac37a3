"""Pictures drawn with equal seeds, however many at once."""

import pytest
import torch

from difftuning_control.data.images import to_images
from difftuning_control.evaluation import drawing
from difftuning_control.evaluation.drawing import sample_pictures
from difftuning_control.families.loading import load_family

SETTINGS = {"seed": 3, "steps": 1, "guidance_scale": 2.0, "resolution": 64}


@pytest.mark.parametrize(("pixels", "rows"), [(2 * 64 * 64, [2, 2, 1]), (64 * 64 - 1, [1] * 5), (2**21, [5])])
def test_large_pictures_are_drawn_few_at_once(monkeypatch, pixels, rows):
    family = load_family("embedded")
    prompts = [f"red {i}" for i in range(5)]
    latents: list[torch.Tensor] = []
    sample = family.sample

    def counted(*given, **settings):
        latents.append(sample(*given, **settings))
        return latents[-1]

    monkeypatch.setattr(family, "sample", counted)
    monkeypatch.setattr(drawing, "pictures_at_once", lambda size: max(1, pixels // size))
    pictures = sample_pictures(family, prompts, **SETTINGS)
    assert [len(part) for part in latents] == rows
    alone = [torch.Generator().manual_seed(drawing.step_seed(3, i)) for i in range(5)]
    expected = sample(prompts, alone, steps=1, guidance_scale=2.0, resolution=64, control=None)
    torch.testing.assert_close(torch.cat(latents), expected, atol=1e-4, rtol=1e-4)
    assert len(pictures) == len(to_images(family.decode(expected)))
