"""Folders that were made for other trainers: kohya's numbers, OneTrainer's masks, ai-toolkit's placeholder, captions
in files that are not read."""

import json
import tarfile
from pathlib import Path

import pytest

from difftuning_control.data.sources import load_images
from difftuning_control.data.stream import Stream
from difftuning_control.errors import UserError
from difftuning_control.recipe.captioning import Captioning
from difftuning_control.recipe.inputs import DataConfig
from support.pictures import write_pictures


def pictures(folder: Path, count: int = 1) -> Path:
    """Pictures without captions, whose captions are to be given."""
    write_pictures(folder, count, seed=len(folder.name))
    (folder / "metadata.jsonl").unlink()
    return folder


def captions(folder: Path, **options: object) -> dict[str, str]:
    return {e.name: e.caption for e in load_images(str(folder), **options).examples}


# --- kohya's numbers and class folders ------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("10_zbx dog", "2_cat", "5_zbx dog"), ("10_dog", "cat")])
def test_numbers_of_class_folders_are_part_of_their_names_and_said_where_all_have_one(tmp_path: Path, names):
    for name in names:
        pictures(tmp_path / name)
    data = load_images(str(tmp_path), classes="folders")
    assert [e.caption for e in data.examples] == list(names)
    said = "the numbers of 10_zbx dog, 2_cat, 5_zbx dog are part of the classes' names; where they are repeats to "
    assert data.notes == ([f"{said}another trainer, rename the folders"] if "cat" not in names else [])


# --- OneTrainer's masks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [None, "folders"])
def test_masks_and_conditions_beside_their_pictures_are_no_pictures(tmp_path: Path, classes):
    folder = pictures(tmp_path / "cat", 6)
    for number, name in enumerate(("0-masklabel", "0-condlabel", "x-masklabel", "-masklabel"), 1):
        (folder / f"{number}.png").rename(folder / f"{name}.png")
    data = load_images(str(tmp_path), default_caption="red", classes=classes)
    assert sorted(e.name for e in data.examples) == [f"cat/{n}.png" for n in ("-masklabel", "0", "5", "x-masklabel")]
    assert data.notes == [
        f"left out of {tmp_path}: cat/0-condlabel.png, cat/0-masklabel.png; masks and conditions are not read beside "
        "their pictures, but from a folder of their own (--masks, --control.path)"
    ]
    assert data.ignored_files == 2


def test_metadata_may_name_such_a_picture(tmp_path: Path):
    pictures(tmp_path, 2)
    (tmp_path / "1.png").rename(tmp_path / "0-masklabel.png")
    rows = [json.dumps({"file_name": name, "text": "red"}) for name in ("0.png", "0-masklabel.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    assert list(captions(tmp_path)) == ["0.png", "0-masklabel.png"]


# --- ai-toolkit's placeholder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "caption", "without"),
    [
        ("a photo of [trigger] on a beach", "a photo of zbx dog on a beach", "a photo of on a beach"),
        ("[trigger]", "zbx dog", ""),
        ("[Trigger], [trigger]\\1", "zbx dog, zbx dog\\1", ", \\1"),
        ("[trigger]s on grass", "zbx dog zbx dogs on grass", "zbx dogs on grass"),
        ("a dog", "zbx dog a dog", "a dog"),
    ],
)
def test_a_trigger_stands_where_captions_keep_a_place_for_it(text, caption, without):
    captioning = Captioning(trigger="zbx dog")
    assert captioning.of(text) == caption
    assert captioning.of(caption) == caption
    assert captioning.untriggered(caption) == without.lstrip(", ")
    assert Captioning(default=text, trigger="zbx dog").of(None) == caption


def test_the_place_is_dropped_from_what_has_no_trigger_and_kept_where_none_is_given():
    assert Captioning(trigger="zbx").untriggered("a photo of [trigger] on grass") == "a photo of on grass"
    assert Captioning().untriggered("a  [trigger]") == "a  [trigger]"  # a bank of an earlier run has it
    assert Captioning(trigger="[trigger]").of("a [trigger]") == "a [trigger]"


def test_captions_that_keep_a_place_for_a_trigger_are_said_where_none_is_given(tmp_path: Path):
    pictures(tmp_path, 3)
    for i, text in enumerate(("a [trigger]", "a dog", "[trigger] on grass")):
        (tmp_path / f"{i}.txt").write_text(text)
    assert load_images(str(tmp_path)).notes == [
        f"captions hold [trigger] (2 of 3 pictures of {tmp_path}); give --trigger, which is put there"
    ]
    assert load_images(str(tmp_path), trigger="zbx").notes == []
    assert load_images(str(tmp_path), need_captions=False).notes == []
    (tmp_path / "tar").mkdir()
    with tarfile.open(tmp_path / "tar" / "0.tar", "w") as tar:
        for i in range(3):
            tar.add(tmp_path / f"{i}.png", f"{i}.png")
            tar.add(tmp_path / f"{i}.txt", f"{i}.txt")
    for trigger in (None, "zbx"):
        stream = Stream(DataConfig(str(tmp_path / "tar"), stream=True, trigger=trigger), 0, 0)
        found = {e.caption for step in range(20) for e in stream.pictures(step, range(1), 1, map)}
        assert ("a zbx" in found, bool(stream.notes())) == (trigger is not None, trigger is None)


# --- files with captions that are not read --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["0.json", "0.png.txt", "0.png.caption", "0.png.json"])
def test_files_that_seem_to_hold_captions_are_named(tmp_path: Path, name):
    folder = pictures(tmp_path / "set", 2)
    (folder / "1.txt").write_text("red")
    (folder / "1.json").write_text("{}")
    (folder / name).write_text("blue")
    data = load_images(str(tmp_path), trigger="zbx")
    assert data.notes[0] == (
        f"captions in set/{name} are not read; write each into a .txt beside its picture, such as set/0.txt"
    )
    assert len(data.notes) == 2
    assert load_images(str(tmp_path), need_captions=False).notes == []
    with pytest.raises(UserError) as stopped:
        load_images(str(tmp_path))
    assert f"set/0.png in {tmp_path} has no caption ({name} is not read, but a .txt of its name); write one" in str(
        stopped.value
    )


@pytest.mark.parametrize("blank", [b" \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n\t"])
def test_a_blank_file_hides_no_caption(tmp_path: Path, blank):
    pictures(tmp_path)
    (tmp_path / "0.txt").write_bytes(blank)
    (tmp_path / "0.caption").write_text("red")
    assert captions(tmp_path) == {"0.png": "red"}
    (tmp_path / "0.txt").write_bytes("blue".encode("utf-16"))
    with pytest.raises(UserError, match=r"has a caption, 0\.txt, that is not UTF-8 text"):
        load_images(str(tmp_path))


# --- names that no file can have ------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["\\ud83d.png", "a/\\ud83d/0.png"])
def test_half_a_character_in_a_name_is_a_file_that_does_not_exist(tmp_path: Path, half):
    pictures(tmp_path, 2)
    (tmp_path / "metadata.jsonl").write_text(
        f'{{"file_name": "{half}", "text": "a", "condition": "0.png"}}\n'
        f'{{"file_name": "0.png", "text": "b", "condition": "1.png"}}\n'
        f'{{"file_name": "1.png", "text": "c", "condition": "{half}"}}\n'
    )
    with pytest.raises(UserError, match=r"^.*\\ud83d.* in .* is named by metadata\.jsonl but does not exist"):
        load_images(str(tmp_path))
    data = load_images(str(tmp_path), skip_bad=True)
    assert [e.caption for e in data.examples] == ["b", "c"]
    data = load_images(str(tmp_path), skip_bad=True, condition_column="condition")
    assert [e.caption for e in data.examples] == ["b"]
    assert data.skipped["1.png"] == "has a condition that is named by metadata.jsonl but does not exist"


def test_bytes_that_are_no_utf_8_are_a_name(tmp_path: Path):
    pictures(tmp_path)
    try:
        (tmp_path / "0.png").rename(tmp_path / "caf\udce9.png")
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system has no such names")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "caf\\udce9.png", "text": "a"}\n')
    assert list(captions(tmp_path).values()) == ["a"]


def test_half_a_character_in_a_stream_is_one_sentence(tmp_path: Path):
    pictures(tmp_path, 2)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "\\ud83d.png", "text": "a"}\n')
    with pytest.raises(UserError, match=r"cannot be streamed \(\w+\); give a folder of"):
        Stream(DataConfig(str(tmp_path), stream=True), 0, 0).pictures(0, range(1), 1, map)
