"""What the tabs do to what somebody chose, moved or wrote."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.record import RunRecord
from difftuning_control.runs.votes import add_vote
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
    shown = events(page, "pictures_tab", "chosen_place")[0].fn(".", 16, False, None)[0]
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


def test_an_edit_that_is_taken_back_takes_the_page_to_its_folder(page, tmp_path):
    (tmp_path / "others").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "others" / "a.png")
    (tmp_path / "others" / "a.txt").write_text("other")
    ((write,), (undo,)) = (events(page, "pictures_tab", name) for name in ("write", "take_back"))
    write.fn("photos", 64, False, "a.png", "caption a", "mine")
    back = undo.fn("others", 64, False)
    by_id = {box._id: value for box, value in zip(undo.outputs, back)}
    place = by_id[undo.inputs[0]._id]["value"]  # of the folder's box, from which the next edit takes its folder
    assert (tmp_path / place).resolve() == tmp_path / "photos"
    write.fn(place, 64, False, by_id[write.inputs[3]._id], by_id[write.inputs[4]._id], "new")
    assert [(tmp_path / f / "a.txt").read_text() for f in ("photos", "others")] == ["new", "other"]
    (choose,) = events(page, "pictures_tab", "chosen_place")
    assert choose.fn(place, 64, False, by_id[choose.inputs[3]._id]) == [SKIPPED] * len(choose.outputs)
    assert choose.fn("others", 64, False, by_id[choose.inputs[3]._id])[0] != SKIPPED


def test_a_side_that_is_chosen_has_its_votes_shown(page, tmp_path):
    one = {"prompt": "a cat", "trained_steps": None}
    add_vote(tmp_path / "runs" / "one", "base", True, one)
    RunRecord(status="complete", recipe_values=Recipe().to_dict()).write(tmp_path / "runs" / "two")
    (choose,) = events(page, "compare_tab", "votes_so_far")
    box = choose.inputs[0]
    assert (box.label, choose.targets) == ("This run", [(box._id, "input")])
    assert choose.fn("runs/one") != choose.fn("runs/two")
    assert "1" in choose.fn("runs/one")
    assert choose.fn(None) == ""


def test_a_run_whose_name_is_not_utf_8_keeps_no_other_from_being_shown(page, tmp_path):
    name = os.fsdecode(b"\xff")
    try:
        RunRecord(status="complete", recipe_values=Recipe().to_dict()).write(tmp_path / "runs" / name)
        for place in (tmp_path / "runs" / name, tmp_path / name):  # a run and a study
            place.mkdir(exist_ok=True)
            (place / "report.html").write_text("<p>mine</p>")
    except OSError:
        pytest.skip("this system has no such names")
    compare = events(page, "compare_tab", "arrive")[0].fn([], "", None, "base", False, False)
    reasons = events(page, "why_tab", "arrive")[0].fn(None, None, "English")
    shown = events(page, "runs_tab", "shown")[0].fn(f"runs/{name}")[1:]  # the first is a state, which stays here
    (ask,) = events(page, "runs_tab", "ask")
    for sent in (compare, reasons, shown, ask.fn(f"runs/{name}")):
        json.dumps(sent, ensure_ascii=False).encode()
    assert (compare[0]["choices"], reasons[0]["choices"], reasons[1]["choices"]) == (
        ["base", "runs/one"],
        ["runs/one"],
        [],
    )
    assert "is not UTF-8" in shown[3]
    assert "/studio/report" not in shown[3]


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
