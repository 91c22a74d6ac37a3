"""Captions of grids in every script: a font that has it, or the number of the column; never empty boxes."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import font_manager
from PIL import Image, ImageFont

from difftuning_control.evaluation import drawing
from difftuning_control.evaluation.drawing import can_draw, font_for, save_grid

JAPANESE = "赤いりんご"


def test_fault_15_18_a_font_has_the_characters_that_it_draws():
    assert can_draw(ImageFont.load_default(14), "red apple")
    assert not can_draw(ImageFont.load_default(14), JAPANESE)
    assert can_draw(font_for("Красное яблоко, café", 14), "Красное яблоко, café")  # matplotlib brings DejaVu


def test_fault_15_18_a_font_of_the_machine_is_found_by_its_characters(monkeypatch):
    known = [f for f in font_manager.fontManager.ttflist if f.name in ("STIXNonUnicode", "DejaVu Sans", "cmr10")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", known)
    assert font_for("Привет", 14).getname()[0] == "DejaVu Sans"


def test_fault_15_18_a_caption_that_no_font_can_draw_is_a_number(tmp_path, monkeypatch):
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    drawn = []
    monkeypatch.setattr(drawing, "_two_lines", lambda text, font, width: drawn.append(text) or [text])
    pictures = [Image.new("RGB", (96, 96), "red")] * 2
    save_grid(tmp_path / "grid.png", {"base": pictures}, [JAPANESE, "a dog"])
    assert drawn == ["#1", "a dog"]


@pytest.mark.parametrize("caption", ["a dog", JAPANESE])
def test_fault_15_18_a_grid_shows_a_caption_over_each_column(tmp_path, caption):
    save_grid(tmp_path / "grid.png", {"base": [Image.new("RGB", (96, 96), "red")] * 2}, [caption, caption])
    sheet = np.array(Image.open(tmp_path / "grid.png"))
    assert (sheet[:24] < 128).any()  # ink above the pictures
