"""Captions and metadata that were read wrongly without a word, or refused with the wrong reason."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from difftuning_control.data.collection import Collection
from difftuning_control.data.prepare import check_captions
from difftuning_control.data.sources import load_images
from difftuning_control.data.stream import Stream
from difftuning_control.errors import UserError
from difftuning_control.recipe.inputs import DataConfig
from difftuning_control.recipe.masking import Masking
from difftuning_control.recipe.recipe import Recipe
from support.pictures import write_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures without captions."""
    write_pictures(tmp_path, 3)
    (tmp_path / "metadata.jsonl").unlink()
    return tmp_path


def captions(folder: Path, **options: object) -> list[str]:
    return [e.caption for e in load_images(str(folder), **options).examples]


# --- metadata -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("0.png,a red, round ball\n1.png,b\n", "line 2 has 3 values for 2 columns; put those with a comma in quotes"),
        ('0.png,"a red ball\n1.png,b\n', "unexpected end of data"),
        ('0.png,"a" red ball\n1.png,b\n', "',' expected after '\"'"),
    ],
    ids=["a comma", "a quote that is not closed", "words behind a quote"],
)
def test_a_table_whose_quotes_or_commas_do_not_fit_is_refused_and_no_caption_cut(folder, rows, said):
    (folder / "metadata.csv").write_text("file_name,text\n" + rows)
    with pytest.raises(UserError) as stopped:
        load_images(str(folder))
    assert f"metadata.csv cannot be read: {said}; expected one JSON object a line, or CSV." in str(stopped.value)


def test_a_table_may_have_quotes_commas_and_lines_in_its_captions(folder):
    (folder / "metadata.csv").write_text(
        'file_name,text\r\n0.png,"a red, ""round""\nball"\r\n1.png,a 5" nail,,\r\n\r\n'
    )
    assert captions(folder) == ['a red, "round"\nball', 'a 5" nail']


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '{"file_name": "0.png", "text": "a"}\n\n{"file_name": "1.png" "text": "b"}\n',
            "cannot be read: line 3: Expect",
        ),
        ('// mine\n{"file_name": "0.png", "text": "a"}\n', "cannot be read: line 1: Expecting value: column 1"),
        ('[{"file_name": "0.png", "text": "a"}]', "row 1 is a list; expected one JSON object a line"),
        ('{"file_name": "0.png", "text": "a"}\n5\n', "row 2 is a int; expected one JSON object a line"),
    ],
)
def test_the_line_that_is_no_json_object_is_named(folder, text, said):
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError) as stopped:
        load_images(str(folder))
    assert said in str(stopped.value)


def test_pictures_that_metadata_do_not_name_are_said(folder):
    row = json.dumps({"file_name": "./1.png", "text": "red"})
    (folder / "metadata.jsonl").write_text(row)
    (folder / "notes.md").write_text("mine")
    expected = f"left out of {folder}: 2 pictures that no file_name of metadata.jsonl names: 0.png, 2.png"
    assert load_images(str(folder)).notes == [expected]
    (folder / "2.png").write_bytes(b"")
    (folder / "metadata.jsonl").write_text(row + '\n{"file_name": "2.png", "text": "red"}')
    left = load_images(str(folder), skip_bad=True)
    assert left.notes[0].endswith(
        "left out of " + f"{folder}: 1 pictures that no file_name of metadata.jsonl names: 0.png"
    )
    assert list(left.skipped) == ["2.png"]


def test_metadata_may_name_pictures_in_full_where_the_folder_is_not_and_by_a_way_round(tmp_path, monkeypatch):
    write_pictures(tmp_path / "set" / "train", 3)
    write_pictures(tmp_path / "set" / "test", 1, seed=1)
    names = [str(tmp_path / "set" / "train" / "0.png"), "../train/1.png", "2.png"]
    rows = [json.dumps({"file_name": name, "text": name}) for name in names]
    (tmp_path / "set" / "train" / "metadata.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    for path in ("set", "set/train"):
        data = load_images(path)
        assert ([e.caption for e in data.examples], data.ignored_files) == (names, 0)
        assert not any("file_name" in note for note in data.notes)
    stream = Stream(DataConfig("set/train", stream=True), 0, 0)
    assert {e.caption for step in range(9) for e in stream.pictures(step, range(1), 1, map)} <= set(names)
    (tmp_path / "set" / "train" / "metadata.jsonl").write_text('{"file_name": "/a\\u0000b.png", "text": "x"}')
    with pytest.raises(UserError, match=r"is named by metadata\.jsonl but does not exist"):
        load_images("set/train")
    (tmp_path / "private.png").write_bytes(png(tmp_path / "set" / "train"))
    (tmp_path / "set" / "train" / "metadata.jsonl").write_text(rows[0].replace("/set/train/0", "/private"))
    with pytest.raises(UserError, match=r"private\.png in set is named by metadata\.jsonl but lies outside the folder"):
        load_images("set")


@pytest.mark.parametrize("default", [None, "red"])
def test_captions_that_stand_in_metadata_below_the_folder_are_not_replaced(tmp_path, default):
    write_pictures(tmp_path / "set" / "pictures", 2)
    with pytest.raises(UserError) as stopped:
        load_images(str(tmp_path / "set"), default_caption=default)
    said = "pictures/0.png in {0} has no caption but in pictures/metadata.jsonl, and metadata are read at the top of"
    assert said.format(tmp_path / "set") in str(stopped.value)
    assert f"give {tmp_path / 'set' / 'pictures'}" in str(stopped.value)
    for i in range(2):
        (tmp_path / "set" / "pictures" / f"{i}.txt").write_text("own")
    assert captions(tmp_path / "set", default_caption=default) == ["own", "own"]


# --- text files -----------------------------------------------------------------------------------------------------


def test_the_ending_of_a_caption_may_be_written_large_as_that_of_a_picture(folder):
    for i in range(3):
        (folder / f"{i}.png").rename(folder / f"{i}.PNG")
        (folder / f"{i}.TXT").write_text(f"own {i}")
    (folder / "2.txt").write_text("small")
    data = load_images(str(folder), default_caption="red")
    assert ([e.caption for e in data.examples], data.ignored_files) == (["own 0", "own 1", "small"], 1)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_text_of_another_encoding_is_refused_with_and_without_a_mark(folder, encoding):
    (folder / "0.txt").write_bytes("red".encode(encoding))
    with pytest.raises(
        UserError, match=r"0\.png in .* has a caption, 0\.txt, that is not UTF-8 text; save it as UTF-8"
    ):
        load_images(str(folder), default_caption="red")
    (folder / "metadata.csv").write_bytes("file_name,text\n0.png,red\n".encode(encoding))
    with pytest.raises(UserError, match=r"metadata\.csv is not UTF-8 text; save it as UTF-8"):
        load_images(str(folder))


def test_captions_of_kohyas_ending_are_read_and_a_txt_with_text_goes_first(folder):
    for i in range(3):
        (folder / f"{i}.caption").write_text(f"caption {i}")
    (folder / "2.txt").write_text("text")
    data = load_images(str(folder))
    assert ([e.caption for e in data.examples], data.ignored_files) == (["caption 0", "caption 1", "text"], 1)
    (folder / "2.caption").write_text("caption 2")
    (folder / "2.txt").write_text("")
    assert load_images(str(folder)).examples[2].caption == "caption 2"
    (folder / "0.caption").write_bytes("red".encode("utf-16"))
    with pytest.raises(UserError, match=r"has a caption, 0\.caption, that is not UTF-8 text"):
        load_images(str(folder))


def test_the_numbers_of_kohyas_folders_are_said_to_play_no_part(tmp_path):
    write_pictures(tmp_path / "img" / "10_zbx dog", 2)
    (tmp_path / "img" / "10_zbx dog" / "metadata.jsonl").unlink()
    data = load_images(str(tmp_path / "img"), trigger="zbx dog")
    assert data.notes[0] == "the numbers of 10_zbx dog, repeats to other trainers, play no part"
    assert load_images(str(tmp_path / "img" / "10_zbx dog"), trigger="zbx dog").notes[0].startswith("2 of 2 pictures")


def test_captions_that_are_too_long_are_named_together(family, tmp_path):
    write_pictures(tmp_path, 14)
    (tmp_path / "metadata.jsonl").unlink()
    for i in range(14):
        (tmp_path / f"{i:02d}.txt").write_text("red " * (20 + i) if i > 1 else "red")
        (tmp_path / f"{i}.png").rename(tmp_path / f"{i:02d}.png")
    recipe = Recipe(data=DataConfig(str(tmp_path), holdout=0))
    data = load_images(str(tmp_path))
    with pytest.raises(UserError) as stopped:
        check_captions(family, recipe, data, replace(data, examples=[]))
    names = ", ".join(f"{i:02d}.png ({22 + i})" for i in range(2, 12))
    assert str(stopped.value) == (
        f"12 captions have more tokens than the 16 that the text encoder takes: those of {names} and 2 more; shorten "
        "them, or let them be cut with --data.truncate_captions true."
    )
    with pytest.raises(
        UserError, match=r"^the caption of 13\.png has 35 tokens, the text encoder takes 16; shorten it"
    ):
        check_captions(
            family, recipe, replace(data, examples=data.examples[:2]), replace(data, examples=data.examples[-1:])
        )
    check_captions(family, replace(recipe, data=replace(recipe.data, truncate_captions=True)), data, data)


# --- captions of data sets and streams ------------------------------------------------------------------------------


def png(folder: Path) -> bytes:
    return (folder / "0.png").read_bytes()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def shard(folder: Path, caption: bytes, count: int = 4) -> dict[str, bytes]:
    return {f"{i}.{e}": c for i in range(count) for e, c in (("png", png(folder)), ("txt", caption))}


def test_a_caption_with_a_nul_is_refused_by_both_readers(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "r\\u0000e\\u0000d"}\n')
    with pytest.raises(UserError, match=r"^0\.png in .* has a caption with a NUL, as UTF-16 text has"):
        load_images(str(folder))
    with pytest.raises(UserError, match=r"^0\.png in .* has a caption with a NUL, as UTF-16 text has"):
        Stream(DataConfig(str(folder), stream=True), 0, 0).pictures(0, range(1), 1, map)


def test_a_caption_that_is_no_text_is_not_replaced_while_streaming(folder):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})
    rows = {"image": [{"bytes": png(folder), "path": None}] * 3, "text": [["a", "b"]] * 3}
    (folder / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "set" / "train.parquet")
    stream = Stream(DataConfig(str(folder / "set"), stream=True, default_caption="red"), 0, 0)
    with pytest.raises(UserError, match=r"has a list for a caption; expected text"):
        stream.pictures(0, range(1), 1, map)


def test_captions_of_a_shard_are_read_as_those_beside_pictures(folder):
    write_tar(folder / "shards" / "0.tar", shard(folder, b"\xef\xbb\xbfred\r\nblue"))
    collection = Collection(DataConfig(str(folder / "shards"), stream=True))
    assert {row.caption for row in collection.rows(0)} == {"red\nblue"}


def test_a_file_that_is_damaged_where_the_stream_comes_to_it_is_named(folder):
    write_tar(folder / "shards" / "0.tar", shard(folder, b"red"))
    (folder / "shards" / "1.tar").write_bytes(b"junk")
    collection = Collection(DataConfig(str(folder / "shards"), stream=True))
    assert len(list(collection.rows(0))) == 4
    with pytest.raises(
        UserError, match=r"^1\.tar of .* cannot be read from row 0 on \(ReadError\); mend that, or take"
    ):
        list(collection.rows(1))


def test_a_column_that_holds_no_pictures_is_said_while_streaming(folder):
    (folder / "set").mkdir()
    datasets.Dataset.from_dict({"image": [5, 6], "text": ["a", "b"]}).to_parquet(folder / "set" / "train.parquet")
    collection = Collection(DataConfig(str(folder / "set"), stream=True))
    with pytest.raises(UserError, match=r"^train\.parquet of .* cannot be read from row 0 on \(Arrow"):
        list(collection.rows(0))


# --- names of a Mac -------------------------------------------------------------------------------------------------

ONE, TWO = "caf\u00e9", "cafe\u0301"  # é as one character, and as two


@pytest.mark.parametrize(("picture", "text"), [(ONE, TWO), (TWO, ONE)])
def test_a_caption_lies_beside_a_picture_in_either_form_of_unicode(folder, picture, text):
    (folder / "0.png").rename(folder / f"{picture}.png")
    (folder / f"{text}.txt").write_text("a cup")
    assert "a cup" in [e.caption for e in load_images(str(folder), skip_bad=True).examples]


def test_a_caption_of_the_very_name_comes_first(folder):
    for number, name in enumerate((ONE, TWO)):
        (folder / f"{number}.png").rename(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"cup {number}")
    (folder / "2.png").unlink()
    assert sorted(captions(folder)) == ["cup 0", "cup 1"]


@pytest.mark.parametrize(("named", "there"), [(ONE, TWO), (TWO, ONE)])
def test_metadata_name_a_picture_in_either_form_of_unicode(folder, named, there):
    below = folder / there
    below.mkdir()
    (folder / "0.png").rename(below / f"{there}.png")
    row = {"file_name": f"{named}/{named}.png", "text": "a cup"}
    (folder / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert captions(folder) == ["a cup"]
    (row,) = Collection(DataConfig(str(folder), stream=True)).rows(0)
    assert row.read(1 << 20) == (below / f"{there}.png").read_bytes()


def test_masks_and_conditions_are_found_in_either_form_of_unicode(folder, tmp_path_factory):
    masks = tmp_path_factory.mktemp("masks")
    write_pictures(masks, 1)
    (masks / "metadata.jsonl").unlink()
    (masks / "0.png").rename(masks / f"{TWO}.png")
    (folder / "0.png").rename(folder / f"{ONE}.png")
    (folder / f"{ONE}.txt").write_text("a cup")
    for other in ("1.png", "2.png"):
        (folder / other).unlink()
    (example,) = load_images(str(folder), masking=Masking(str(masks), 0.1)).examples
    assert example.mask_digest is not None
