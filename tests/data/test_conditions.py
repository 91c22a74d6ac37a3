"""Conditions are made once, kept without loss, and stay with their pictures; what is wrong with one is named."""

import csv
import json
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from difftuning_control.data import conditions as module
from difftuning_control.data.bank import BankRequest, KnowledgeBank
from difftuning_control.data.conditions import Conditions, bank_conditions, cached_conditions, conditions_of
from difftuning_control.data.control_spec import Conditioner, ControlSpec
from difftuning_control.data.examples import ImageData
from difftuning_control.data.framing import Framing
from difftuning_control.data.images import frame, to_images
from difftuning_control.data.sources import load_images
from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_of
from difftuning_control.recipe.inputs import ControlConfig, FidelityConfig
from difftuning_control.recipe.recipe import Recipe
from support.controls import ignore, on_path, prepared, rows_of, write_photos
from support.damages import DAMAGES
from support.tiny_sd import tiny_pipeline

COUNTED = """
import time
import numpy as np

calls, threads = [], set()

def grey(picture, level=100):
    calls.append(picture)
    return picture[:, :, 0] > level

def colour(picture):
    calls.append(picture)
    return 255 - picture

def mostly_grey(picture):
    calls.append(picture)
    found = picture[:, :, [0, 0, 0]].copy()
    found[3, 3, 2] = found[3, 3, 2] // 2 + 1
    return found

def slow(picture):
    import threading
    threads.add(threading.get_ident())
    time.sleep(float(picture[0, 0, 0]) / 255 * 0.05)
    return picture.copy()

def blank_for_dark(picture):
    return picture if picture.max() > 40 else np.zeros_like(picture)
"""
SPEC = {"resolution": 16}
CENTRE = Framing(16)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The name of a module of annotators that count how often they are called."""
    return on_path(monkeypatch, tmp_path, COUNTED)


def calls(counted: str) -> int:
    return len(sys.modules[counted].calls) if counted in sys.modules else 0


def make(conditioner: Conditioner, data: ImageData | Path, cache: Path, framing: Framing = CENTRE, **settings: Any):
    """The conditions, and how many pictures the progress bar was told of."""
    data = data if isinstance(data, ImageData) else load_images(str(data))
    done: list[int] = []
    found = cached_conditions(conditioner, data, framing, cache, done.append, **settings)
    return found, sum(done)


def everything(conditions: Conditions, views: int = 1) -> torch.Tensor:
    """(N, views, 3, H, W) uint8."""
    return torch.stack([torch.stack([conditions.row(i, v) for v in range(views)]) for i in range(len(conditions))])


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", [Framing(16), Framing(16, flip=True, crops=2)], ids=["one view", "four views"])
def test_conditions_are_made_once_and_then_read(photos, counted, tmp_path, framing):
    conditioner = Conditioner(ControlSpec(f"{counted}:grey", **SPEC))
    first, done = make(conditioner, photos, tmp_path / "cache", framing)
    assert (calls(counted), done, len(first)) == (8 * framing.views, 8, 8)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    again, done = make(Conditioner(ControlSpec(f"{counted}:grey", **SPEC)), photos, tmp_path / "cache", framing)
    assert (calls(counted), done, len(again)) == (8 * framing.views, 8, 8)
    assert torch.equal(everything(again, framing.views), everything(first, framing.views))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()} == files
    assert first.row(0).any()


def other_picture(photos: Path) -> None:
    (photos / "1.png").write_bytes((photos / "2.png").read_bytes())


CHANGES: dict[str, tuple[dict[str, Any], Framing, Callable[[Path], object]]] = {
    "another parameter": ({"params": {"level": 101}}, Framing(16), ignore),
    "another spec": ({"resolution": 24}, Framing(16), ignore),
    "another size": ({}, Framing(24), ignore),
    "mirrored too": ({}, Framing(16, flip=True), ignore),
    "several crops": ({}, Framing(16, crops=2), ignore),
    "crops of another seed": ({}, Framing(16, crops=2, seed=1), ignore),
    "another picture": ({}, Framing(16), other_picture),
}


@pytest.mark.parametrize("case", CHANGES)
def test_whatever_a_condition_depends_on_makes_it_anew(photos, counted, tmp_path, case):
    settings, framing, change = CHANGES[case]
    conditioner = Conditioner(ControlSpec(f"{counted}:grey", **SPEC))
    for earlier in (Framing(16), Framing(16, crops=2)) if case == "crops of another seed" else (Framing(16),):
        make(conditioner, photos, tmp_path / "cache", earlier)
    before = calls(counted)
    change(photos)
    spec = ControlSpec(f"{counted}:grey", **{**SPEC, **settings})
    found, _ = make(Conditioner(spec), photos, tmp_path / "cache", framing)
    assert calls(counted) == before + 8 * framing.views
    expected, _ = make(Conditioner(spec), photos, tmp_path / "new", framing)
    assert torch.equal(everything(found, framing.views), everything(expected, framing.views))


def other_caption(photos: Path) -> None:
    (photos / "metadata.jsonl").write_text((photos / "metadata.jsonl").read_text().replace("red 1", "blue 1"))


@pytest.mark.parametrize(
    ("settings", "framing", "change"),
    [
        ({"value_range": (-1.0, 1.0)}, Framing(16), ignore),
        ({}, Framing(16, seed=7), ignore),
        ({}, Framing(16), other_caption),
    ],
    ids=["the tensor's range", "the seed of one crop", "a caption"],
)
def test_what_no_condition_depends_on_makes_none_anew(photos, counted, tmp_path, settings, framing, change):
    make(Conditioner(ControlSpec(f"{counted}:grey", **SPEC)), photos, tmp_path / "cache")
    change(photos)
    make(Conditioner(ControlSpec(f"{counted}:grey", **SPEC, **settings)), photos, tmp_path / "cache", framing)
    assert calls(counted) == 8


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_made_anew(photos, counted, tmp_path, damage):
    conditioner = Conditioner(ControlSpec(f"{counted}:colour", **SPEC))
    first = everything(make(conditioner, photos, tmp_path / "cache")[0])  # a copy: the file itself is mapped
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    again, _ = make(conditioner, photos, tmp_path / "cache")
    assert calls(counted) == 16
    assert torch.equal(everything(again), first)
    assert path.read_bytes() == whole
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [path.name]


@pytest.mark.parametrize(("function", "channels"), [("grey", 1), ("colour", 3), ("mostly_grey", 3)])
def test_grey_conditions_take_a_third_of_the_space_and_lose_nothing(photos, counted, tmp_path, function, channels):
    conditioner = Conditioner(ControlSpec(f"{counted}:{function}", **SPEC))
    found, _ = make(conditioner, photos, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    assert load_file(path)["conditions"].shape == (8, 1, channels, 16, 16)
    expected = conditions_of(conditioner, load_images(str(photos)), 16, ignore)
    for read in (found, make(conditioner, photos, tmp_path / "cache")[0]):
        assert torch.equal(everything(read)[:, 0], expected)
        assert read.rows([5, 2, 2]).shape == (3, 3, 16, 16)
        assert torch.equal(read.rows([5, 2, 2]), expected[[5, 2, 2]])


def test_conditions_over_several_files_are_numbered_through(photos, counted, tmp_path, monkeypatch):
    conditioner, framing = Conditioner(ControlSpec(f"{counted}:colour", **SPEC)), Framing(16, flip=True)
    whole = everything(make(conditioner, photos, tmp_path / "whole", framing)[0], 2)
    monkeypatch.setattr(module, "SHARD", 3)
    parts, done = make(conditioner, photos, tmp_path / "parts", framing)
    assert (len(list((tmp_path / "parts").iterdir())), len(parts), done) == (3, 8, 8)
    assert torch.equal(everything(parts, 2), whole)
    before = calls(counted)
    (photos / "7.png").write_bytes((photos / "0.png").read_bytes())
    make(conditioner, photos, tmp_path / "parts", framing)
    assert calls(counted) == before + 2 * 2  # the last file alone holds that picture


# --- over several workers -------------------------------------------------------------------------------------------


def test_conditions_do_not_depend_on_the_number_of_workers_nor_on_who_is_first(photos, counted, tmp_path):
    for i in range(8):  # the first take longest
        Image.new("RGB", (16, 16), (255 - 36 * i, i, 200)).save(photos / f"{i}.png")
    conditioner = Conditioner(ControlSpec(f"{counted}:slow", **SPEC))
    one, four = (everything(make(conditioner, photos, tmp_path / str(n), workers=n)[0]) for n in (1, 4))
    assert len(sys.modules[counted].threads) > 2
    assert torch.equal(one, four)
    assert one[:, 0, 1, 0, 0].tolist() == list(range(8))


def test_an_annotator_that_draws_at_random_draws_the_same_on_every_way(photos, tmp_path):
    conditioner = Conditioner(ControlSpec("shuffle", **SPEC))
    one, four = (everything(make(conditioner, photos, tmp_path / str(n), workers=n)[0]) for n in (1, 4))
    assert torch.equal(one, four)
    assert torch.equal(conditions_of(conditioner, load_images(str(photos)), 16, ignore), one[:, 0])
    data = load_images(str(photos))
    backwards = ImageData(data.source, data.examples[::-1])
    assert torch.equal(everything(make(conditioner, backwards, tmp_path / "backwards")[0]), one.flip(0))
    assert len({row.numpy().tobytes() for row in one}) == 8


def test_a_fault_in_one_worker_stops_them_all_and_leaves_no_file(photos, monkeypatch, tmp_path):
    source = "def bad(picture):\n    return picture[:-1] if picture[0, 0, 0] == 0 else picture\n"
    conditioner = Conditioner(ControlSpec(f"{on_path(monkeypatch, tmp_path, source)}:bad", **SPEC))
    Image.new("RGB", (16, 16)).save(photos / "5.png")
    before = threading.active_count()
    with pytest.raises(UserError, match=r"gave \(15, 16, 3\)"):
        make(conditioner, photos, tmp_path / "cache", workers=4)
    assert threading.active_count() == before
    assert not list((tmp_path / "cache").glob("*"))


# --- conditions that the user supplies ------------------------------------------------------------------------------


def conditions_for(photos: Path, folder: Path, extension: str = "webp") -> Path:
    """A folder of conditions named like the pictures: their negatives."""
    folder.mkdir(exist_ok=True)
    for path in sorted(photos.glob("*.png")):
        negative = Image.fromarray(255 - np.asarray(Image.open(path)))
        negative.save(folder / f"{path.stem}.{extension}", lossless=True)
    return folder


def in_a_folder(photos: Path) -> dict[str, str]:
    return {"condition_path": str(conditions_for(photos, photos.parent / "conditions"))}


def in_jsonl(photos: Path) -> dict[str, str]:
    conditions_for(photos, photos / "edges")
    path = photos / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(r | {"edge": f"edges/{r['file_name'][0]}.webp"}) for r in rows))
    return {"condition_column": "edge"}


def in_csv(photos: Path) -> dict[str, str]:
    conditions_for(photos, photos / "edges")
    (photos / "metadata.jsonl").unlink()
    with (photos / "metadata.csv").open("w", newline="") as file:
        rows = [(f"{i}.png", f"red {i}", f"edges/{i}.webp") for i in range(8)]
        csv.writer(file).writerows([("file_name", "text", "edge"), *rows])
    return {"condition_column": "edge"}


def in_a_dataset(photos: Path) -> dict[str, str]:
    moved = photos.rename(photos.parent / "moved")
    conditions_for(moved, photos.parent / "conditions")
    values = {
        "image": [str(moved / f"{i}.png") for i in range(8)],
        "edge": [str(photos.parent / "conditions" / f"{i}.webp") for i in range(8)],
        "text": [f"red {i}" for i in range(8)],
        "number": list(range(8)),
    }
    kinds = {"image": datasets.Image(), "edge": datasets.Image()}
    kinds |= {"text": datasets.Value("string"), "number": datasets.Value("int64")}
    datasets.Dataset.from_dict(values, features=datasets.Features(kinds)).save_to_disk(str(photos))
    return {"condition_column": "edge"}


PLACES = [in_a_folder, in_jsonl, in_csv, in_a_dataset]


@pytest.mark.parametrize("place", PLACES)
def test_supplied_conditions_are_read_with_their_pictures(photos, tmp_path, place):
    data = load_images(str(photos), **place(photos))
    assert [e.caption for e in data.examples] == [f"red {i}" for i in range(8)]
    found = everything(make(Conditioner(ControlSpec("supplied", **SPEC)), data, tmp_path / "cache")[0])
    for i, example in enumerate(data.examples):
        negative = Image.fromarray(255 - np.asarray(example.load()))
        assert np.array_equal(example.load_condition(), negative)
        expected = torch.from_numpy(frame(negative, 16, 16).copy()).permute(2, 0, 1)
        assert torch.equal(found[i, 0], expected)


@pytest.mark.parametrize("place", PLACES[:3])
def test_another_supplied_condition_is_other_data_and_is_read_anew(photos, tmp_path, place):
    options = place(photos)
    data = load_images(str(photos), **options)
    conditioner = Conditioner(ControlSpec("supplied", **SPEC))
    before = everything(make(conditioner, data, tmp_path / "cache")[0])
    path = next(p for p in tmp_path.rglob("3.webp"))
    Image.new("RGB", Image.open(path).size, "red").save(path)
    changed = load_images(str(photos), **options)
    assert changed.fingerprint != data.fingerprint
    after = everything(make(conditioner, changed, tmp_path / "cache")[0])
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [i != 3 for i in range(8)]


def test_without_supplied_conditions_the_data_are_the_same_as_ever(photos):
    data = load_images(str(photos))
    assert all(e.condition_digest is None and e.load_condition is None for e in data.examples)
    assert load_images(str(photos), **in_a_folder(photos)).fingerprint != data.fingerprint


def views_of(data: ImageData, framing: Framing, spec: ControlSpec, cache: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every view of every picture, (H, W, 3), and its condition."""
    found, _ = make(Conditioner(spec), data, cache, framing)
    return [
        (picture, found.row(i, view).permute(1, 2, 0).numpy())
        for i, example in enumerate(data.examples)
        for view, picture in enumerate(framing.pictures(example))
    ]


@pytest.mark.parametrize("framing", [Framing(16), Framing(16, True, 3), Framing(24, True, 3, 5)], ids=str)
def test_a_picture_that_is_its_own_condition_stays_so_however_it_is_cropped_and_mirrored(photos, tmp_path, framing):
    data = load_images(str(photos), condition_path=str(photos))
    for picture, condition in views_of(data, framing, ControlSpec("supplied", resolution=16), tmp_path / "cache"):
        assert np.array_equal(picture, condition)


@pytest.mark.parametrize("resize", ["lanczos", "box", "nearest"])
def test_a_supplied_condition_is_resized_as_the_spec_says(photos, tmp_path, resize):
    way = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX, "nearest": Image.Resampling.NEAREST}
    data, framing = load_images(str(photos), condition_path=str(photos)), Framing(16, True, 3)
    found, _ = make(Conditioner(ControlSpec("supplied", **SPEC, resize=resize)), data, tmp_path / "cache", framing)
    for i, example in enumerate(data.examples):
        image = example.load()
        expected = framing.arrange(example, lambda place, image=image: frame(image, 16, 16, place, way[resize]))
        assert np.array_equal(everything(found, 6)[i].permute(0, 2, 3, 1), expected)


@pytest.mark.parametrize("resize", ["lanczos", "nearest"])
@pytest.mark.parametrize("factor", [2, 0.5])
def test_a_condition_of_another_size_shows_the_same_place_in_every_view(tmp_path, resize, factor):
    """Each pixel's red is its column and its green its row."""
    folders = [tmp_path / "pictures", tmp_path / "conditions"]
    for folder, scale in zip(folders, (1, factor)):
        folder.mkdir()
        for name, (width, height) in {"wide": (96, 48), "high": (40, 88)}.items():
            columns, rows = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
            pixels = np.stack([columns, rows, columns * 0], 2).astype(np.uint8)
            Image.fromarray(pixels).resize((int(width * scale), int(height * scale))).save(folder / f"{name}.png")
    data = load_images(str(folders[0]), default_caption="red", condition_path=str(folders[1]))
    spec = ControlSpec("supplied", resolution=32, resize=resize)
    for picture, condition in views_of(data, Framing(32, True, 3), spec, tmp_path / "cache"):
        apart = np.abs(picture.astype(int) - condition)
        assert apart.max() <= 255 / 32 + 4  # a pixel of the short side


# --- what may be wrong with one -------------------------------------------------------------------------------------


def missing(folder: Path) -> None:
    (folder / "3.webp").unlink()


def wide(folder: Path) -> None:
    Image.new("RGB", (99, 20)).save(folder / "3.webp")


def damaged(folder: Path) -> None:
    Image.effect_noise((20, 33), 90).save(folder / "3.webp", "PNG")
    content = (folder / "3.webp").read_bytes()
    (folder / "3.webp").write_bytes(content[: len(content) // 2])


def no_picture(folder: Path) -> None:
    (folder / "3.webp").write_text("not a picture")


def empty(folder: Path) -> None:
    (folder / "3.webp").write_bytes(b"")


def linked(folder: Path) -> None:
    private = folder.parents[1] / "private.webp"
    Image.new("RGB", (20, 33)).save(private)
    (folder / "3.webp").unlink()
    (folder / "3.webp").symlink_to(private)


def dangling(folder: Path) -> None:
    (folder / "3.webp").unlink()
    (folder / "3.webp").symlink_to("nowhere.webp")


FAULTS: dict[Callable[[Path], None], tuple[str, str]] = {
    missing: ("has no condition in ", "has a condition that is named by metadata.jsonl but does not exist"),
    wide: ("is 20x33, but its condition 99x20; expected the same proportions",) * 2,
    damaged: ("has a condition that is damaged or of an unsupported kind",) * 2,
    no_picture: ("has a condition that is not a picture that can be read",) * 2,
    empty: ("has a condition that is empty (0 bytes)",) * 2,
    linked: (
        "has a condition that leads outside its folder, to ",
        "has a condition that is named by metadata.jsonl but lies outside the folder",
    ),
    dangling: ("has no condition in ", "has a condition that is named by metadata.jsonl but does not exist"),
}


@pytest.mark.parametrize("spoil", FAULTS)
@pytest.mark.parametrize("column", [False, True], ids=["folder", "column"])
def test_a_condition_that_cannot_be_used_is_named_and_left_out_when_asked(photos, spoil, column):
    options = in_jsonl(photos) if column else in_a_folder(photos)
    spoil(photos / "edges" if column else Path(options["condition_path"]))
    with pytest.raises(UserError) as error:
        load_images(str(photos), **options)
    told = str(error.value)
    assert told.startswith(f"3.png in {photos} {FAULTS[spoil][column]}")
    assert told.endswith("; mend it, or leave such files out: --data.skip_bad true.")
    data = load_images(str(photos), **options, skip_bad=True)
    assert [e.name for e in data.examples] == [f"{i}.png" for i in range(8) if i != 3]
    assert list(data.skipped) == ["3.png"]
    assert data.skipped["3.png"].startswith(FAULTS[spoil][column])


def extra(photos: Path) -> dict[str, str]:
    options = in_a_folder(photos)
    Image.new("RGB", (16, 16)).save(Path(options["condition_path"]) / "more.png")
    return options


def test_a_condition_without_a_picture_is_named_and_left_out_when_asked(photos):
    options = extra(photos)
    with pytest.raises(
        UserError, match=r"has 1 condition without a picture of the same name: more\.png; take them out, or "
    ):
        load_images(str(photos), **options)
    assert len(load_images(str(photos), **options, skip_bad=True)) == 8


def test_a_condition_without_a_picture_that_is_left_out_is_counted(photos):
    options = extra(photos)
    ignored = load_images(str(photos)).ignored_files
    data = load_images(str(photos), **options, skip_bad=True)
    assert len(data.skipped) + data.ignored_files == ignored + 1


def test_hidden_files_beside_the_conditions_are_ignored(photos):
    options = in_a_folder(photos)
    folder = Path(options["condition_path"])
    (folder / "._3.png").write_bytes(b"of a Mac")
    (folder / ".thumbnails").mkdir()
    Image.new("RGB", (16, 16)).save(folder / ".thumbnails" / "3.png")
    assert len(load_images(str(photos), **options)) == 8


def test_a_picture_that_is_gone_is_told_before_its_condition_is_called_superfluous(photos):
    options = in_a_folder(photos)
    (photos / "3.png").unlink()
    with pytest.raises(UserError, match=r"3\.png in .* is named by metadata\.jsonl but does not exist"):
        load_images(str(photos), **options)


def test_two_conditions_for_one_picture_are_refused(photos):
    options = in_a_folder(photos)
    Image.new("RGB", (20, 33), "red").save(Path(options["condition_path"]) / "3.png")
    with pytest.raises(UserError, match=r"3\.png in .* has 2 conditions, 3\.png and 3\.webp; mend it"):
        load_images(str(photos), **options)


@pytest.mark.parametrize(("size", "fits"), [((40, 66), True), ((10, 17), True), ((10, 14), False), ((33, 20), False)])
def test_proportions_may_differ_by_the_rounding_of_a_pixel(photos, size, fits):
    options = in_a_folder(photos)
    Image.new("RGB", size).save(Path(options["condition_path"]) / "3.webp")
    assert ("3.png" not in load_images(str(photos), **options, skip_bad=True).skipped) == fits


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"condition_path": "nowhere"}, "the folder of conditions nowhere does not exist; give one with a picture for"),
        ({"condition_column": "edge"}, "has no column 'edge', only file_name, text; name it with --control.column."),
    ],
)
def test_a_place_of_conditions_that_is_not_there_is_named(photos, options, expected):
    with pytest.raises(UserError) as error:
        load_images(str(photos), **options)
    assert expected in str(error.value)


def test_a_column_of_a_folder_without_metadata_is_refused(photos):
    (photos / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match="has no metadata, so no column 'edge'; name a folder of conditions"):
        load_images(str(photos), default_caption="red", condition_column="edge")


def test_a_column_of_a_data_set_that_holds_no_pictures_is_refused(photos):
    in_a_dataset(photos)
    with pytest.raises(UserError, match=r"the data set has no column 'depth', only image, edge, text, number"):
        load_images(str(photos), condition_column="depth")
    with pytest.raises(UserError, match="the column 'number' of the data set holds no pictures"):
        load_images(str(photos), condition_column="number")


def test_a_row_of_a_data_set_without_a_condition_is_named_and_left_out_when_asked(tmp_path):
    pictures = [Image.effect_noise((16, 16), 90).convert("RGB") for _ in range(3)]
    features = {"image": datasets.Image(), "edge": datasets.Image(), "text": datasets.Value("string")}
    values = {"image": pictures, "edge": [pictures[0], None, pictures[2]], "text": ["a", "b", "c"]}
    datasets.Dataset.from_dict(values, features=datasets.Features(features)).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(UserError, match=r"row 1 in .* has a condition that has no picture"):
        load_images(str(tmp_path / "set"), condition_column="edge")
    data = load_images(str(tmp_path / "set"), condition_column="edge", skip_bad=True)
    assert data.skipped == {"row 1": "has a condition that has no picture"}


# --- pictures on which nothing is found -----------------------------------------------------------------------------


def darken(photos: Path, *numbers: int) -> None:
    for i in numbers:
        Image.fromarray(np.asarray(Image.open(photos / f"{i}.png")) // 8).save(photos / f"{i}.png")


def control_recipe(recipe: Recipe, photos: Path, **control: Any) -> Recipe:
    control = {"fidelity": FidelityConfig(every=0), **control}
    return replace(
        recipe, method="controlnet", control=ControlConfig(**control), data=replace(recipe.data, path=str(photos))
    )


def test_pictures_on_which_nothing_is_found_are_counted_and_named(recipe, photos, counted):
    darken(photos, 0, 1, 4, 5)
    _, _, inputs = prepared(control_recipe(recipe, photos, annotator=f"{counted}:blank_for_dark"))
    dark = {"0.png", "1.png", "4.png", "5.png"} & {e.name for e in inputs.data.examples}
    assert 0 < len(dark) < len(inputs.data)
    assert set(inputs.control.blank) == dark
    for i, example in enumerate(inputs.data.examples):
        assert bool(inputs.control.targets[0].row(i).any()) == (example.name not in dark)


def test_a_picture_counts_as_blank_only_if_every_view_is(tmp_path):
    views = torch.zeros(4, 2, 3, 8, 8, dtype=torch.uint8)
    views[1, 0, :, 2, 2] = 255
    views[2] = 77
    views[3, :, 0] = 9  # a colour that is not grey
    assert Conditions([views]).blank == [0, 2, 3]


def test_an_annotator_that_finds_nothing_at_all_is_refused(recipe, photos, counted):
    darken(photos, *range(8))
    annotator = f"{counted}:blank_for_dark"
    with pytest.raises(UserError, match=rf"the annotator {annotator} found nothing on any of the 6 pictures; look at"):
        prepared(control_recipe(recipe, photos, annotator=annotator))


def test_supplied_conditions_that_are_all_blank_are_refused_in_words_of_their_own(recipe, photos):
    options = in_a_folder(photos)
    for path in Path(options["condition_path"]).iterdir():
        Image.new("RGB", Image.open(path).size).save(path)
    supplied = {"annotator": "supplied", "path": options["condition_path"], "bank_condition": "blank"}
    with pytest.raises(UserError) as error:
        prepared(control_recipe(recipe, photos, **supplied))
    assert "annotator supplied" not in str(error.value)
    assert "params" not in str(error.value)


# --- the bank's -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bank(family, tmp_path: Path) -> KnowledgeBank:
    return KnowledgeBank.build(family, tmp_path / "bank", BankRequest(["red", "six"], size=5, steps=2, resolution=16))


@pytest.mark.parametrize("function", ["grey", "colour"])
@pytest.mark.parametrize("decode", [16, 2])
def test_the_banks_conditions_are_those_of_its_decoded_pictures(
    family, bank, counted, tmp_path, monkeypatch, function, decode
):
    monkeypatch.setattr(module, "DECODE", decode)
    conditioner = Conditioner(ControlSpec(f"{counted}:{function}", params={}, **SPEC))
    found = bank_conditions(conditioner, family, bank, tmp_path / "cache", ignore, workers=2)
    assert (calls(counted), len(found)) == (5, 5)
    pictures = [p for part in bank.latents[:].split(decode) for p in to_images(family.decode(part))]
    expected = rows_of([Image.fromarray(conditioner.condition(np.asarray(p))) for p in pictures])
    assert expected.flatten(1).any(1).all()
    assert torch.equal(found.rows(range(5)), expected)


def test_the_banks_conditions_are_made_once_for_one_bank_one_decoder_and_one_spec(family, bank, counted, tmp_path):
    made = 0

    def after(expected: int, family=family, bank=bank, **settings: Any) -> None:
        nonlocal made
        made += expected
        conditioner = Conditioner(ControlSpec(f"{counted}:grey", **{**SPEC, **settings}))
        bank_conditions(conditioner, family, bank, tmp_path / "cache", ignore)
        assert calls(counted) == made

    after(5)
    decoded = []
    hook = family.pipe.vae.decoder.register_forward_hook(lambda *_: decoded.append(1))
    after(0)
    assert not decoded
    hook.remove()
    after(5, params={"level": 50})
    after(5, bank=replace(bank, manifest=bank.manifest | {"shards": {}}))
    after(5, family=family_of(tiny_pipeline(seed=1)))


def test_validation_has_the_conditions_of_the_bank_items_that_it_keeps(recipe, photos, counted):
    recipe = control_recipe(recipe, photos, annotator=f"{counted}:colour")
    family, conditioner, inputs = prepared(recipe)
    kept = inputs.validation["bank"].batch
    assert (len(inputs.bank), len(kept), len(inputs.control.bank)) == (8, 2, 10)
    everything_drawn = KnowledgeBank.load(inputs.bank.folder)
    pictures = to_images(family.decode(everything_drawn.latents[:]))
    expected = rows_of([Image.fromarray(conditioner.condition(np.asarray(p))) for p in pictures])
    assert torch.equal(kept.latents[:], everything_drawn.latents[8:])
    assert torch.equal(kept.conditioning["control"], expected[8:])
    assert torch.equal(inputs.control.bank.rows(range(8)), expected[:8])
    _, _, blank = prepared(replace(recipe, control=replace(recipe.control, bank_condition="blank")))
    assert blank.control.bank is None
    assert not blank.validation["bank"].batch.conditioning["control"].any()
    assert blank.validation["target"].batch.conditioning["control"].any()
