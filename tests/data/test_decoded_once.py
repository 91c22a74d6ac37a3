"""A checked picture is decoded once for its first use, and what is kept of decoded pictures is bounded."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from difftuning_control.data import checker
from difftuning_control.data.sources import load_images

SIDE, COUNT = 12, 4
BYTES = SIDE * SIDE * 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "pictures"
    place.mkdir()
    for number in range(COUNT):
        values = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(values).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(f"picture {number}")
    return place


def stored(folder: Path, number: int) -> np.ndarray:
    return np.asarray(Image.open(folder / f"{number}.png"))


def test_the_first_use_takes_the_picture_that_was_checked_and_later_ones_read_its_file(folder):
    data = load_images(str(folder))
    expected = [stored(folder, number) for number in range(COUNT)]
    for number in range(COUNT):
        (folder / f"{number}.png").rename(folder / f"{number}.gone")
    for example, values in zip(data.examples, expected):
        assert np.array_equal(np.asarray(example.load()), values)
        with pytest.raises(OSError):  # noqa: PT011 whatever the system says of a file that is not there
            example.load()
    for number in range(COUNT):
        (folder / f"{number}.gone").rename(folder / f"{number}.png")
    for example, values in zip(data.examples, expected):
        assert np.array_equal(np.asarray(example.load()), values)


@pytest.mark.parametrize("room", [0, BYTES - 1, BYTES, 2 * BYTES + 1, COUNT * BYTES])
def test_no_more_is_kept_than_there_is_room_for(folder, monkeypatch, room):
    monkeypatch.setattr(checker, "KEPT", room)
    data = load_images(str(folder))
    for number in range(COUNT):
        (folder / f"{number}.png").unlink()
    kept = 0
    for example in data.examples:
        try:
            kept += np.asarray(example.load()).nbytes
        except OSError:
            continue
    assert kept == min(room // BYTES, COUNT) * BYTES


def test_a_condition_is_kept_as_its_picture_is(folder):
    data = load_images(str(folder), condition_path=str(folder))
    for number in range(COUNT):
        (folder / f"{number}.png").unlink()
    for example in data.examples:
        assert example.load_condition is not None
        assert np.array_equal(np.asarray(example.load()), np.asarray(example.load_condition()))
