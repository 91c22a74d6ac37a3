"""What a page may read and write: paths that lead elsewhere, links, hidden files, and pictures that are none."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from difftuning_control.errors import UserError
from difftuning_control.verbs.ui.files import report_page, small_picture
from difftuning_control.verbs.ui.places import STATE, Places
from difftuning_control.verbs.ui.render import render


@pytest.fixture
def places(tmp_path: Path) -> Places:
    for name in ("mine", "photos", "other"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (400, 200), "red").save(tmp_path / name / "a.png")
    (tmp_path / "mine" / STATE).mkdir()
    return Places.of(tmp_path / "mine", [tmp_path / "photos"])


def test_what_lies_in_the_folders_is_found(places, tmp_path):
    assert places.writable("a.png") == tmp_path / "mine" / "a.png"
    assert places.writable(str(tmp_path / "photos" / "a.png")) == tmp_path / "photos" / "a.png"
    assert places.writable("runs/new") == tmp_path / "mine" / "runs" / "new"
    assert (places.readable("embedded/icons") / "metadata.csv").parent.is_dir()


@pytest.mark.parametrize("path", ["../other/a.png", "/etc/passwd", "a\0.png", "x/../../other", "~", STATE, ".hidden/a"])
def test_paths_that_lead_elsewhere_are_refused(places, path):
    for find in (places.readable, places.writable):
        with pytest.raises(UserError):
            find(path)


def test_the_sets_of_the_package_are_not_written(places):
    with pytest.raises(UserError, match="comes with the package"):
        places.writable(places.readable("embedded/icons"))


def test_links_that_lead_out_are_refused_and_those_within_are_not(places, tmp_path):
    try:
        os.symlink(tmp_path / "other", tmp_path / "mine" / "link")
        os.symlink(tmp_path / "other" / "a.png", tmp_path / "mine" / "b.png")
        os.symlink(tmp_path / "photos" / "a.png", tmp_path / "mine" / "c.png")
    except OSError:
        pytest.skip("this system makes no links here")
    for path in ("link/a.png", "b.png"):
        with pytest.raises(UserError, match="leads out of the folders"):
            small_picture(places, path, 96)
    assert small_picture(places, "c.png", 96)


def test_a_picture_goes_out_as_its_pixels_alone(places, tmp_path):
    content = (tmp_path / "mine" / "a.png").read_bytes() + b"<script>alert(1)</script>"
    (tmp_path / "mine" / "a.png").write_bytes(content)
    sent = small_picture(places, "a.png", 96)
    assert Image.open(io.BytesIO(sent)).size == (96, 48)
    assert b"script" not in sent


def test_what_is_no_picture_and_no_report_is_not_sent(places, tmp_path):
    (tmp_path / "mine" / "evil.svg").write_text("<svg><script>alert(1)</script></svg>")
    (tmp_path / "mine" / "page.png").write_text("<script>alert(1)</script>")
    (tmp_path / "mine" / "run.json").write_text("{}")
    for path in ("evil.svg", "page.png", "run.json", "none.png"):
        with pytest.raises(UserError):
            small_picture(places, path, 96)
    with pytest.raises(UserError, match="is no report"):
        report_page(places, "run.json")
    with pytest.raises(UserError, match="expected one of"):
        small_picture(places, "a.png", 5000)


def test_a_picture_of_a_hundred_megapixels_is_refused_before_it_is_decoded(places, tmp_path):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "mine" / "large.png")
    with pytest.raises(UserError, match="has 100000000 pixels, expected at most"):
        small_picture(places, "large.png", 96)


def test_what_comes_from_outside_never_becomes_markup():
    evil = "<script>alert(1)</script>\x1b[2J"
    page = render("text", title=evil, good=True, text=f"{evil}\n{evil}")
    assert "<script" not in page
    assert "\x1b" not in page
    assert page.count("&lt;script&gt;") == 3


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(UserError, match="gone is no folder"):
        Places.of(tmp_path / "gone")
