"""The pictures of a page: what is wrong with each, captions edited and taken back, pictures that are added."""

from __future__ import annotations

import os
import re
import unicodedata
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from difftuning_control.data.sources import load_images
from difftuning_control.errors import UserError
from difftuning_control.verbs.ui.captions import caption_of, edit_caption, has_edits, undo_caption
from difftuning_control.verbs.ui.pictures_view import add_pictures, gallery, one_picture, pictures_of
from difftuning_control.verbs.ui.places import Places
from difftuning_control.verbs.ui.render import picked, render
from support.pictures import write_pictures

EVIL = "<script>alert(1)</script>"


def picture(seed: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size)


@pytest.fixture
def places(tmp_path: Path) -> Places:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, name in enumerate(("a", "b", "c")):
        picture(i).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"caption {name}\n")
    return Places.of(tmp_path)


def test_pictures_have_what_training_finds_wrong_with_them(places):
    folder = places.folder / "photos"
    (folder / "b.txt").unlink()
    (folder / "c.png").write_bytes(b"no picture")
    found = {p.name: p for p in pictures_of(places, "photos", 32)}
    assert (found["a.png"].caption, found["a.png"].problems) == ("caption a", ())
    assert "has no caption" in found["b.png"].problems[0]
    assert found["c.png"].problems == ("is not a picture that can be read",)
    with pytest.raises(UserError, match="has no caption"):
        load_images(str(folder))
    page = gallery(places, "photos", list(found.values()), 0, None)
    assert "1 without a caption, 1 that cannot be read or used" in page


def test_copies_are_named_whether_or_not_their_bytes_are_the_same(places):
    folder = places.folder / "photos"
    (folder / "d.png").write_bytes((folder / "a.png").read_bytes())
    picture(1).resize((96, 64)).save(folder / "e.jpg", quality=85)
    found = {p.name: p.notes for p in pictures_of(places, "photos", 32)}
    assert "the same file as a.png" in found["d.png"]
    assert "looks like b.png" in found["e.jpg"]
    assert not any("like" in note or "same" in note for name in ("a.png", "b.png", "c.png") for note in found[name])


def test_other_things_on_the_same_ground_are_no_copies(places):
    folder = places.folder / "photos"
    ground = Image.new("RGB", (64, 64), (238, 242, 247))
    for name, colour, box in (("d", (200, 30, 30), (20, 20, 44, 44)), ("e", (30, 60, 200), (20, 22, 44, 42))):
        ground.paste(colour, box)
        ground.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    found = {p.name: p.copy_of for p in pictures_of(places, "photos", 32)}
    assert (found["d.png"], found["e.png"]) == (None, None)


def test_the_frame_is_what_a_square_keeps(places):
    found = pictures_of(places, "photos", 32)[0]
    left, top, width, height = found.frame
    assert (round(left, 1), top, round(width, 1), height) == (16.7, 0, 66.7, 100)
    assert found.notes == ("a square leaves out 33%",)
    assert "would be enlarged" in pictures_of(places, "photos", 64)[0].notes[1]


def test_a_link_out_is_not_shown(places, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "x.png"
    picture(9).save(elsewhere)
    try:
        os.symlink(elsewhere, places.folder / "photos" / "link.png")
    except OSError:
        pytest.skip("this system makes no links here")
    found = {p.name: p for p in pictures_of(places, "photos", 32)}["link.png"]
    assert found.problems[0].startswith("leads outside the folder")
    assert "studio/picture" not in gallery(places, "photos", [found], 0, None)


def test_captions_and_names_are_text(places):
    folder = places.folder / "photos"
    (folder / "a.txt").write_text(EVIL)
    found = pictures_of(places, "photos", 32)
    for page in (gallery(places, "photos", found, 0, None), one_picture(places, "photos", found[0])):
        assert "<script" not in page
        assert "&lt;script&gt;" in page


def test_a_picture_whose_name_is_not_utf_8_is_not_shown_but_is_one_that_training_takes(places):
    name = os.fsdecode(b"\xff.png")
    try:
        (places.folder / "photos" / name).write_bytes((places.folder / "photos" / "a.png").read_bytes())
    except OSError:
        pytest.skip("this system has no such names")
    (places.folder / "photos" / os.fsdecode(b"\xff.txt")).write_text("caption")
    found = pictures_of(places, "photos", 32)
    assert [p.problems for p in found] == [()] * 4
    assert len(load_images(str(places.folder / "photos")).examples) == 4
    assert [p.name for p in found if any("is not UTF-8" in note for note in p.notes)] == [name]
    page = gallery(places, "photos", found, 0, name) + one_picture(places, "photos", found[-1])
    assert ("rename it" in page, page.count("studio/picture")) == (True, 3)
    page.encode()  # as it is sent


@pytest.mark.parametrize("name", ["plain.png", "a b&\"'.png", "zero\u200bwidth.png", "\udcff.png", "runs/%41"])
def test_a_chosen_name_comes_back_as_it_is(name):
    html = render(
        "runs",
        rows=[dict.fromkeys(("state", "model", "method", "steps", "gates")) | {"run": name}],
        figures=[],
        chosen=None,
        shown=str,
    )
    event = SimpleNamespace(_data={"value": unescape(re.search('data-pick="([^"]*)"', html)[1])})
    assert picked(event) == name


# --- captions -------------------------------------------------------------------------------------------------------


def test_an_edited_caption_is_the_one_that_is_trained_on_and_can_be_taken_back(places):
    folder = places.folder / "photos"
    edit_caption(places, folder, "a.png", "caption a", "a  red\nflower ")
    edit_caption(places, folder, "b.png", "caption b", "two")
    assert [e.caption for e in load_images(str(folder)).examples] == ["a red flower", "two", "caption c"]
    assert undo_caption(places) == (folder, "b.png", [])
    assert undo_caption(places) == (folder, "a.png", [])
    assert caption_of(folder, "a.png") == "caption a"
    with pytest.raises(UserError, match="no edit to take back"):
        undo_caption(places)


def test_a_first_caption_that_is_taken_back_leaves_none(places):
    folder = places.folder / "photos"
    (folder / "a.txt").unlink()
    edit_caption(places, folder, "a.png", None, "new")
    undo_caption(places)
    assert not (folder / "a.txt").exists()


@pytest.mark.parametrize("end", ["caption", "CAPTION", "TXT"])
def test_a_caption_of_another_ending_is_edited_where_it_lies(places, end):
    folder = places.folder / "photos"
    (folder / "a.txt").rename(folder / f"a.{end}")
    assert caption_of(folder, "a.png") == "caption a"
    edit_caption(places, folder, "a.png", "caption a", "a red flower")
    assert ((folder / f"a.{end}").read_text(), (folder / "a.txt").exists()) == ("a red flower", False)
    assert next(e.caption for e in load_images(str(folder)).examples) == "a red flower"
    undo_caption(places)
    assert caption_of(folder, "a.png") == "caption a"


def test_what_somebody_else_changed_is_not_written_over(places):
    folder = places.folder / "photos"
    edit_caption(places, folder, "a.png", "caption a", "mine")
    (folder / "a.txt").write_text("theirs")
    with pytest.raises(UserError, match="was changed since"):
        edit_caption(places, folder, "a.png", "mine", "mine again")
    with pytest.raises(UserError, match="was changed since"):
        undo_caption(places)
    assert caption_of(folder, "a.png") == "theirs"


def test_an_edit_that_cannot_be_taken_back_is_given_up_and_the_one_before_is_taken(places):
    folder = places.folder / "photos"
    edit_caption(places, folder, "a.png", "caption a", "mine")
    edit_caption(places, folder, "b.png", "caption b", "mine")
    (folder / "b.txt").write_text("theirs")
    with (places.state / "captions.jsonl").open("a") as journal:
        journal.write('{"folder": "/half wri\n')
    where, name, given_up = undo_caption(places)
    assert (where, name, caption_of(folder, "a.png")) == (folder, "a.png", "caption a")
    assert ["cannot be read" in given_up[0], "b.png was changed since" in given_up[1]] == [True, True]
    assert (folder / "b.txt").read_text() == "theirs"
    with pytest.raises(UserError, match="there is no edit to take back"):
        undo_caption(places)


def test_a_disk_that_is_not_there_for_a_while_costs_no_edit(places):
    folder = places.folder / "photos"
    edit_caption(places, folder, "a.png", "caption a", "mine")
    folder.rename(places.folder / "away")
    with pytest.raises(UserError, match=r"there is no picture a\.png"):
        undo_caption(places)
    (places.folder / "away").rename(folder)
    assert undo_caption(places) == (folder, "a.png", [])
    assert caption_of(folder, "a.png") == "caption a"


def test_an_edit_whose_row_is_gone_is_given_up_and_the_one_before_is_taken(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("a", "b"):
        picture(1).save(folder / f"{name}.png")
    rows = [f'{{"file_name": "{name}.png", "text": "caption {name}"}}\n' for name in ("a", "b")]
    (folder / "metadata.jsonl").write_text("".join(rows))
    places = Places.of(tmp_path)
    for name in ("a", "b"):
        edit_caption(places, folder, f"{name}.png", f"caption {name}", "mine")
    kept = [line for line in (folder / "metadata.jsonl").read_text().splitlines() if "b.png" not in line]
    (folder / "metadata.jsonl").write_text("\n".join(kept))
    where, name, given_up = undo_caption(places)
    assert (where, name, caption_of(folder, "a.png")) == (folder, "a.png", "caption a")
    assert ["has no row for b.png" in why for why in given_up] == [True]
    assert not has_edits(places)


def test_a_caption_that_differs_in_white_space_alone_is_left_as_it_is(places):
    folder = places.folder / "photos"
    (folder / "a.txt").write_text("one\n\n  two\n")
    (folder / "b.txt").unlink()
    edit_caption(places, folder, "a.png", "one\n\n  two", "one\n\n  two ")
    edit_caption(places, folder, "b.png", None, " ")
    assert ((folder / "a.txt").read_text(), (folder / "b.txt").exists()) == ("one\n\n  two\n", False)
    assert not has_edits(places)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_captions_in_the_metadata_of_a_split_are_edited_there(tmp_path, kind):
    rows = {"csv": "file_name,text\na.png,one\n", "jsonl": '{"file_name": "a.png", "text": "one"}\n'}[kind]
    folder = tmp_path / "set"
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        picture(1).save(folder / split / "a.png")
        (folder / split / f"metadata.{kind}").write_text(rows)
    places = Places.of(tmp_path)
    (found,) = pictures_of(places, "set", 64)
    assert (found.name, found.caption) == ("train/a.png", "one")
    edit_caption(places, folder, found.name, found.caption, "two")
    assert [e.caption for e in load_images(str(folder)).examples] == ["two"]
    assert (folder / "test" / f"metadata.{kind}").read_text() == rows
    undo_caption(places)
    assert (folder / "train" / f"metadata.{kind}").read_text() == rows


def test_a_table_as_spreadsheets_write_it_keeps_its_mark_and_loses_only_empty_cells(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    names = [unicodedata.normalize("NFD", "ü.png"), "b.png"]
    for name in names:
        picture(1).save(folder / name)
    table = folder / "metadata.csv"
    table.write_bytes("\ufefffile_name,text\nü.png,one,,\nb.png,two,,\n".encode())
    places = Places.of(tmp_path)
    assert [caption_of(folder, name) for name in names] == ["one", "two"]
    edit_caption(places, folder, names[0], "one", "three")
    assert table.read_bytes().decode() == "\ufefffile_name,text\nü.png,three\nb.png,two\n"
    table.write_text("file_name,text\nb.png,two, and more\n")
    with pytest.raises(UserError, match="3 values for 2 columns"):
        caption_of(folder, "b.png")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_keeps_all_else(tmp_path, kind):
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("a", "b"):
        picture(1).save(folder / f"{name}.png")
    text = {
        "csv": 'file_name,text,source\na.png,"one, and",x\nb.png,two,y\n',
        "jsonl": '{"file_name": "a.png", "text": "one, and", "source": "x"}\n{"file_name":"b.png","text":"two"}\n',
    }[kind]
    table = folder / f"metadata.{kind}"
    table.write_text(text)
    places = Places.of(tmp_path)
    edit_caption(places, folder, "b.png", "two", 'three "quoted", ü')
    assert caption_of(folder, "b.png") == 'three "quoted", ü'
    assert (caption_of(folder, "a.png"), "x" in table.read_text(encoding="utf-8")) == ("one, and", True)
    undo_caption(places)
    assert caption_of(folder, "b.png") == "two"
    if kind == "csv":
        assert table.read_text() == text


def test_captions_are_written_in_the_folders_of_the_page_only(places, tmp_path_factory):
    elsewhere = write_pictures(tmp_path_factory.mktemp("elsewhere") / "squares")
    name = sorted(p.name for p in elsewhere.glob("*.png"))[0]
    for folder in (elsewhere, places.readable("embedded/icons")):
        first = name if folder == elsewhere else sorted(p.name for p in folder.glob("*.png"))[0]
        with pytest.raises(UserError, match=r"leads out of the folders|comes with the package"):
            edit_caption(places, folder, first, caption_of(folder, first), "mine")
    with pytest.raises(UserError):
        edit_caption(places, places.folder / "photos", "../../x.png", None, "mine")


# --- pictures that are added ----------------------------------------------------------------------------------------


def test_added_pictures_get_free_and_harmless_names(places, tmp_path):
    (tmp_path / "up").mkdir()
    picture(5).save(tmp_path / "up" / "a.png")
    picture(6).save(tmp_path / "up" / "Мой <b> кот.JPG", "JPEG")
    sent = [str(p) for p in sorted((tmp_path / "up").iterdir())]
    assert add_pictures(places, "photos", sent) == ["a-2.png", "мой-b-кот.jpg"]
    assert len(pictures_of(places, "photos", 32)) == 5


def test_an_upload_of_a_hundred_megapixels_is_refused_with_all_that_came_with_it(places, tmp_path):
    (tmp_path / "up").mkdir()
    picture(5).save(tmp_path / "up" / "a.png")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "up" / "large.png")
    before = sorted((places.folder / "photos").iterdir())
    with pytest.raises(UserError, match=r"large.png has 100000000 pixels.*nothing was added"):
        add_pictures(places, "photos", [str(tmp_path / "up" / n) for n in ("a.png", "large.png")])
    with pytest.raises(UserError, match="leads out of the folders"):
        add_pictures(places, "../out", [str(tmp_path / "up" / "a.png")])
    assert sorted((places.folder / "photos").iterdir()) == before


def test_a_number_in_the_metadata_is_no_caption_and_one_can_be_written(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    picture(1).save(folder / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": 5}\n')
    places = Places.of(tmp_path)
    (found,) = pictures_of(places, "set", 64)
    edit_caption(places, folder, "a.png", found.caption, "five")
    assert caption_of(folder, "a.png") == "five"
