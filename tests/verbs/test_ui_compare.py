"""Comparisons: equal noise on every side, sliders, blind votes, and why a run came out as it did."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from difftuning_control.errors import UserError
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.record import RunRecord
from difftuning_control.runs.record_sections import BudgetRecord
from difftuning_control.runs.votes import Tally
from difftuning_control.verbs.train import train
from difftuning_control.verbs.ui.compare_view import (
    LEFT,
    RIGHT,
    SAME,
    Pair,
    grid,
    next_pair,
    sampling_of,
    sides_of,
    told,
    vote,
    votes_of,
)
from difftuning_control.verbs.ui.drawing import BASE, Drawing
from difftuning_control.verbs.ui.painter import Painter
from difftuning_control.verbs.ui.places import Places
from difftuning_control.verbs.ui.why_texts import LANGUAGES, TEXTS
from difftuning_control.verbs.ui.why_view import report_frame, reports_of, why

EVIL = "<script>alert(1)</script>"
ONE = Drawing((BASE,), ("a cat",), steps=2)


def pixels(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(p) for p in pictures])


@pytest.mark.wide  # it trains
def test_every_side_draws_from_the_same_noise_and_the_sliders_reach_it(tmp_path, recipe):
    run = tmp_path / "mine" / "runs" / "one"
    training = replace(recipe.training, max_steps=2, validate_every=0, learning_rate=0.05, save_at=[1])
    train(replace(recipe, output=str(run), training=training))
    places = Places.of(tmp_path / "mine")
    assert sides_of(places) == [BASE, "runs/one", "runs/one/step-000001"]
    painter, sides = Painter(places), (BASE, "runs/one", "runs/one/step-000001")
    drawing = Drawing(sides, ("red", "blue"), steps=2, resolution=16)
    done = []
    found = {side: pixels(pictures) for side, pictures in painter.draw(drawing, done.append).items()}
    assert (list(found), sum(done)) == (list(sides), 6)
    assert not (found[BASE] == found["runs/one"]).all()
    again = painter.draw(replace(drawing, sides=("runs/one", BASE)))[BASE]
    assert (pixels(again) == found[BASE]).all()
    # at strength 0, and handed over at once, a run draws what the base does
    for slider in ({"strength": 0.0}, {"hand_over": 1.0}):
        drawn = painter.draw(replace(drawing, sides=("runs/one",), **slider))["runs/one"]
        assert np.abs(pixels(drawn).astype(int) - found[BASE]).max() <= 1
    guided = painter.draw(replace(drawing, sides=("runs/one",), domain=True))["runs/one"]
    assert not (pixels(guided) == found["runs/one"]).all()
    mixed = painter.draw(replace(drawing, sides=("runs/one",), domain=True, mixture=1.0))["runs/one"]
    assert np.abs(pixels(mixed).astype(int) - found["runs/one"]).max() <= 1  # which is ordinary guidance
    painter.forget()
    assert painter._kept is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompts": ()}, "there is nothing to draw"),
        ({"sides": ()}, "there is nothing to draw"),
        ({"prompts": ("a",) * 65}, "are more than 64 pictures"),
        ({"steps": 0}, "steps is 0; expected 1 to 200"),
        ({"seed": -1}, "seed is -1"),
        ({"strength": 1.1}, "strength is 1.1; expected 0 to 1"),
        ({"domain": True, "guidance": 0.5}, "guidance is 0.5; expected 1 to 50"),
        ({"hand_over": float("nan")}, "hand-over is nan"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_named(settings, said):
    with pytest.raises(UserError, match=said):
        replace(ONE, **settings)


def test_a_run_elsewhere_does_not_draw(tmp_path):
    painter = Painter(Places.of(tmp_path))
    for side in ("../other", "/etc", "runs/none"):
        with pytest.raises(UserError):
            painter.draw(replace(ONE, sides=(side,)))


def test_prompts_of_a_grid_are_text(tmp_path):
    drawing = replace(ONE, prompts=(EVIL,), sides=(EVIL,))
    page = grid(drawing, {EVIL: [Image.new("RGB", (8, 8))]}, EVIL)
    assert "<script" not in page
    assert "data:image/png;base64," in page


# --- votes ----------------------------------------------------------------------------------------------------------


def finished(run: Path, steps: int = 30) -> Path:
    RunRecord(status="complete", recipe_values=Recipe().to_dict(), steps=steps).write(run)
    return run


class Flat(Painter):
    """Draws a colour for each side."""

    def draw(self, drawing, advance=lambda count: None):
        return {side: [Image.new("RGB", (8, 8), "red" if side == BASE else "blue")] for side in drawing.sides}


def test_a_vote_counts_for_the_side_that_was_hidden_behind_it(tmp_path: Path):
    places = Places.of(finished(tmp_path / "runs" / "one").parents[1])
    pairs = [Pair("runs/one", BASE, left, ONE) for left in (True, False)]
    for pair in pairs:
        for said in (LEFT, RIGHT, SAME):
            found = vote(places, pair, said)
    assert found == [Tally(BASE, 2, 2, 2, 30)]
    found = vote(places, pairs[0], LEFT)
    assert found == [Tally(BASE, 3, 2, 2, 30)]
    assert "preferred in 3 of 5 (60 %, 95 % interval 23 to 88 %); " in told("runs/one", found)
    for pair, said in ((None, LEFT), (pairs[0], "both")):
        with pytest.raises(UserError):
            vote(places, pair, said)


def test_votes_of_other_weights_are_counted_apart(tmp_path: Path):
    run = finished(tmp_path / "runs" / "one")
    old = [{"against": BASE, "preferred": True, "kept_step": step} for step in (None, 10)]
    (run / "votes.json").write_text(json.dumps({"votes": old}))
    places = Places.of(tmp_path)
    assert vote(places, Pair("runs/one", BASE, True, ONE), RIGHT) == [Tally(BASE, 1, 0, 0), Tally(BASE, 0, 1, 0, 30)]
    step = Pair("runs/one/step-000010", BASE, True, ONE)
    assert vote(places, step, LEFT)[1:] == [Tally(BASE, 2, 0, 0, 10)]
    finished(run, steps=60)  # which went on
    assert vote(places, Pair("runs/one", BASE, True, ONE), LEFT)[1:] == [Tally(BASE, 1, 0, 0, 60)]
    page = votes_of(places, "runs/one")
    assert page.count("preferred in 1 of 1") == 2  # of 60 steps, and of an old vote that does not say
    assert page.count("do not say after how many steps") == 1
    assert "preferred in 2 of 2" in votes_of(places, "runs/one/step-000010")


def test_the_run_of_the_pages_own_folder_is_compared_as_any_other(tmp_path: Path):
    run = finished(tmp_path / "mine")
    (run / "step-000010").mkdir()
    (run / "step-000010" / "losses.json").write_text("{}")
    finished(run / "runs" / "two")
    places = Places.of(run)
    assert sides_of(places) == [BASE, "mine", "mine/step-000010", "runs/two"]
    assert [places.run(side) for side in sides_of(places)[1:]] == [run, run / "step-000010", run / "runs" / "two"]
    assert sampling_of(places, ["mine"])[0] == Recipe().training.sample_steps
    vote(places, Pair("mine/step-000010", BASE, True, ONE), LEFT)
    assert "preferred in 1 of 1" in votes_of(places, "mine/step-000010")
    assert Painter(places)._record("mine", ONE).steps == 30


def test_the_sides_of_a_pair_change_and_the_page_does_not_tell_them(tmp_path: Path):
    pairs = [next_pair(Flat(Places.of(tmp_path)), ONE, "runs/one", BASE) for _ in range(40)]
    assert {pair.run_is_left for pair, _ in pairs} == {True, False}
    assert len({pair.drawing.seed for pair, _ in pairs}) > 30
    assert not any("runs/one" in page or BASE in page.replace("base64", "") for _, page in pairs)
    assert len({page for _, page in pairs}) == 2
    for run, against in ((BASE, "runs/one"), ("runs/one", "runs/one")):
        with pytest.raises(UserError, match="choose two that differ"):
            next_pair(Flat(Places.of(tmp_path)), ONE, run, against)


# --- why ------------------------------------------------------------------------------------------------------------


def test_why_shows_what_was_learnt_and_forgotten_and_the_schedule(tmp_path: Path):
    losses = {
        role: {"base": {"u": [0.1, 0.5], "loss": [0.5, 0.5]}, "tuned": {"u": [0.1, 0.5], "loss": after}}
        for role, after in {"target": [0.4, 0.4], "bank": [0.5, 0.6]}.items()
    }
    budget = BudgetRecord(u=[0.1], allowed=[0.02], rise=[0.1], kept=[False], multipliers=[1.0])
    record = RunRecord(status="complete", recipe_values=Recipe().to_dict(), losses=losses, budget=budget)
    record.write(tmp_path / "one")
    page = why(Places.of(tmp_path), "one", "en")
    for said in ("changed by −20.0%", "changed by +10.0%", "exceeded", "+10.0 %"):
        assert said in page
    assert page.count("<svg") == 3
    assert "忘却の連鎖" in why(Places.of(tmp_path), "one", "ja")


def test_reports_of_studies_are_found_and_those_of_runs_are_not(tmp_path: Path):
    for name in ("study", "run", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.html").write_text("<p>found</p>")
    (tmp_path / "run" / "run.json").write_text("{}")
    places = Places.of(tmp_path)
    assert reports_of(places) == ["study"]
    assert 'sandbox=""' in report_frame(places, "study", "en")
    with pytest.raises(UserError, match="leads out of the folders"):
        report_frame(places, "../x", "en")


def test_both_languages_say_the_same_things():
    assert TEXTS["en"].keys() == TEXTS["ja"].keys()
    assert [*LANGUAGES.values()] == [*TEXTS]
    for key, text in TEXTS["en"].items():
        assert ("{change}" in text) == ("{change}" in TEXTS["ja"][key])
