"""What a training would refuse of pictures and words, named before it is queued; and what it takes, which is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from difftuning_control.data.prepare import read_data
from difftuning_control.errors import UserError
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import PilotConfig
from difftuning_control.verbs.pilot.pilot import pilot
from difftuning_control.verbs.train import train
from difftuning_control.verbs.ui.form import NO_PRESET, recipe_of_words, train_words
from difftuning_control.verbs.ui.places import Places
from difftuning_control.verbs.ui.price_view import refuse_unready


@pytest.fixture
def places(tmp_path: Path) -> Places:
    for i in range(8):
        add(tmp_path / "photos" / f"{i}.png", f"caption {i}")
    return Places.of(tmp_path)


def add(path: Path, caption: str | None = None, size: tuple[int, int] = (16, 16), colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def recipe(places: Places, **others: str) -> Recipe:
    named = {key.replace("__", "."): value for key, value in others.items()}
    return recipe_of_words(train_words(places, NO_PRESET, {"pictures": "photos"}, named)[0])


def test_masks_within_the_folder_are_no_pictures_and_one_that_lacks_is_named(places):
    for i in range(8):
        add(places.folder / "photos" / "masks" / f"{i}.png", colour="white")
    masked = recipe(places, data__masks="photos/masks")
    read_data(masked)
    refuse_unready(masked)
    (places.folder / "photos" / "masks" / "3.png").unlink()
    with pytest.raises(UserError, match=r"1 of the 8 pictures .*3.png \(no mask in"):
        refuse_unready(masked)


def test_the_recipes_own_limit_of_pixels_is_used(places):
    add(places.folder / "photos" / "large.png", "large", (64, 64))
    refuse_unready(recipe(places, data__max_pixels="5000"))
    with pytest.raises(UserError, match=r"1 of the 9 pictures .*large.png \(4096 pixels"):
        refuse_unready(recipe(places, data__max_pixels="1000"))


def test_the_recipes_own_split_and_column_are_used(places):
    folder = places.folder / "photos"
    for split in ("train", "test"):
        for path in sorted(folder.glob("[0-7].png")):
            add(folder / split / path.name)
        rows = [{"file_name": f"{i}.png", "said": f"caption {i}" if split == "test" or i else None} for i in range(8)]
        (folder / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refuse_unready(recipe(places, data__split="test", data__caption_column="said"))
    with pytest.raises(UserError, match=r"1 of the 8 pictures .*train/0.png \(no caption"):
        refuse_unready(recipe(places, data__caption_column="said"))


def test_a_caption_for_all_is_one(places):
    (places.folder / "photos" / "3.txt").unlink()
    with pytest.raises(UserError, match=r"1 of the 8 pictures have no caption or cannot be used: 3.png \(no caption"):
        refuse_unready(recipe(places))
    refuse_unready(recipe(places, data__default_caption="a square"))
    (places.folder / "photos" / "4.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"4.png \(is not a picture that can be read"):
        refuse_unready(recipe(places, data__default_caption="a square"))


def test_a_data_set_that_is_no_folder_of_pictures_is_left_to_the_training(places):
    (places.folder / "photos" / "dataset_info.json").write_text("{}")
    (places.folder / "photos" / "3.txt").unlink()
    refuse_unready(recipe(places))


@pytest.mark.parametrize("key", ["data.trigger", "data.default_caption"])
def test_words_that_the_runs_files_would_hide_are_refused_before_anything_is_written(places, key):
    named = {key: "sk-watercolour-2024"}
    words, output = train_words(places, NO_PRESET, {"pictures": "photos"}, named)
    for refuse in (refuse_unready, train, lambda recipe: pilot(recipe, PilotConfig(), "en", False)):
        with pytest.raises(UserError, match=rf"{key} looks like a secret.*choose other words"):
            refuse(recipe_of_words(words))
    assert not output.exists()
    refuse_unready(recipe_of_words([word.replace("sk-watercolour-2024", "(secret)") for word in words]))
