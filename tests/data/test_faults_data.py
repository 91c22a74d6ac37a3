"""Data that were wrong or missing without a word: splits, names, hidden files, what is left out, copies held out."""

import io
import json
import shutil
import tarfile
from dataclasses import replace
from errno import EACCES, ENOSPC
from hashlib import sha256
from pathlib import Path
from unittest.mock import Mock

import datasets
import pytest
from PIL import Image

from difftuning_control.data.bank_pictures import pictures_of_bank
from difftuning_control.data.collection import Collection
from difftuning_control.data.datasets import Choice
from difftuning_control.data.prepare import copies_held_out, read_data
from difftuning_control.data.sources import load_images
from difftuning_control.data.splits import FOR_JUDGING
from difftuning_control.data.stream import Stream
from difftuning_control.errors import UserError
from difftuning_control.recipe.inputs import DataConfig
from difftuning_control.recipe.recipe import Recipe
from support.pictures import write_pictures

FEATURES = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})


def png(number: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 40)).save(content, "PNG")
    return content.getvalue()


def numbered(name: str, count: int) -> dict:
    """Rows whose captions and pictures tell which file they are of."""
    start = sum(map(ord, name)) * 7
    pictures = [{"bytes": png(start + i), "path": None} for i in range(count)]
    return {"image": pictures, "text": [f"{name} {i}" for i in range(count)]}


def as_set(name: str, count: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict(numbered(name, count), features=FEATURES)


def write_parquet(folder: Path, **files: int) -> Path:
    for name, count in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        as_set(name, count).to_parquet(folder / name)
    return folder


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def captions(folder: Path, **options) -> list[str]:
    return sorted(e.caption for e in load_images(str(folder), **options).examples)


def streamed(folder: Path, **options) -> list[str]:
    collection = Collection(DataConfig(str(folder), stream=True, **options))
    return sorted(row.caption for file in range(collection.files) for row in collection.rows(file))


def picture_at(path: Path, number: int) -> None:
    """A picture with its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(number))
    path.with_suffix(".txt").write_text(path.name)


# --- 1: splits ------------------------------------------------------------------------------------------------------

TRAIN, TEST = "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"
CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n{}---\n# A set\n"
LAYOUTS = {
    "sharded": {TRAIN: 5, TEST: 3, "more.parquet": 2},
    "sharded, splits of any name": {
        "data/train.clean-00000-of-00002.parquet": 2,
        "data/train-00000-of-00001.parquet": 4,
    },
    "by file": {"train.parquet": 5, "test.parquet": 3},
    "by a part of a file's name": {
        "my-train_1.parquet": 2,
        "my-train_2.parquet": 2,
        "dev 0.parquet": 3,
        "x.parquet": 1,
    },
    "by folder": {"train/a.parquet": 5, "test/a.parquet": 3, "a.parquet": 1},
    "by a folder's folder": {"big/training-set/x/test.parquet": 4, "big/eval/x/train.parquet": 3},
    "no split": {"a.parquet": 2, "latest.parquet": 2, "contest/b.parquet": 1},
}


@pytest.mark.sample("sharded, splits of any name")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fault_15_01_a_folder_is_split_as_the_datasets_library_splits_it(tmp_path, layout):
    folder = write_parquet(tmp_path / "set", **LAYOUTS[layout])
    expected = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert "train" in expected
    for split, rows in expected.items():
        assert captions(folder, choice=Choice(str(split))) == sorted(rows["text"])
        assert streamed(folder, split=str(split)) == sorted(rows["text"])
    assert captions(folder) == streamed(folder) == sorted(expected["train"]["text"])
    everything = sorted(f"{name} {i}" for name, count in LAYOUTS[layout].items() for i in range(count))
    assert captions(folder, choice=Choice("all")) == streamed(folder, split="all") == everything


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({TRAIN: 5, TEST: 3}, "  - split: train\n    path: data/train-*\n  - split: test\n    path: data/test-*\n"),
        (
            {"x/1.parquet": 2, "y/2.parquet": 3},
            "  - split: test\n    path: x/*\n  - split: train\n    path: [y/*.parquet]\n",
        ),
        ({"x/1.parquet": 2, "y/test.parquet": 3}, '  - split: train\n    path: "**/*.parquet"\n'),
        ({"1.parquet": 2, "2.parquet": 3}, '  - split: train\n    path: "[2-9].parquet"\n'),
    ],
)
def test_fault_15_01_a_card_that_names_the_splits_is_followed_as_by_the_library(tmp_path, files, said):
    folder = write_parquet(tmp_path / "set", **files)
    (folder / "README.md").write_text(CARD.format(said))
    expected = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    for split, rows in expected.items():
        assert captions(folder, choice=Choice(str(split))) == sorted(rows["text"])
        assert streamed(folder, split=str(split)) == sorted(rows["text"])


def test_fault_15_01_several_configurations_without_a_default_are_refused(tmp_path):
    folder = write_parquet(tmp_path, **{"a/train.parquet": 2, "b/train.parquet": 3})
    configs = "".join(f"- config_name: {n}\n  data_files: {n}/*\n" for n in "ab")
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(UserError, match=r"names several configurations of its files \(a, b\), and no default; give"):
        load_images(str(folder))
    assert len(captions(folder / "a")) == 2


def test_fault_15_01_the_split_that_was_taken_is_said_and_one_that_is_not_there_refused(tmp_path):
    folder = write_parquet(tmp_path, **{TRAIN: 5, TEST: 3, "more.parquet": 2})
    expected = (
        f"using the split train of {folder}, without the other splits (test) and 1 files that are of no split; "
        "--data.split chooses"
    )
    assert load_images(str(folder)).notes == [expected] == Collection(DataConfig(str(folder), stream=True)).notes
    assert load_images(str(folder), choice=Choice("all")).notes == []
    with pytest.raises(UserError, match=r"has the splits train, test; none is called dev: choose with --data.split"):
        load_images(str(folder), choice=Choice("dev"))
    (folder / TRAIN).unlink()
    with pytest.raises(UserError, match=r"has the splits test; expected one called train: choose with --data.split"):
        load_images(str(folder))


def test_fault_15_01_a_saved_data_set_has_its_splits_too(tmp_path):
    both = datasets.DatasetDict({"train": as_set("a", 5), "test": as_set("b", 3)})
    both.save_to_disk(tmp_path)
    assert captions(tmp_path) == [f"a {i}" for i in range(5)]
    assert captions(tmp_path, choice=Choice("test")) == [f"b {i}" for i in range(3)]
    assert len(captions(tmp_path, choice=Choice("all"))) == 8
    assert "using the split train" in load_images(str(tmp_path)).notes[0]


def test_fault_15_01_one_folder_gives_pictures_to_tune_on_and_others_to_validate_on(tmp_path):
    folder = write_parquet(tmp_path, **{TRAIN: 5, TEST: 3})
    config = DataConfig(str(folder), validation_path=str(folder))
    data, held_out = read_data(Recipe(data=config))
    assert (len(data), len(held_out), copies_held_out(data, held_out)) == (5, 3, [])
    data, held_out = read_data(Recipe(data=replace(config, split="test", validation_split="train")))
    assert (len(data), len(held_out)) == (3, 5)
    with pytest.raises(UserError, match=r"data.validation_split is given without data.validation_path"):
        DataConfig(str(folder), validation_split="test")


def test_fault_15_01_pictures_beside_parquet_files_are_not_left_out_silently(tmp_path):
    write_parquet(tmp_path, **{"a.parquet": 2})
    picture_at(tmp_path / "preview.png", 1)
    expected = f"using the Parquet files of {tmp_path}, without the 1 picture files beside them"
    assert load_images(str(tmp_path)).notes == [expected]


def test_fault_15_01_folders_of_pictures_are_split_by_folders_for_train_and_for_another_split(tmp_path):
    for i, name in enumerate(["train/0.png", "Train/deep/1.png", "test/2.png", "val_images/3.png", "4.png"]):
        picture_at(tmp_path / name, i)
    data = load_images(str(tmp_path))
    assert sorted(e.name for e in data.examples) == ["Train/deep/1.png", "train/0.png"]
    (note,) = data.notes
    assert note.startswith(
        f"using the split train of {tmp_path}, without the other splits (validation, test) and 1 files"
    )
    assert [e.name for e in load_images(str(tmp_path), choice=Choice("test")).examples] == ["test/2.png"]
    held = load_images(str(tmp_path), choice=Choice(None, FOR_JUDGING)).examples
    assert [e.name for e in held] == ["val_images/3.png"]
    assert len(load_images(str(tmp_path), choice=Choice("all"))) == 5


@pytest.mark.parametrize(
    "names", [["train/0.png", "bus/1.png"], ["test 1.png", "train 2.png"], ["test/1.png", "2.png"]]
)
def test_fault_15_01_pictures_of_trains_and_tests_are_no_splits(tmp_path, names):
    for i, name in enumerate(names):
        picture_at(tmp_path / name, i)
    data = load_images(str(tmp_path))
    assert (len(data), data.notes) == (2, [])


@pytest.mark.parametrize("each", [True, False])
def test_fault_15_01_metadata_at_the_top_or_in_each_splits_folder_give_the_split_alone(tmp_path, each):
    write_pictures(tmp_path / "train", 3)
    write_pictures(tmp_path / "test", 2, seed=1)
    if not each:
        rows = [
            {"file_name": f"{s}/{i}.png", "text": f"red {i}"} for s, n in (("train", 3), ("test", 2)) for i in range(n)
        ]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for split in ("train", "test"):
            (tmp_path / split / "metadata.jsonl").unlink()
    for split, count in (("train", 3), ("test", 2)):
        expected = [(f"{split}/{i}.png", f"red {i}") for i in range(count)]
        found = load_images(str(tmp_path), choice=Choice(split))
        assert [(e.name, e.caption) for e in found.examples] == expected
        assert streamed(tmp_path, split=split) == [caption for _, caption in expected]
    stream = Stream(DataConfig(str(tmp_path), stream=True, split="test"), 2, 0)
    assert [e.digest for e in stream.head().examples] == [e.digest for e in found.examples]


def test_fault_15_01_class_folders_may_lie_in_the_folders_of_splits_and_be_called_like_them(tmp_path):
    for i, name in enumerate(["train/cat/0.png", "train/dog/1.png", "test/cat/2.png"]):
        picture_at(tmp_path / "split" / name, i)
    for i, name in enumerate(["train/0.png", "test/1.png"]):
        picture_at(tmp_path / "called" / name, i)
    assert captions(tmp_path / "split", classes="folders") == ["cat", "dog"]
    assert captions(tmp_path / "called", classes="folders") == ["test", "train"]
    assert captions(tmp_path / "split", classes="folders", choice=Choice("all")) == ["cat", "cat", "dog"]
    picture_at(tmp_path / "split" / "3.png", 3)
    with pytest.raises(UserError, match=r"3\.png in .* lies in no class folder"):
        captions(tmp_path / "split", classes="folders", choice=Choice("all"))


@pytest.mark.parametrize("split", [None, "all"])
def test_splits_within_classes_are_not_taken_for_classes(tmp_path, split):
    for i, name in enumerate(["cat/train/0.png", "cat/test/1.png", "dog/train/2.png"]):
        picture_at(tmp_path / name, i)
    with pytest.raises(UserError, match=r"lies deeper than its class folder; expected .*/train/class/picture"):
        captions(tmp_path, classes="folders", choice=Choice(split))


def test_fault_15_01_conditions_are_those_of_the_split(tmp_path):
    for i, name in enumerate(["train/0.png", "test/1.png"]):
        picture_at(tmp_path / "pictures" / name, i)
        picture_at(tmp_path / "edges" / name, 10 + i)
    data = load_images(str(tmp_path / "pictures"), condition_path=str(tmp_path / "edges"))
    assert [(e.name, e.condition_digest is not None) for e in data.examples] == [("train/0.png", True)]


# --- 2: names -------------------------------------------------------------------------------------------------------


@pytest.mark.sample("s[?]t1")
@pytest.mark.parametrize("name", ["set[1]", "set [v2]", "set*", "s?t1", "{set1,x}", "**"])
def test_fault_15_02_names_are_literal_and_no_patterns(tmp_path, name):
    write_parquet(tmp_path, **{f"{name}/train[0].parquet": 5, "set1/train0.parquet": 3, "set2/train.parquet": 2})
    expected = [f"{name}/train[0].parquet {i}" for i in range(5)]
    assert captions(tmp_path / name) == streamed(tmp_path / name) == expected
    write_pictures(tmp_path / "pictures" / name, 3)
    write_pictures(tmp_path / "pictures" / "set1", 4)
    folder = tmp_path / "pictures" / name
    assert captions(folder) == streamed(folder) == ["red 0", "red 1", "red 2"]
    as_set(name, 4).save_to_disk(tmp_path / "saved" / name)
    assert len(captions(tmp_path / "saved" / name)) == 4
    (tmp_path / "tars" / name).mkdir(parents=True)
    for place, count in ((name, 3), ("set1", 1)):
        (tmp_path / "tars" / place).mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "tars" / place / "0[a].tar", "w") as tar:
            for i in range(count):
                add(tar, f"{i}.png", png(i))
                add(tar, f"{i}.txt", b"red")
    assert streamed(tmp_path / "tars" / name) == ["red"] * 3


def test_fault_15_02_a_name_that_datasets_takes_for_a_chain_is_refused_and_its_neighbour_not_read(tmp_path):
    write_parquet(tmp_path, **{"mine/x.parquet": 2, "a/x.parquet": 3})
    as_set("saved", 4).save_to_disk(tmp_path / "saved")
    as_set("saved", 3).save_to_disk(tmp_path / "c")
    (tmp_path / "mine").rename(tmp_path / "a::b")  # the library could not write there either
    (tmp_path / "saved").rename(tmp_path / "c::d")
    for read, name in ((captions, "a::b"), (streamed, "a::b"), (captions, "c::d")):
        with pytest.raises(
            UserError, match=r"has :: in its name, which stands for a file within an archive; rename it"
        ):
            read(tmp_path / name)


# --- 3: hidden files ------------------------------------------------------------------------------------------------


def test_fault_15_03_hidden_files_beside_those_of_a_data_set_are_left_out(tmp_path):
    write_parquet(tmp_path, **{"train.parquet": 5})
    (tmp_path / "._train.parquet").write_bytes(b"of another system")
    write_parquet(tmp_path, **{".cache/x.parquet": 3, "a/.b/c/x.parquet": 3})
    assert captions(tmp_path) == streamed(tmp_path) == [f"train.parquet {i}" for i in range(5)]


def test_fault_15_03_hidden_data_sets_do_not_replace_pictures(tmp_path):
    folder = write_pictures(tmp_path / ".home" / "data", 3)  # what lies above the folder does not matter
    write_parquet(folder, **{".cache/x.parquet": 3})
    write_pictures(folder / ".trash", 2)
    (folder / "._0.png").write_bytes(b"of another system")
    assert captions(folder) == streamed(folder) == ["red 0", "red 1", "red 2"]
    (folder / "metadata.jsonl").unlink()
    assert captions(folder, default_caption="red") == ["red"] * 3


def test_fault_15_03_hidden_members_of_a_shard_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("0", "sub/1", "._0", ".hidden/2", "sub/.deep/3", "./4"):
            add(tar, f"{name}.png", png(1))
            add(tar, f"{name}.txt", f"red {name}".encode())
    shutil.copy(tmp_path / "0.tar", tmp_path / "._1.tar")
    assert streamed(tmp_path) == ["red ./4", "red 0", "red sub/1"]


def test_fault_15_03_metadata_that_name_a_hidden_picture_are_told_so(tmp_path):
    write_pictures(tmp_path, 3)
    (tmp_path / "1.png").rename(tmp_path / ".1.png")
    (tmp_path / "metadata.jsonl").write_text((tmp_path / "metadata.jsonl").read_text().replace("1.png", ".1.png"))
    with pytest.raises(UserError, match=r"^\.1\.png in .* is named by metadata.jsonl but is hidden"):
        load_images(str(tmp_path))
    assert captions(tmp_path, skip_bad=True) == ["red 0", "red 2"]
    stream = Stream(DataConfig(str(tmp_path), stream=True), 3, 0)
    with pytest.raises(UserError, match=r"is hidden"):
        stream.head()


def test_fault_15_03_conditions_and_class_folders_that_are_hidden_are_left_out(tmp_path):
    for i in range(3):
        picture_at(tmp_path / "pictures" / "cat" / f"{i}.png", i)
        picture_at(tmp_path / "edges" / "cat" / f"{i}.png", 10 + i)
    picture_at(tmp_path / "edges" / ".old" / "0.png", 20)
    picture_at(tmp_path / "pictures" / ".old" / "0.png", 20)
    data = load_images(str(tmp_path / "pictures"), condition_path=str(tmp_path / "edges"))
    assert (len(data), data.ignored_files) == (3, 0)
    assert captions(tmp_path / "pictures", classes="folders") == ["cat"] * 3


# --- 5: what is left out --------------------------------------------------------------------------------------------


def without_captions(folder: Path, good: int, bad: int) -> Path:
    for i in range(good + bad):
        picture_at(folder / f"{i:02d}.png", i)
        if i >= good:
            (folder / f"{i:02d}.txt").unlink()
    return folder


def test_fault_15_05_what_skip_bad_leaves_out_is_said_with_at_most_ten_names(tmp_path):
    few, many = without_captions(tmp_path / "few", 6, 2), without_captions(tmp_path / "many", 6, 13)
    expected = f"using 6 of 8 pictures of {few}; left out: 06.png (no caption), 07.png (no caption)"
    assert load_images(str(few), skip_bad=True).notes == [expected]
    (note,) = load_images(str(many), skip_bad=True).notes
    names = ", ".join(f"{i:02d}.png (no caption)" for i in range(6, 16))
    assert note == f"using 6 of 19 pictures of {many}; left out: {names} and 3 more"
    assert load_images(str(few), default_caption="red").notes == []


def test_fault_15_05_the_error_that_offers_to_skip_lists_as_many(tmp_path):
    many = without_captions(tmp_path / "many", 6, 13)
    with pytest.raises(UserError) as stopped:
        load_images(str(many))
    said = str(stopped.value)
    assert [i for i in range(19) if f"{i:02d}.png" in said] == list(range(6, 16))
    assert "and 12 more files with a problem" in said
    assert "and 3 more)" in said
    assert "--data.skip_bad true" in said


def test_fault_15_05_a_reader_tells_what_was_left_out_and_held_out_pictures_are_not_forgotten(tmp_path):
    data, held = without_captions(tmp_path / "data", 6, 1), without_captions(tmp_path / "held", 3, 2)
    said: list[str] = []
    read_data(Recipe(data=DataConfig(str(data), validation_path=str(held), skip_bad=True)), said.append)
    assert [line.partition(" pictures of")[0] for line in said[:2]] == ["using 6 of 7", "using 3 of 5"]


def test_fault_15_05_conditions_and_class_folders_that_are_left_out_are_listed(tmp_path):
    for i in range(2):
        picture_at(tmp_path / "pictures" / "cat" / f"{i}.png", i)
    for i in range(15):
        picture_at(tmp_path / "edges" / "cat" / f"{i}.png", 10 + i)
        (tmp_path / "classes" / f"class-{i:02d}").mkdir(parents=True)
    picture_at(tmp_path / "classes" / "cat" / "0.png", 1)
    paired = {"condition_path": str(tmp_path / "edges")}
    with pytest.raises(
        UserError, match=r"13 conditions without a picture of the same name: .*\.png and 3 more; take them out"
    ):
        load_images(str(tmp_path / "pictures"), **paired)
    (note,) = load_images(str(tmp_path / "pictures"), **paired, skip_bad=True).notes
    assert "13 conditions without a picture of the same name: " in note
    assert note.endswith(" and 3 more")
    with pytest.raises(UserError, match=r"class-00 in .* has no picture \(nor has class-01, .* and 4 more\); add some"):
        load_images(str(tmp_path / "classes"), classes="folders")
    (note,) = load_images(str(tmp_path / "classes"), classes="folders", skip_bad=True).notes
    assert "15 class folders without a picture: class-00, " in note


def test_fault_15_05_and_06_a_stream_tells_of_rows_left_out_and_of_copies_once_it_met_them(tmp_path):
    write_pictures(tmp_path, 6)
    (tmp_path / "3.png").write_bytes(b"no picture")
    shutil.copy(tmp_path / "0.png", tmp_path / "5.png")
    stream = Stream(DataConfig(str(tmp_path), stream=True, skip_bad=True), 1, 0)
    stream.held = {e.digest for e in stream.head().examples}
    assert stream.notes() == []
    for step in range(4):
        stream.pictures(step, range(5), 5, map)
    left, copies = stream.notes()
    assert left.startswith(f"left out of {tmp_path}: 3.png (")
    assert copies.startswith(f"1 pictures of {tmp_path} that were tuned on are held out too (5.png), so the loss")


# --- 6: copies ------------------------------------------------------------------------------------------------------


def test_fault_15_06_held_out_pictures_that_are_tuned_on_are_found_and_said(tmp_path):
    write_pictures(tmp_path / "a", 4)
    write_pictures(tmp_path / "b", 3, seed=1)
    shutil.copy(tmp_path / "a" / "2.png", tmp_path / "b" / "0.png")
    said: list[str] = []
    read_data(Recipe(data=DataConfig(str(tmp_path / "a"), validation_path=str(tmp_path / "b"))), said.append)
    assert len(said) == 1
    assert said[0].startswith(
        "1 of the 3 held-out pictures are tuned on too: 0.png (as 2.png); so the loss on held-out "
    )
    said.clear()
    read_data(Recipe(data=DataConfig(str(tmp_path / "a"), validation_path=str(tmp_path / "a"))), said.append)
    assert said[0].startswith("4 of the 4 held-out pictures are tuned on too: 0.png, 1.png, 2.png, 3.png; so")
    for i in range(4):  # each picture is there twice, so a share that is held out has a copy among the others
        shutil.copy(tmp_path / "a" / f"{i}.png", tmp_path / "a" / f"{i + 4}.png")
        with (tmp_path / "a" / "metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": f"{i + 4}.png", "text": "red"}) + "\n")
    said.clear()
    read_data(Recipe(data=DataConfig(str(tmp_path / "a"), holdout=0.1)), said.append)
    assert said[0].startswith("1 of the 1 held-out pictures are tuned on too")
    said.clear()
    read_data(Recipe(data=DataConfig(str(tmp_path / "b"), holdout=0.3)), said.append)
    assert said == []


# --- what a name of a column, a spreadsheet or a shard hid ------------------------------------------------------------


def test_a_default_caption_that_hides_a_column_of_another_name_is_said(tmp_path):
    write_pictures(tmp_path, 2)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,caption\n0.png,red\n1.png,blue\n")
    data = load_images(str(tmp_path), default_caption="a picture")
    assert [e.caption for e in data.examples] == ["a picture"] * 2
    said = "has no column 'text', only caption, file_name; so every caption is 'a picture', unless"
    assert [said in note for note in data.notes] == [True]
    assert load_images(str(tmp_path), default_caption="a picture", caption_column="caption").notes == []
    stream = [{"file_name": "0.png", "caption": "red"}]
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, stream)))
    config = DataConfig(str(tmp_path), stream=True, default_caption="a picture")
    assert [said in note for note in Collection(config).notes] == [True]


def test_classes_may_stand_in_a_column_of_any_name(tmp_path):
    write_pictures(tmp_path, 2)
    rows = [{"file_name": f"{i}.png", "class": 7 + i} for i in range(2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captions(tmp_path, classes="label", caption_column="class") == ["7", "8"]
    with pytest.raises(
        UserError, match=r"no column 'label', only class, file_name; name it with --data\.caption_column"
    ):
        captions(tmp_path, classes="label")


@pytest.mark.parametrize(
    ("last", "said"), [(",\n,\n", None), (",blue\n", "row 2 has none, of the columns file_name, text")]
)
def test_empty_rows_of_a_spreadsheet_are_none_and_others_are_named(tmp_path, last, said):
    write_pictures(tmp_path, 1)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n0.png,red\n{last}")
    if said is None:
        assert captions(tmp_path) == ["red"]
        return
    with pytest.raises(UserError, match=said):
        captions(tmp_path)


def test_a_stream_of_parquet_reads_pictures_that_its_rows_name(tmp_path):
    write_pictures(tmp_path, 3)
    (tmp_path / "metadata.jsonl").unlink()
    named = {"image": ["0.png", "1.png", "/etc/passwd"], "text": ["a", "b", "c"]}
    datasets.Dataset.from_dict(named).to_parquet(tmp_path / "train.parquet")
    rows = list(Collection(DataConfig(str(tmp_path), stream=True)).rows(0))
    assert rows[1].read(10**6) == (tmp_path / "1.png").read_bytes()
    with pytest.raises(UserError, match="names a picture outside the data set"):
        rows[2].read(10**6)


def test_a_shard_with_pictures_of_two_endings_says_which_it_reads(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i in range(8):
            add(tar, f"{i:03d}.{'webp' if i == 7 else 'png'}", png(i))
            add(tar, f"{i:03d}.txt", b"red")
    rows = Collection(DataConfig(str(tmp_path), stream=True)).rows(0)
    assert [next(rows).read(10**6) for _ in range(7)] == [png(i) for i in range(7)]
    # older datasets do not give a row that has other members than the first ones
    with pytest.raises(UserError, match=r"has no picture that ends with \.png, as|cannot be read from row 7"):
        next(rows).read(10**6)


def test_a_bank_of_pictures_is_read_alike_wherever_it_is_asked_for(tmp_path):
    for i, name in enumerate(["cat", "dog"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{i}.png").write_bytes(png(i))
    by_class = pictures_of_bank(tmp_path, DataConfig("x"), has_classes=True)
    assert [e.caption for e in by_class.examples] == ["cat", "dog"]
    plain = pictures_of_bank(tmp_path, DataConfig("x"), has_classes=False)
    assert [e.caption for e in plain.examples] == ["", ""]
    assert plain.fingerprint != by_class.fingerprint
    with pytest.raises(UserError, match="pixels"):
        pictures_of_bank(tmp_path, DataConfig("x", max_pixels=32), has_classes=True)


@pytest.mark.parametrize("column", ["image", "jpg"])
def test_a_bank_that_is_a_data_set_has_the_column_of_the_run_or_the_usual_one(tmp_path, column):
    rows = as_set("a", 3)
    (rows if column == "image" else rows.rename_column("image", column)).to_parquet(tmp_path / "0.parquet")
    found = pictures_of_bank(tmp_path, DataConfig("x", image_column="jpg"), has_classes=False)
    assert [e.digest for e in found.examples] == [
        sha256(cell["bytes"]).hexdigest() for cell in numbered("a", 3)["image"]
    ]


def test_it_is_the_cache_that_is_said_where_data_sets_cannot_write_it_and_nothing_else(tmp_path, monkeypatch):
    file = write_parquet(tmp_path, **{"a.parquet": 2}) / "a.parquet"
    inside, denied = f"{datasets.config.HF_DATASETS_CACHE}/parquet", "Permission denied"
    wrapped = datasets.exceptions.DatasetGenerationError("an error")
    wrapped.__cause__ = OSError(ENOSPC, "No space left on device")
    faults = {
        PermissionError(EACCES, denied, str(file)): r"cannot be read \(PermissionError\)",
        PermissionError(EACCES, denied, inside): r"cache of datasets, .* \(Permission denied\)",
        PermissionError(EACCES, denied, str(Path(inside).parents[1])): r"cache of datasets",  # which is to be made
        wrapped: r"cache of datasets, .* cannot be written \(No space left on device\)",
    }
    for fault, said in faults.items():
        monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=fault))
        with pytest.raises(UserError, match=said):
            load_images(str(tmp_path))
    with pytest.raises(UserError, match="cache of datasets"):  # the last, of a data set by name
        load_images("somebody/pictures")
