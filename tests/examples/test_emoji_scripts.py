"""What of examples/emoji decides what the embedded model learns: variants and their captions, and its text side."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from difftuning_control.system.installed import at_least

HERE = Path(__file__).resolve().parents[2] / "examples" / "emoji"
sys.path.insert(0, str(HERE))
import variants  # noqa: E402


@pytest.fixture
def red_disc() -> np.ndarray:
    """A premultiplied picture: a red disc, 128 × 128."""
    y, x = np.mgrid[:128, :128] - 63.5
    alpha = np.where(x**2 + y**2 < 40**2, 255, 0).astype(np.uint8)
    return np.stack([alpha // 255 * 220, alpha // 255 * 40, alpha // 255 * 30, alpha], -1).astype(np.uint8)


RECORD = {"style": "noto", "name": "red ball"}


def test_the_first_variant_is_the_picture_and_the_same_call_gives_the_same_ones(red_disc):
    first, again = (variants.variants_of(red_disc, RECORD, 13, set()) for _ in range(2))
    assert first[0].parts == ["noto", "", "red ball"]
    assert np.array_equal(first[0].pixels, variants.on_ground(red_disc, (1.0, 1.0, 1.0)))
    for a, b in zip(first, again):
        assert np.array_equal(a.pixels, b.pixels)
        assert a.parts == b.parts


@pytest.mark.parametrize(("colour", "channel"), [("red", 0), ("green", 1), ("blue", 2)])
def test_recoloured_pictures_have_the_colour_that_their_caption_says(red_disc, colour, channel):
    changed = variants.recolour(red_disc, colour)
    assert changed[64, 64, :3].argmax() == channel
    assert np.array_equal(changed[..., 3], red_disc[..., 3])
    assert variants.recoloured_name("red ball", colour) == f"{colour} ball"
    assert variants.recoloured_name("guitar", colour) == f"{colour} guitar"


def test_a_grey_picture_is_not_recoloured(red_disc):
    grey = red_disc.copy()
    grey[..., :3] = grey[..., 3:] // 2
    assert variants.recolour(grey, "blue") is None


def test_names_that_are_taken_or_held_out_are_never_made(red_disc):
    record = {"style": "noto", "name": "banana"}
    taken = {f"{colour} banana" for colour in variants.COLOURS} - {"green banana", "blue banana"}
    assert "blue banana" in variants.HELD_PAIRS
    bodies = [v.body for seed in range(20) for v in variants.variants_of(red_disc, record, 13, taken, seed)]
    names = {body.split(" on a")[0].removeprefix("small ").removeprefix("tilted ") for body in bodies}
    names = {name.removeprefix("mirrored ") for name in names}
    assert names == {"banana", "green banana"}


def test_the_ground_is_the_colour_of_the_caption(red_disc):
    for v in variants.variants_of(red_disc, RECORD, 60, set()):
        if not v.manner and v.body.endswith("on a blue background"):
            assert v.pixels[1, 1].argmax() == 2
        elif not v.manner and "background" not in v.body:
            assert (v.pixels[1, 1] > 250).all()


def test_moving_keeps_the_edge_free_of_dark_fringes(red_disc):
    white = red_disc.copy()
    white[..., :3] = white[..., 3:]
    moved = variants.move(white, scale=0.9, turn=5, right=3)
    assert variants.on_ground(moved, (1.0, 1.0, 1.0)).min() > 245


def test_captions_leave_out_what_they_are_told_to():
    assert variants.caption(["noto", "dark", "small guitar"]) == "dark noto emoji small guitar"
    assert variants.caption(["noto", "dark", "small guitar"], with_style=False) == "dark small guitar"
    assert variants.caption(["noto", "", "guitar"]) == "noto emoji guitar"


@pytest.mark.skipif(not at_least("transformers", "5"), reason="builds its tokenizer as transformers 5 does")
def test_the_tokenizer_saves_the_forms_of_old_and_new_transformers(tmp_path):
    from text_model import TEXT_LENGTH, build_text_model, kept_tokenizer
    from transformers import CLIPTokenizer

    from difftuning_control.families.older_form import write_older_form

    names, folder = ["red apple", "teacup without handle", "guitar"], tmp_path / "tokenizer"
    tokenizer = kept_tokenizer(folder, names)
    assert kept_tokenizer(folder, ["other words"]).get_vocab() == tokenizer.get_vocab()
    write_older_form(tmp_path)
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= {p.name for p in folder.iterdir()}
    text = "noto emoji red apple on a blue background"
    ids = tokenizer(text, padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (1, TEXT_LENGTH)
    (folder / "tokenizer.json").unlink()
    assert CLIPTokenizer.from_pretrained(folder)(text).input_ids == tokenizer(text).input_ids
    with torch.no_grad():
        assert build_text_model(tokenizer)(ids)[0].isfinite().all()
