"""The styles of examples/emoji: names matched, pictures dealt out, licences held."""

import json
from pathlib import Path

import numpy as np
import pytest

from support.scripts import emoji_script


@pytest.fixture
def styles(monkeypatch):
    return emoji_script(monkeypatch, "styles")


def drawn(icons: dict, key: str) -> np.ndarray | None:
    return None if key == "empty" else np.full((64, 64, 3), icons["icons"][key], np.uint8)


def test_a_name_is_looked_for_in_a_sets_own_words(styles):
    assert styles.keys_of("dog face", styles.Style("x", "MIT")) == ["dog-face", "dog"]
    assert styles.keys_of("red apple", styles.Style("x", "MIT", ("", "-01")))[:4] == [
        "red-apple",
        "red-apple-01",
        "apple",
        "apple-01",
    ]


def test_no_drawing_is_two_names_and_an_empty_one_is_none(styles):
    icons = {"icons": {"dog": 3, "empty": 0, "cat-face": 5}}
    names = {"dog face": "a", "dog": "a", "cat face": "a", "empty": "b"}
    found = styles.pictures_of(icons, styles.Style("x", "MIT"), names, drawn)
    assert {name: picture[0, 0, 0] for name, picture in found.items()} == {"dog face": 3, "cat face": 5}


def test_every_category_has_its_turn_and_the_rest_is_held_out(styles, tmp_path):
    names = {f"{category}{i}": category for category, count in (("a", 60), ("b", 9), ("c", 20)) for i in range(count)}
    tune = styles.chosen_to_tune({name: np.zeros(1) for name in names}, names)
    assert len(set(tune)) == len(tune) == styles.TUNE_SIZE
    assert [names[name] for name in tune[:9]] == ["a", "b", "c"] * 3
    assert styles.chosen_to_tune({name: np.zeros(1) for name in reversed(names)}, names) == tune
    pictures = {name: np.zeros((64, 64, 3), np.uint8) for name in tune}
    styles.write(tmp_path, tune, pictures, names)
    rows = styles.read_rows(tmp_path)
    assert [row["text"] for row in rows] == tune
    assert all((tmp_path / row["file_name"]).is_file() for row in rows)


def test_a_licence_that_changed_stops_before_anything_is_written(styles, tmp_path, monkeypatch):
    folder = tmp_path / "npm" / "mdi"
    folder.mkdir(parents=True)
    (folder / "info.json").write_text(json.dumps({"license": {"spdx": "CC-BY-NC-4.0"}}))
    with pytest.raises(SystemExit, match=r"mdi is under CC-BY-NC-4.0; expected Apache-2.0\."):
        styles.check_licence(styles.STYLES["glyph"], tmp_path / "npm")


def test_a_style_with_a_word_has_the_same_pictures_in_the_same_order(styles, tmp_path):
    for part, bare, worded in zip(
        ("tune", "eval"), styles.data_of("icons", tmp_path), styles.data_of("icons-word", tmp_path)
    ):
        assert bare == f"embedded/icons{'' if part == 'tune' else '-eval'}"
        source, rows = styles.ASSETS / "icons" / part, styles.read_rows(Path(worded))
        assert [(r["file_name"], r["text"]) for r in rows] == [
            (r["file_name"], f"zbx emoji {r['text']}") for r in styles.read_rows(source)
        ]
        name = rows[0]["file_name"]
        assert (Path(worded) / name).read_bytes() == (source / name).read_bytes()
    assert styles.data_of("icons-word", tmp_path)[1] == worded
