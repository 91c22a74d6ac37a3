"""What the tabs do to what somebody chose, moved or wrote."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.record import RunRecord
from difftuning_control.verbs.ui.painter import Painter
from difftuning_control.verbs.ui.places import Places

gr = pytest.importorskip("gradio", reason="the page needs gradio: pip install 'difftuning-control[ui]'")
SKIPPED = {"__type__": "update"}


@pytest.fixture
def page(tmp_path: Path) -> Any:
    """The page over a folder without pictures, and then with two of them and a run."""
    from difftuning_control.verbs.ui.page import build_page
    from difftuning_control.verbs.ui.studio import Studio

    made = build_page(Studio(Places.of(tmp_path)))
    for name in ("a", "b"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "photos" / f"{name}.png")
        (tmp_path / "photos" / f"{name}.txt").write_text(f"caption {name}")
    RunRecord(status="complete", recipe_values=Recipe().to_dict()).write(tmp_path / "runs" / "one")
    return made


def events(page: Any, tab: str, name: str) -> list[Any]:
    """The events of a tab's module whose function has this name."""
    found = [f for f in page.fns.values() if f.fn is not None and f.fn.__name__ == name]
    return [f for f in found if inspect.getmodule(inspect.unwrap(f.fn)).__name__.endswith(f".{tab}")]


def test_a_set_of_the_package_that_was_chosen_stays_chosen(page):
    pictures, train = events(page, "pictures_tab", "arrive")[0].fn, events(page, "train_tab", "arrive")[0].fn
    for is_own, place in ((False, "photos"), (True, "embedded/flat")):
        assert pictures("embedded/flat", 64, False, None, 0, is_own)[0]["value"] == place
        assert train("embedded/flat", "", is_own)[0]["value"] == place


def test_pictures_at_the_top_of_the_folder_are_chosen_and_refused_in_a_sentence(tmp_path):
    from difftuning_control.verbs.ui.page import build_page
    from difftuning_control.verbs.ui.studio import Studio

    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("caption a")
    page = build_page(Studio(Places.of(tmp_path)))
    begin, first = events(page, "train_tab", "begin")[0], events(page, "train_tab", "arrive")[0].inputs[0]
    assert first.value == "."
    assert events(page, "train_tab", "arrive")[0].fn(first.value, "", False)[0]["value"] == "."
    with pytest.raises(gr.Error, match="move these into a folder of their own"):
        begin.fn(*(box.value for box in begin.inputs))
    shown = events(page, "pictures_tab", "first")[0].fn(".", 16, False)[0]
    assert "training can use all" not in shown
    assert "move these into a folder of their own" in shown


def test_text_that_is_typed_stays_while_its_picture_is_chosen(page, tmp_path):
    arrive, at = (
        events(page, "pictures_tab", "arrive")[0].fn,
        3,
    )  # of the caption's box; four further what it began with
    asked = ("photos", 64, False, "a.png", 0, False)
    assert (arrive(*asked)[at], arrive(*asked)[at + 4]) == (SKIPPED, SKIPPED)
    (pick,) = events(page, "pictures_tab", "pick")
    chosen = pick.fn("photos", 64, False, gr.EventData(None, {"value": "b.png"}))
    assert (chosen[2]["value"], chosen[6]) == ("caption b", "caption b")
    (write,) = events(page, "pictures_tab", "write")
    following = write.fn("photos", 64, False, "a.png", "caption a", "mine")
    assert (following[2]["value"], (tmp_path / "photos" / "a.txt").read_text()) == ("caption b", "mine")


def test_steps_and_guidance_that_were_set_stay(page):
    (arrive,) = events(page, "compare_tab", "arrive")
    fresh, was_set = (arrive.fn([], "", None, "base", False, is_set)[-2:] for is_set in (False, True))
    assert fresh[0] == Recipe().training.sample_steps
    assert was_set == [SKIPPED, SKIPPED]


def test_a_slider_that_is_moved_while_it_draws_draws_once_it_has(page):
    drawing = events(page, "compare_tab", "drawn")
    assert len(drawing) == 7
    assert {event.trigger_mode for event in drawing} == {"always_last"}


def test_what_draws_shows_the_button_that_stops_it(page, monkeypatch):
    picture = Image.new("RGB", (8, 8))
    monkeypatch.setattr(Painter, "draw", lambda painter, drawing, *told: {"base": [picture]})
    drawing = events(page, "compare_tab", "drawn")[0]
    first, last = drawing.fn(["base"], "a cat", *(box.value for box in drawing.inputs[2:]))
    assert (first[2]["visible"], "data:image/png" in last[0], last[1]) == (True, True, True)
