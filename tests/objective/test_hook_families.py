"""The hook adds bank rows to what each family's model is told: a row of the bank is the model's of the empty prompt."""

import pytest
import torch

from difftuning_control import DiffTuningObjective, extend_rows
from difftuning_control.families.loading import family_of
from support.drawing import PROMPTS, TOLERANCE, generators
from support.flow_families import STOCK, need, shorten
from support.tiny_models import tiny_lumina2, tiny_pixart, tiny_sana

MADE = {"pixart": tiny_pixart, "sana": tiny_sana, "lumina2": tiny_lumina2} | {n: s.make for n, s in STOCK.items()}


@pytest.mark.sample("pixart", "z_image")
@pytest.mark.parametrize("name", MADE)
def test_bank_rows_are_told_the_empty_prompt(name, monkeypatch):
    if name in STOCK:
        need(name)
        shorten(monkeypatch)
    family = family_of(MADE[name]())
    objective = DiffTuningObjective.from_scheduler(family.pipe.scheduler, preset="paper")
    shape = (family.latent_channels, 8, 8)
    pictures, bank = torch.randn(8, *shape), torch.randn(5, *shape, generator=generators(1)[0])
    rows, empty = family.encode_prompts(PROMPTS * 4), family.encode_prompts([""])
    latents, is_retention, items = objective.add_bank_rows(pictures, bank)
    told = extend_rows(rows, empty, is_retention)
    assert len(latents) == 8 + len(items) == len(is_retention) > 8
    level = family.process.levels_of(family.process.timesteps[700:701])
    timesteps = family.process.timesteps[level].expand(len(latents))
    with torch.no_grad():
        together = family.predict(family.denoiser, latents, timesteps, told)
        alone = family.predict(family.denoiser, pictures, timesteps[:8], rows)
        banks = {key: value.expand(len(items), *value.shape[1:]) for key, value in empty.items()}
        of_bank = family.predict(family.denoiser, bank[items], timesteps[8:], banks)
    torch.testing.assert_close(together, torch.cat([alone, of_bank]), **TOLERANCE)
    drawn = objective.sample_timesteps(is_retention)
    assert drawn.shape == is_retention.shape
    losses = (together[:, : shape[0]] - latents).square().flatten(1).mean(1)
    reduced = objective.reduce(losses, drawn, is_retention)
    assert torch.isfinite(reduced)
