"""Data sets of the `datasets` library: columns that nobody asked for, formats that they keep, why one does not load."""

import io
import tarfile
from pathlib import Path
from unittest.mock import Mock

import datasets
import pytest
from PIL import EpsImagePlugin, Image
from pyarrow.parquet import write_table

from difftuning_control.data.collection import Collection
from difftuning_control.data.datasets import Choice
from difftuning_control.data.sources import load_images
from difftuning_control.errors import UserError
from difftuning_control.recipe.inputs import DataConfig


def encoded(number: int, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 200, 40)).save(content, kind)
    return content.getvalue()


def cells(*contents: bytes) -> list[dict]:
    return [{"bytes": content, "path": None} for content in contents]


PICTURES = cells(encoded(0), encoded(1))
OTHERS = {
    "broken": cells(b"no picture", b""),
    "eps": cells(encoded(0, "EPS"), encoded(1, "EPS")),
    "outside": [{"bytes": None, "path": "/etc/hostname"}, {"bytes": None, "path": "../x.png"}],
}


@pytest.fixture(autouse=True)
def no_ghostscript(monkeypatch):
    """EPS pictures are given to no other program."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", Mock(side_effect=AssertionError("Ghostscript was called")))


def with_second(column: str, others: list[dict]) -> datasets.Dataset:
    features = {"image": datasets.Image(), column: datasets.Image(), "text": datasets.Value("string")}
    rows = {"image": PICTURES, column: others, "text": ["a", "b"]}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def read(row) -> bytes:
    return row.read(1 << 20)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_column_of_pictures_that_nobody_asked_for_is_not_read(tmp_path: Path, kind):
    write_table(with_second("mask", OTHERS[kind]).data.table, tmp_path / "train.parquet")  # which opens no path
    data = load_images(str(tmp_path))
    assert [(e.caption, e.load().getpixel((0, 0))) for e in data.examples] == [("a", (0, 200, 40)), ("b", (1, 200, 40))]
    rows = list(Collection(DataConfig(str(tmp_path), stream=True)).rows(0))
    assert [(row.caption, read(row)) for row in rows] == [("a", encoded(0)), ("b", encoded(1))]


def test_a_column_of_conditions_is_read_beside_another_that_is_not(tmp_path: Path):
    good = with_second("conditioning_image", cells(encoded(5), encoded(6)))
    good.add_column("mask", OTHERS["broken"], feature=datasets.Image()).to_parquet(tmp_path / "train.parquet")
    data = load_images(str(tmp_path), condition_column="conditioning_image")
    assert [e.load_condition().getpixel((0, 0))[0] for e in data.examples] == [5, 6]


@pytest.mark.parametrize("kind", ["broken", "eps"])
def test_files_of_a_shard_that_nobody_asked_for_are_not_read(tmp_path: Path, kind):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i, other in enumerate(OTHERS[kind]):
            for name, content in (("png", encoded(i)), ("mask.jpg", other["bytes"]), ("txt", b"red")):
                entry = tarfile.TarInfo(f"{i}.{name}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    rows = list(Collection(DataConfig(str(tmp_path), stream=True, image_column="png")).rows(0))
    assert [(row.name, row.caption, read(row)) for row in rows] == [("0", "red", encoded(0)), ("1", "red", encoded(1))]


@pytest.mark.parametrize("classes", [None, "label"])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("kept", ["numpy", "pandas", "arrow", "torch", "columns"])
def test_a_data_set_may_have_been_saved_with_a_format(tmp_path: Path, kept, splits, classes):
    label = datasets.ClassLabel(names=["cat", "dog"])
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "label": label}
    rows = {"image": PICTURES, "text": ["a", "b"], "label": [1, 0]}
    plain = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    saved = plain.with_format(None, columns=["image"]) if kept == "columns" else plain.with_format(kept)
    if splits == 2:
        saved = datasets.DatasetDict({"train": saved, "test": plain})
    saved.save_to_disk(tmp_path / "set")
    expected = ["dog", "cat"] if classes else ["a", "b"]
    data = load_images(str(tmp_path / "set"), classes=classes)
    assert [(e.caption, e.load().getpixel((0, 0))[0]) for e in data.examples] == list(zip(expected, (0, 1)))
    if splits == 2:
        data = load_images(str(tmp_path / "set"), classes=classes, choice=Choice("all"))
        assert [e.caption for e in data.examples] == expected * 2


# --- why one does not load ------------------------------------------------------------------------------------------

FAULTS = {
    "configurations": (
        ValueError(
            "Config name is missing.\nPlease pick one among the available configs: ['big', 'small']\nExample of usage:"
            "\n\t`load_dataset('some/set', 'split')`"
        ),
        r"the data set some/set has several configurations \(big, small\); download the files of one into a folder",
    ),
    "gated": (
        datasets.exceptions.DatasetNotFoundError(
            "Dataset 'some/set' is a gated dataset on the Hub. You must be authenticated to access it."
        ),
        r"some/set is gated: accept its licence at https://huggingface\.co/datasets/some/set, and log in with `hf auth",
    ),
    "script": (
        RuntimeError("Dataset scripts are no longer supported, but found set.py"),
        r"some/set is made by a script \(set\.py\), which is never run; give one that was converted to Parquet",
    ),
    "another": (KeyError("x"), r"\(KeyError\)"),
}


KNOWN = [(fault, wrapped) for fault in FAULTS for wrapped in (False, True) if fault != "another" or not wrapped]


@pytest.mark.parametrize(("fault", "wrapped"), KNOWN)
def test_a_known_reason_not_to_load_is_said(monkeypatch, fault, wrapped):
    error, said = FAULTS[fault]
    if wrapped:
        outer = datasets.exceptions.DatasetGenerationError("an error")
        outer.__cause__, error = error, outer
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=error))
    with pytest.raises(UserError, match=said):
        load_images("some/set")
    with pytest.raises(UserError, match=said):
        Collection(DataConfig("some/set", stream=True))


# --- folders of img2dataset -----------------------------------------------------------------------------------------


def write_addresses(path: Path) -> None:
    rows = {"url": ["http://x/0.jpg"], "caption": ["red"], "key": ["000"], "status": ["success"]}
    datasets.Dataset.from_dict(rows).to_parquet(path)


def test_tables_without_pictures_beside_picture_files_are_said_to_hide_them(tmp_path: Path):
    (tmp_path / "00000").mkdir()
    for i in range(2):
        (tmp_path / "00000" / f"{i}.jpg").write_bytes(encoded(i, "JPEG"))
        (tmp_path / "00000" / f"{i}.txt").write_text("red")
    write_addresses(tmp_path / "00000.parquet")
    with pytest.raises(UserError) as stopped:
        load_images(str(tmp_path))
    assert "no column 'image', only url, caption, key, status" in str(stopped.value)
    assert f"take the Parquet files out of {tmp_path} so that the 2 picture files beside them" in str(stopped.value)
    (tmp_path / "00000.parquet").unlink()
    assert len(load_images(str(tmp_path))) == 2


def test_tables_alone_say_nothing_of_picture_files(tmp_path: Path):
    write_addresses(tmp_path / "00000.parquet")
    with pytest.raises(UserError, match=r"or --control\.column\.$"):
        load_images(str(tmp_path))


def test_shards_are_named_where_they_lie_with_tables_and_where_they_are_not_streamed(tmp_path: Path):
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        entry = tarfile.TarInfo("0.jpg")
        entry.size = len(encoded(0, "JPEG"))
        tar.addfile(entry, io.BytesIO(encoded(0, "JPEG")))
    with pytest.raises(UserError, match=r"1 \.tar files are read by train and bank with --data\.stream true"):
        load_images(str(tmp_path), default_caption="red")
    write_addresses(tmp_path / "00000.parquet")
    with pytest.raises(
        UserError,
        match=r"several kinds, 1 \*\.tar \(00000\.tar\); 1 \*\.parquet \(00000\.parquet\); exp.* others out\.$",
    ):
        Collection(DataConfig(str(tmp_path), stream=True))
