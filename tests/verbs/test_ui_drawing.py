"""What a comparison can draw: strengths over the noise, over a picture, under a condition, and until it is stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from difftuning_control.data.control_spec import Conditioner, ControlSpec
from difftuning_control.errors import UserError
from difftuning_control.recipe.inputs import ControlConfig, FidelityConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.training import TrainingConfig
from difftuning_control.runs.record import RunRecord
from difftuning_control.verbs.train import train
from difftuning_control.verbs.ui.compare_view import first_sides, grid, sampling_of, sides_of
from difftuning_control.verbs.ui.drawing import BASE, Drawing, points_of, schedule_of
from difftuning_control.verbs.ui.painter import Painter
from difftuning_control.verbs.ui.places import Places

ONE = Drawing((BASE,), ("a cat",), steps=2)


def pixels(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(p) for p in pictures]).astype(int)


def photo(folder: Path, size: tuple[int, int] = (48, 32)) -> Path:
    cells = np.random.default_rng(3).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(cells).resize(size, Image.Resampling.NEAREST).save(folder / "photo.png")
    return folder / "photo.png"


# --- strengths over the noise ---------------------------------------------------------------------------------------


def test_a_strength_over_the_noise_is_pairs_that_hold_beyond_their_ends():
    assert points_of("", "it") == ()
    assert points_of(" 0:0, 0.5:1; 1:.5 ", "it") == ((0, 0), (0.5, 1), (1, 0.5))
    assert points_of("0.3:1, 0.7:0", "it") == ((0, 1), (0.3, 1), (0.7, 0), (1, 0))
    assert schedule_of(1.0, ()) is None
    assert schedule_of(0.5, ()) == {"kind": "table", "u": [0, 1], "strength": [0.5, 0.5]}
    assert schedule_of(0.5, ((0, 1), (1, 0))) == {"kind": "table", "u": [0, 1], "strength": [0.5, 0]}


@pytest.mark.parametrize("text", ["1", "0:2", "0.5:1, 0.5:0", "1:0, 0:1", "a:b", "nan:1", "0:nan", "0:1:1"])
def test_what_is_no_strength_over_the_noise_is_named(text):
    with pytest.raises(UserError, match=r"it over the noise is .*; expected pairs"):
        points_of(text, "it")


def test_the_page_shows_who_draws_at_each_noise_level():
    pictures = {"runs/one": [Image.new("RGB", (8, 8))]}
    plain = replace(ONE, sides=("runs/one",))
    assert "<svg" not in grid(plain, pictures, "embedded")
    assert "<svg" not in grid(replace(ONE, hand_over=0.5), {BASE: pictures["runs/one"]}, "embedded")  # of no run
    assert "<svg" in grid(replace(plain, hand_over=0.5), pictures, "embedded")
    assert "<svg" in grid(replace(plain, over_noise=((0, 0), (1, 1))), pictures, "embedded")
    shown = {"runs/one": Image.new("RGB", (8, 8))}
    page = grid(replace(plain, control=0.5), pictures, "embedded", shown)
    assert "the ControlNet" in page
    assert 'class="condition"' in page


def test_what_was_stopped_is_said():
    page = grid(replace(ONE, sides=(BASE, "runs/one")), {BASE: [Image.new("RGB", (8, 8))]}, "embedded")
    assert "Stopped; not drawn: runs/one." in page


def test_a_comparison_begins_with_the_steps_and_guidance_of_the_first_runs_own_grids(tmp_path):
    """Which are few, without guidance, of a distilled model."""
    places = Places.of(tmp_path)
    assert sampling_of(places, [BASE]) == (Drawing.steps, Drawing.guidance)
    few = Recipe(training=TrainingConfig(sample_steps=4, sample_guidance_scale=1.0))
    RunRecord(status="complete", recipe_values=few.to_dict()).write(tmp_path / "runs" / "turbo")
    assert sampling_of(places, [BASE, "runs/turbo"]) == (4, 1.0)


# --- drawn ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def painter(tmp_path_factory) -> Painter:
    """One that keeps the embedded model."""
    return Painter(Places.of(tmp_path_factory.mktemp("studio")))


def test_the_base_draws_over_a_picture_and_changes_it_as_far_as_is_asked(tmp_path, painter):
    begin = photo(tmp_path)
    drawing = replace(ONE, prompts=("a cat", "a dog"), steps=4, begin=begin, change=0.25)
    little = pixels(painter.draw(drawing)[BASE])
    assert little.shape == (2, 64, 64, 3)
    again = pixels(painter.draw(replace(drawing, prompts=("a cat",)))[BASE])
    assert np.abs(again[0] - little[0]).max() <= 2  # picture i has its noise from the seed and i alone
    much = pixels(painter.draw(replace(drawing, change=1.0))[BASE])
    framed = np.asarray(Image.open(begin).crop((8, 0, 40, 32)).resize((64, 64))).astype(int)
    assert np.abs(little - framed).mean() < np.abs(much - framed).mean()
    with pytest.raises(UserError, match=r"a change of 0.1 leaves none of 4 steps; expected at least 0.25"):
        painter.draw(replace(drawing, change=0.1))
    begin.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"photo.png is not a picture"):
        painter.draw(drawing)


def test_drawing_ends_at_the_next_step_once_it_is_stopped(painter):
    done = []

    def stop(count: int) -> None:
        done.append(count)
        painter.stop()

    prompts = tuple(f"picture {i}" for i in range(5))  # two batches
    assert painter.draw(replace(ONE, prompts=prompts), stop) == {}
    assert done == [4]
    assert len(painter.draw(ONE)[BASE]) == 1  # and the next one is drawn


@pytest.mark.wide  # it trains
def test_an_adapter_acts_over_the_noise_and_over_a_picture(tmp_path, recipe):
    run = tmp_path / "mine" / "runs" / "one"
    training = replace(recipe.training, max_steps=2, validate_every=0, learning_rate=0.05)
    train(replace(recipe, output=str(run), training=training))
    painter = Painter(Places.of(tmp_path / "mine"))
    drawing = Drawing((BASE, "runs/one"), ("red",), steps=4, resolution=16)
    found = {side: pixels(p) for side, p in painter.draw(drawing).items()}
    none = pixels(painter.draw(replace(drawing, over_noise=((0, 0), (1, 0))))["runs/one"])
    assert np.abs(none - found[BASE]).max() <= 1
    part = pixels(painter.draw(replace(drawing, over_noise=((0, 0), (0.5, 0), (0.6, 1), (1, 1))))["runs/one"])
    assert not (part == found["runs/one"]).all()
    assert not (part == none).all()
    over = replace(drawing, begin=photo(tmp_path), change=0.8)
    drawn = {side: pixels(p) for side, p in painter.draw(over).items()}
    assert not (drawn[BASE] == drawn["runs/one"]).all()
    off = pixels(painter.draw(replace(over, strength=0.0))["runs/one"])
    assert np.abs(off - drawn[BASE]).max() <= 1
    sides = (BASE, "runs/one")
    stopped = painter.draw(replace(drawing, sides=sides), lambda count: painter.stop())
    assert list(stopped) == [BASE]


@pytest.mark.wide  # it trains
def test_a_controlnet_draws_under_the_condition_of_a_photo_with_a_strength_over_the_noise(tmp_path, recipe):
    run = tmp_path / "mine" / "runs" / "edges"
    training = replace(recipe.training, max_steps=3, validate_every=0, learning_rate=0.05)
    control = ControlConfig(annotator="canny", fidelity=FidelityConfig(every=0))
    train(replace(recipe, method="controlnet", control=control, output=str(run), training=training))
    places = Places.of(tmp_path / "mine")
    assert (sides_of(places), first_sides(places)) == ([BASE, "runs/edges"], [BASE])
    painter, shown = Painter(places), {}
    drawing = Drawing((BASE, "runs/edges"), ("red",), steps=3, resolution=16, photo=photo(tmp_path))
    found = {side: pixels(p) for side, p in painter.draw(drawing, show=shown.__setitem__).items()}
    assert list(shown) == ["runs/edges"]
    assert shown["runs/edges"].size == (16, 16)
    asked = Conditioner(ControlSpec.load(run / "controlnet")).prepare(Image.open(photo(tmp_path)), 16, 16)
    assert (np.asarray(shown["runs/edges"]) == np.asarray(asked)).all()
    assert not (found[BASE] == found["runs/edges"]).all()
    for off in ({"control": 0.0}, {"control_over_noise": ((0, 0), (1, 0))}):
        drawn = pixels(painter.draw(replace(drawing, **off))["runs/edges"])
        assert np.abs(drawn - found[BASE]).max() <= 1
    with pytest.raises(UserError, match="runs/edges is a ControlNet, which draws under a condition; add a photo"):
        painter.draw(replace(drawing, photo=None))
    with pytest.raises(UserError, match="draws over no picture here"):
        painter.draw(replace(drawing, begin=drawing.photo))
