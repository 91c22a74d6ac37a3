"""The study of five conditions: its annotators, when a curve is half-way, effects, and one pass over all of it."""

import json

import numpy as np
import pytest
from PIL import Image

from difftuning_control.data.control_spec import Conditioner, ControlSpec
from support.scripts import emoji_script


@pytest.fixture
def tasks(monkeypatch):
    return emoji_script(monkeypatch, "control_tasks")


@pytest.fixture
def picture() -> np.ndarray:
    """A red square on white, 64 × 64."""
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[16:32, 8:40] = (200, 0, 0)
    return pixels


def test_conditions_are_what_the_pixels_give(tasks, picture):
    made = {
        name: Conditioner(ControlSpec(f"conditions:{name}", resolution=64)).condition(picture)
        for name in ("silhouette", "colours", "negative")
    }
    assert np.array_equal(made["silhouette"][..., 0] > 0, (picture != 255).any(-1))
    assert np.array_equal(255 - made["negative"], picture)
    assert np.array_equal(made["colours"][16:32, 8:40], picture[16:32, 8:40])  # blocks of 8 pixels, which the edges fit
    shifted = Conditioner(ControlSpec("conditions:colours", resolution=64)).condition(np.roll(picture, 4, 1))
    assert {tuple(pixel) for pixel in shifted[16:24].reshape(-1, 3)} == {(255,) * 3, (228, 128, 128), (200, 0, 0)}


def test_first_reach_interpolates(tasks):
    assert tasks.first_reach([0, 10, 20, 30], [0.0, 0.2, 0.6, 0.7], 0.5) == pytest.approx(17.5)
    assert tasks.first_reach([5, 10, 20], [0.6, 0.7, 0.7], 0.5) == 5
    assert tasks.first_reach([5, 10, 20], [0.4, 0.5, 0.5], 0.5) == 10


def test_first_reach_is_not_misled_by_a_spike(tasks):
    values = [0.1, 0.1, 0.6, 0.1, 0.1, 0.4, 0.8, 0.8]
    assert tasks.first_reach(list(range(8)), values, 0.5) == pytest.approx(5.25)
    assert tasks.first_reach(list(range(8)), [0.1, 0.1, 0.6] + [0.1] * 5, 0.5) is None


def test_first_reach_of_a_level_that_is_not_reached(tasks):
    assert tasks.first_reach([1, 2, 3], [0.1, 0.2, 0.3], 0.5) is None
    assert tasks.first_reach([1, 2, 3], [0.1, 0.2, 0.9], 0.5) is None  # nothing confirms it yet
    assert tasks.first_reach([], [], 0.5) is None


def curve(rise: int, task: str, side: str, seed: int) -> dict:
    """Fidelity that goes from 0.2 to 0.8 at once before step `rise`, never where that is 0."""
    steps = list(range(0, 320, 20))
    values = [0.8 if rise and step >= rise else 0.2 + 0.001 * (step % 3) for step in steps]
    fidelity = {"main": "f1", "without": {"f1": 0.2}, "steps": steps, "figures": {"f1": values}}
    return {"target": task, "method": side, "seed": seed, "learning_rate": 1e-3, "fidelity": fidelity}


def test_half_way_is_half_of_the_rise_of_plain_and_a_run_without_one_counts_with_its_length(tasks):
    rows = [curve(160, "a", "plain", seed) for seed in range(3)]
    rows += [curve(80, "a", "levels", seed) for seed in range(2)] + [curve(0, "a", "levels", 2)]
    found = tasks.measured(rows)
    assert [row["half_way"] for row in found] == pytest.approx([150] * 3 + [70, 70, 300], abs=0.2)
    assert [row["reached"] for row in found] == [True] * 5 + [False]
    said = tasks.table({"rows": rows})
    assert "| a (0.20) | ψ = u alone | 0.001 |" in said
    assert "| 2/3 |" in said


def test_an_effect_over_the_conditions_has_an_interval(tasks):
    rows = [curve(160, task, "plain", seed) for task in "abcde" for seed in range(5)]
    rows += [curve(80 + 20 * (seed % 2), task, "levels", seed) for task in "abcd" for seed in range(5)]
    rows += [curve(100 - 20 * (seed % 2), "e", "levels", seed) for seed in range(5)]
    middle, low, high = tasks.effect(tasks.measured(rows), "levels", "plain", "half_way")
    assert low < middle < high < 0
    assert middle == pytest.approx(78 / 150 - 1, abs=0.01)


def test_a_collection_keeps_the_conditions_and_sides_that_were_collected_before(tasks):
    def collection(task: str, *sides: str, rise: int = 160, model: str = "a") -> dict:
        return {"versions": {}, "model": model, "rows": [curve(rise, task, s, n) for s in sides for n in (0, 1)]}

    found = tasks.joined(collection("negative", "plain", "levels"), collection("canny", "plain", "levels"))
    found = tasks.joined(found, collection("negative", "difftuning"))
    again = tasks.joined(found, collection("canny", "levels", rise=80))
    expected = [("canny", side) for side in ("plain", "levels")] + [("negative", side) for side in tasks.SIDES]
    assert [(row["target"], row["method"]) for row in again["rows"][::2]] == expected
    assert again["rows"][2:4] == collection("canny", "levels", rise=80)["rows"]
    with pytest.raises(SystemExit, match="of the model a, the new ones of b; collect into another file"):
        tasks.joined(again, collection("canny", "plain", model="b"))


@pytest.mark.slow
def test_the_search_goes_on_until_the_best_rate_is_not_at_an_edge(tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "TASKS", {"silhouette": tasks.TASKS["silhouette"]})
    monkeypatch.setattr(tasks, "RATES", (1e-3, 2e-3))
    monkeypatch.setattr(tasks, "SEEDS", (0, 1))
    monkeypatch.setattr(tasks, "GRID_TASK", "silhouette")
    monkeypatch.setattr(tasks, "GRID_STEPS", (2, 4))
    flags = ["--training.max_steps=4", "--control.fidelity.every=1", "--control.fidelity.size=2", "--bank.size=2"]
    flags += ["--control.fidelity.steps=1", "--training.batch_size=5", "--bank.steps=2"]
    study = tasks.Study(tmp_path, flags)
    study.work_through()
    assert study.jobs() == []
    for side in tasks.SIDES:
        runs, rate = study.search("silhouette", side)
        rates = [job.rate for job in runs]
        assert rate not in (rates[0], rates[-1]) or len(rates) == 2 + tasks.WIDENED
        assert study.score(tasks.Job("silhouette", side, rate, tasks.SEARCHED)) == max(map(study.score, runs))
    rows = json.loads(json.dumps(study.rows()))
    assert [(row["method"], row["seed"]) for row in rows] == [(side, seed) for side in tasks.SIDES for seed in (0, 1)]
    assert "| silhouette (" in tasks.table({"rows": rows})
    tasks.grid(study, tmp_path / "grid.png", 2)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.height > 6 * 96
