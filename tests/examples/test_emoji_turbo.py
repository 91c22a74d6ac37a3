"""The study of few-step models in examples/emoji: its sides, its order, its tables, and a small one from end to end."""

import pytest
import torch
from diffusers import LCMScheduler

from difftuning_control.families.loading import load_family
from support.scripts import emoji_script


@pytest.fixture
def turbo(monkeypatch):
    return emoji_script(monkeypatch, "turbo")


def test_a_bank_is_drawn_as_its_model_draws_and_sides_differ_in_model_and_retention_alone(turbo, tmp_path):
    recipes = [turbo.recipe_for(side, "flat", 1, tmp_path) for side in turbo.SIDES]
    for side, recipe in zip(turbo.SIDES, recipes):
        few = side.model == "turbo"
        assert (recipe.bank.steps, recipe.bank.guidance_scale) == ((4, 1.0) if few else (15, 1.5))
        assert recipe.model.id == (str(tmp_path / "turbo") if few else "embedded")
        assert (recipe.training, recipe.data) == (recipes[0].training, recipes[0].data)
    assert len({recipe.output for recipe in recipes}) == len(recipes)


def test_every_target_has_its_first_seed_before_any_has_its_second(turbo):
    order = [(seed, target) for seed, target, _ in turbo.jobs([0, 1], ["icons", "flat"])]
    assert list(dict.fromkeys(order)) == [(0, "icons"), (0, "flat"), (1, "icons"), (1, "flat")]
    assert len(order) == 4 * (1 + len(turbo.SIDES))


def row(side: str, tuned: str, model: str, steps: int, seed: int, kid: float) -> dict:
    figures = {"kid": kid, "domain_hit": 0.5, "pair_similarity": 0.6, "memorisation": 0.7}
    return {"target": "flat", "side": side, "tuned": tuned, "model": model, "steps": steps, "seed": seed, **figures}


def test_a_table_puts_a_side_with_its_other_numbers_of_steps_into_one_line(turbo):
    rows = [row("plain", "turbo", "turbo", n, seed, 0.01 * n + 0.002 * seed) for n in (1, 4, 8) for seed in (0, 1)]
    rows.append(row("untuned", "base", "base", 15, 0, 0.05))
    lines = turbo.tables({"turbo": {"ways": {"base": {"kid": 0.004, "recognised": 0.5}}}, "rows": rows}).splitlines()
    assert "| base | 4 | 50% |" in lines
    assert "**flat** (2 of 3 seeds)" in lines
    drawn = "turbo, 4 steps, guidance 1"
    assert lines[-2] == f"| turbo | plain | {drawn} | 41 ± 1 | 50 ± 0 | 0.600 ± 0.000 | 81 ± 1 | 11 ± 1 |"
    assert lines[-1] == "| base | not tuned | base, 15 steps, guidance 4 | 50 | 50 | 0.600 |  |  |"


def test_the_teachers_levels_are_those_of_the_few_step_scheduler(turbo):
    import distil

    family = load_family("embedded")
    drawn = distil._drawn(family, distil.prompts_of(2), 0)
    assert drawn["noisy"].shape == (2, distil.LEVELS, family.latent_channels, 8, 8)
    own = LCMScheduler.from_config(family.pipe.scheduler.config, original_inference_steps=distil.LEVELS)
    own.set_timesteps(distil.LEVELS)
    with family.solved_by("dpmsolver++"):
        family.pipe.scheduler.set_timesteps(distil.LEVELS)
        assert torch.equal(family.pipe.scheduler.timesteps, own.timesteps)
    noise = torch.randn(
        family.latent_channels, 8, 8, generator=torch.Generator().manual_seed(distil.step_seed(distil.SEED, 1))
    )
    assert torch.equal(drawn["noisy"][1, 0], noise)


@pytest.mark.slow
def test_a_small_study_runs_from_end_to_end_and_is_not_done_again(turbo, tmp_path, monkeypatch):
    import distil

    monkeypatch.setattr(distil, "JUDGED", 6)
    monkeypatch.setattr(turbo, "SIDES", [turbo.SIDES[2], turbo.SIDES[4]])
    folder = distil.make_turbo(tmp_path, trajectories=8, steps=1)
    assert type(load_family(str(folder)).pipe.scheduler).__name__ == "LCMScheduler"
    for _ in range(2):
        turbo.run(tmp_path, [0], ["flat"], (1, 2), 5)
        monkeypatch.setattr(turbo, "train", None)  # what is done is not done again
    rows = turbo.collect(tmp_path)["rows"]
    assert [r["side"] for r in rows].count("untuned") == 4
    assert {r["length"] for r in rows if r["side"] != "untuned"} <= {1, 2}
    assert "teacher on the bank, own prompts" in turbo.tables(turbo.collect(tmp_path))
