"""Every source gives the same examples, every picture arrives as upright 8-bit RGB, and nothing else gets through."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from difftuning_control.data.checker import Checker
from difftuning_control.data.datasets import dataset_rows
from difftuning_control.data.examples import Columns, Example, ImageData
from difftuning_control.data.images import decode_image, fit_square
from difftuning_control.data.sources import EMBEDDED_SETS, embedded_set, load_images
from difftuning_control.errors import UserError
from difftuning_control.recipe.captioning import Captioning
from support.pictures import write_pictures

CAPTIONS = ['a "red", round thing', "one\u2028two, three", "żółw 😀", "back\\slash\ttab"]
RNG = np.random.default_rng(0)
NOISE = Image.fromarray(RNG.integers(0, 255, (12, 20, 3), np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def examples_of(
    data: datasets.Dataset, columns: Columns | None = None, skip_bad: bool = False, within: str | Path = "/"
) -> ImageData:
    """Examples of a data set in memory; files that it names must lie in `within`."""
    return Checker(skip_bad, Captioning()).data(
        "the data set", dataset_rows(data, columns or Columns(), Captioning(), [Path(within)], [])
    )


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# --- sources --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [Image.fromarray(RNG.integers(0, 255, (8, 8, 3), np.uint8)) for _ in CAPTIONS]


def as_texts(folder: Path, names: list[str], encoding: str) -> None:
    for name, caption in zip(names, CAPTIONS):
        (folder / name).with_suffix(".txt").write_text(caption + "\n", encoding=encoding)


def as_jsonl(folder: Path, names: list[str], encoding: str) -> None:
    rows = [json.dumps({"file_name": n, "text": c, "more": 1}, ensure_ascii=False) for n, c in zip(names, CAPTIONS)]
    (folder / "metadata.jsonl").write_text("\r\n".join(rows) + "\r\n\r\n", encoding=encoding, newline="")


def as_csv(folder: Path, names: list[str], encoding: str) -> None:
    with (folder / "metadata.csv").open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("more", "text", "file_name"), *((1, c, n) for n, c in zip(names, CAPTIONS))])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("write", [as_texts, as_jsonl, as_csv])
def test_captions_arrive_unchanged_from_any_kind_of_folder(tmp_path, images, write, encoding):
    names = ["a.png", "b.PNG", "c c.png", "deep/er/d.png"]
    for name, image in zip(names, images):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name, "PNG")
    write(tmp_path, names, encoding)
    data = load_images(str(tmp_path))
    assert [(e.name, e.caption) for e in data.examples] == list(zip(names, CAPTIONS))
    assert all(np.array_equal(array(e.load()), array(i)) for e, i in zip(data.examples, images))
    assert (data.skipped, data.ignored_files) == ({}, 0)


@pytest.mark.parametrize("metadata", [True, False])
def test_other_files_are_counted_and_hidden_ones_passed_over(tmp_path, metadata):
    folder = write_pictures(tmp_path / "data", count=3)
    if not metadata:
        (folder / "metadata.jsonl").unlink()
    (folder / "notes.md").write_text("mine")
    for hidden in (".DS_Store", "._0.png", ".ipynb_checkpoints/0-checkpoint.png"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_bytes(b"x")
    data = load_images(str(folder), default_caption="red")
    assert (len(data), data.ignored_files) == (3, 1)


def test_two_pictures_can_share_a_caption_file_and_two_rows_a_picture(tmp_path):
    write_pictures(tmp_path, count=1)
    Image.open(tmp_path / "0.png").save(tmp_path / "0.bmp")
    row = '{"file_name": "0.png", "text": "%s"}\n'
    (tmp_path / "metadata.jsonl").write_text(row % "one" + row % "two")
    data = load_images(str(tmp_path))
    assert ([e.caption for e in data.examples], data.ignored_files) == (["one", "two"], 1)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "0.txt").write_text("shared")
    data = load_images(str(tmp_path))
    assert ([e.caption for e in data.examples], data.ignored_files) == (["shared", "shared"], 0)


@pytest.mark.parametrize("column", ["text", "title"])
def test_the_caption_column_can_be_named_and_missing_captions_replaced(tmp_path, column):
    folder = write_pictures(tmp_path, count=2)
    rows = [{"file_name": "0.png", column: "own"}, {"file_name": "1.png", column: " "}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_images(str(folder), caption_column=column, default_caption="other")
    assert [e.caption for e in data.examples] == ["own", "other"]


def test_a_folder_behind_a_link_and_links_within_it_are_read(tmp_path):
    folder = write_pictures(tmp_path / "real", count=2)
    (folder / "metadata.jsonl").unlink()
    (folder / "again.png").symlink_to("0.png")
    (tmp_path / "link").symlink_to(folder)
    assert [e.name for e in load_images(str(tmp_path / "link"), default_caption="red").examples] == [
        "0.png",
        "1.png",
        "again.png",
    ]


def test_embedded_sets_are_found_by_name_with_a_name_for_each_picture():
    icons = load_images("embedded/icons")
    assert len(icons) == 64
    assert {e.load().size for e in icons.examples} == {(64, 64)}
    assert [e.caption.replace(" ", "-") for e in icons.examples] == [Path(e.name).stem for e in icons.examples]
    assert len(load_images("embedded/icons-eval")) >= 256
    assert all((embedded_set(name) / "metadata.jsonl").is_file() for name in EMBEDDED_SETS)
    with pytest.raises(UserError, match=r"'icon'; expected one of embedded/icons, embedded/icons-eval, embedded/flat"):
        load_images("embedded/icon")


# --- datasets -------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(images):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": images, "text": CAPTIONS}, features=features)


@pytest.mark.parametrize("form", ["saved", "splits", "parquet"])
def test_a_data_set_on_disk_gives_the_same_pictures_and_captions(dataset, tmp_path, form):
    folder = tmp_path / "set"
    folder.mkdir()
    if form == "parquet":
        dataset.to_parquet(folder / "part-0.parquet")
    else:
        (datasets.DatasetDict(train=dataset) if form == "splits" else dataset).save_to_disk(folder)
    found, expected = load_images(str(folder)), examples_of(dataset)
    assert [(e.caption, e.load().tobytes()) for e in found.examples] == [
        (e.caption, e.load().tobytes()) for e in expected.examples
    ]


def test_a_data_set_on_disk_without_a_train_split_is_refused(dataset, tmp_path):
    datasets.DatasetDict(test=dataset).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match="has the splits test; expected one called train"):
        load_images(str(tmp_path / "set"))


def test_a_data_set_in_memory_gives_the_same_pictures_and_captions(dataset, images):
    data = examples_of(dataset)
    assert [e.caption for e in data.examples] == CAPTIONS
    assert all(np.array_equal(array(e.load()), array(i)) for e, i in zip(data.examples, images))
    renamed = dataset.rename_columns({"image": "picture", "text": "title"})
    again = examples_of(renamed, Columns("picture", "title"))
    assert again.fingerprint == data.fingerprint


def test_a_data_set_can_name_files(dataset, pictures):
    paths = [str(pictures / f"{i}.png") for i in range(3)]
    data = examples_of(dataset.select(range(3)).remove_columns("image").add_column("image", paths), within=pictures)
    assert [e.digest for e in data.examples] == [e.digest for e in load_images(str(pictures)).examples[:3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.remove_columns("image"), "no column 'image', only text; name it with --data.image_column"),
        (lambda d: d.remove_columns("text"), "no column 'text', only image"),
        (lambda d: d.remove_columns("image").add_column("image", [1.5] * 4), "'image' of the data set holds no pict"),
        (lambda d: d.remove_columns("text").add_column("text", [["a", "b"]] * 4), "row 0 .* a list for a caption"),
        (lambda d: d.remove_columns("text").add_column("text", ["a", None, "", "b"]), "row 1 .* has no caption"),
        (lambda d: d.remove_columns("image").add_column("image", ["/no/x.png"] * 4), "row 0 .* cannot be read"),
        (lambda d: d.select([]), "has no usable picture"),
    ],
)
def test_a_data_set_that_cannot_serve_is_refused(dataset, change, message):
    with pytest.raises(UserError, match=message):
        examples_of(change(dataset))


def test_a_data_set_needs_no_captions_where_they_are_given_for_all(dataset):
    rows = dataset_rows(dataset.remove_columns("text"), Columns(), Captioning("red"), [], [])
    assert [row.caption for row in rows] == [None] * 4


def test_rows_without_a_picture_are_skipped_only_when_wanted(dataset, images):
    holed = datasets.Dataset.from_dict({"image": [None, *images[1:]], "text": CAPTIONS}, features=dataset.features)
    with pytest.raises(UserError, match="row 0 in the data set has no picture"):
        examples_of(holed)
    data = examples_of(holed, skip_bad=True)
    assert (len(data), data.skipped) == (3, {"row 0": "has no picture"})


# --- what becomes of a picture --------------------------------------------------------------------------------------

TO_STORED = {  # how a camera that writes this orientation has stored an upright picture
    1: (),
    2: (Image.Transpose.FLIP_LEFT_RIGHT,),
    3: (Image.Transpose.ROTATE_180,),
    4: (Image.Transpose.FLIP_TOP_BOTTOM,),
    5: (Image.Transpose.TRANSPOSE,),
    6: (Image.Transpose.ROTATE_90,),
    7: (Image.Transpose.TRANSVERSE,),
    8: (Image.Transpose.ROTATE_270,),
}


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("JPEG", {"quality": 100, "subsampling": 0})])
@pytest.mark.parametrize("orientation", TO_STORED)
def test_exif_orientation_is_applied(orientation, kind, options):
    stored = NOISE
    for step in TO_STORED[orientation]:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode_image(encoded(stored, kind, exif=exif, **options))
    assert found.size == NOISE.size
    np.testing.assert_allclose(array(found), array(NOISE), atol=0 if kind == "PNG" else 8)


def half_red(mode: str) -> Image.Image:
    return Image.new("RGBA", (4, 4), (255, 0, 0, 128)).convert(mode)


def palette(**info) -> bytes:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 255, 255, 0, 0])
    return encoded(image, **info)


CMYK_RED = Image.new("CMYK", (4, 4), (0, 255, 255, 0))


@pytest.mark.parametrize(
    ("content", "colour"),
    [
        (encoded(half_red("RGBA")), (255, 127, 127)),
        (encoded(half_red("RGBA"), "WEBP", lossless=True), (255, 127, 127)),
        (encoded(half_red("LA")), (165, 165, 165)),
        (palette(transparency=b"\xff\x80"), (255, 127, 127)),
        (palette(transparency=1), (255, 255, 255)),
        (palette(), (255, 0, 0)),
        (encoded(Image.new("RGB", (4, 4), "red"), transparency=(255, 0, 0)), (255, 255, 255)),
        (encoded(CMYK_RED, "TIFF"), (255, 0, 0)),
        (encoded(CMYK_RED, "JPEG", quality=100), (254, 0, 0)),
        (encoded(Image.new("L", (4, 4), 90)), (90, 90, 90)),
        (encoded(Image.new("1", (4, 4), 1)), (255, 255, 255)),
        (encoded(Image.new("P", (4, 4), 0), "GIF"), (0, 0, 0)),
        (encoded(Image.new("RGB", (4, 4), "red"), "BMP"), (255, 0, 0)),
    ],
    ids=[
        "rgba",
        "rgba webp",
        "grey alpha",
        "palette alpha",
        "palette index",
        "palette",
        "rgb index",
        "cmyk tiff",
        "cmyk jpeg",
        "grey",
        "bits",
        "one-frame gif",
        "bmp",
    ],
)
def test_any_mode_becomes_rgb_on_white(content, colour):
    found = decode_image(content)
    assert found.mode == "RGB"
    np.testing.assert_allclose(array(found), np.broadcast_to(colour, (4, 4, 3)), atol=1)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.linspace(0, 65535, 256).round().astype(np.uint16), "PNG"),
        (np.linspace(0, 65535, 256).round().astype(np.uint16), "TIFF"),
        (np.linspace(0, 65535, 256).round().astype(np.int32), "TIFF"),
        (np.linspace(0, 1, 256).astype(np.float32), "TIFF"),
        (np.linspace(0, 255, 256).astype(np.float32), "TIFF"),
    ],
    ids=["16-bit png", "16-bit tiff", "32-bit tiff", "unit floats", "floats"],
)
def test_deeper_greys_are_scaled_and_not_clipped(values, kind):
    found = array(decode_image(encoded(Image.fromarray(values[None].repeat(3, 0)), kind)))
    expected = np.broadcast_to(np.arange(256)[None, :, None], found.shape)
    np.testing.assert_allclose(found, expected, atol=1)


def test_a_dark_sixteen_bit_picture_stays_dark():
    dark = Image.fromarray(np.full((4, 4), 200, np.uint16))
    assert array(decode_image(encoded(dark))).max() == 1


def test_a_phone_picture_with_a_depth_map_is_its_first_frame():
    content = encoded(NOISE, "MPO", save_all=True, append_images=[Image.new("RGB", (5, 5))], quality=100, subsampling=0)
    np.testing.assert_allclose(array(decode_image(content)), array(NOISE), atol=8)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_several_frames_are_refused_with_their_number(kind):
    content = encoded(NOISE, kind, save_all=True, append_images=[NOISE.rotate(180), NOISE.transpose(1)])
    with pytest.raises(UserError, match=r"animated \(3 frames\); save the frame you want"):
        decode_image(content)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_damaged_bytes_give_a_picture_or_a_users_error(kind):
    content, rng = encoded(NOISE, kind), np.random.default_rng(1)
    outcomes = {"picture": 0, "refused": 0}
    for _ in range(150):
        damaged = bytearray(content[: rng.integers(1, len(content))] if rng.random() < 0.5 else content)
        for place in rng.integers(0, len(damaged), 3):
            damaged[place] = rng.integers(0, 256)
        try:
            outcomes["picture"] += decode_image(bytes(damaged)).mode == "RGB"
        except UserError:
            outcomes["refused"] += 1
    assert sum(outcomes.values()) == 150
    assert outcomes["refused"] > 20


# --- splitting and identity -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(pictures: Path) -> ImageData:
    return load_images(str(pictures))


@pytest.mark.parametrize(("holdout", "held"), [(0.0, 0), (0.01, 1), (0.25, 2), (0.3, 3), (0.8, 7)])
def test_a_split_is_complete_disjoint_and_rounds_the_held_out_part_up(data, holdout, held):
    tune, held_out = data.split(holdout)
    assert len(held_out) == held
    names = [e.name for e in data.examples]
    assert sorted(e.name for e in tune.examples + held_out.examples) == names
    assert [e.name for e in tune.examples] == [n for n in names if n in {e.name for e in tune.examples}]


def test_a_split_is_always_the_same_and_no_mere_tail(data):
    held = [[e.name for e in data.split(0.5)[1].examples] for _ in range(2)]
    assert held[0] == held[1] != [e.name for e in data.examples[4:]]


def test_a_split_that_leaves_nothing_to_tune_on_is_refused(data):
    with pytest.raises(UserError, match=r"8 usable pictures, and holding out 95% .* --data.holdout 0"):
        data.split(0.95)


def test_a_split_keeps_the_record_of_what_was_skipped(data):
    tune, _ = replace(data, skipped={"x.png": "is empty"}, ignored_files=2).split(0.5)
    assert (tune.skipped, tune.ignored_files) == ({"x.png": "is empty"}, 2)


@pytest.mark.parametrize("count", [1, 5, 20])
def test_a_sample_is_a_part_in_order_and_always_the_same(data, count):
    names = [e.name for e in data.sample(count).examples]
    assert names == [e.name for e in data.sample(count).examples] == sorted(set(names))
    assert len(names) == min(count, len(data))


CHANGES: dict[str, Callable[[ImageData], ImageData]] = {
    "caption": lambda d: replace(d, examples=[replace(d.examples[0], caption="blue"), *d.examples[1:]]),
    "picture": lambda d: replace(d, examples=[replace(d.examples[0], digest=d.examples[1].digest), *d.examples[1:]]),
    "order": lambda d: replace(d, examples=d.examples[::-1]),
    "number": lambda d: replace(d, examples=d.examples[1:]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_follows_every_caption_and_picture_and_their_order(data, change):
    assert CHANGES[change](data).fingerprint != data.fingerprint


def test_the_fingerprint_follows_content_and_not_place(tmp_path, data):
    folder = write_pictures(tmp_path / "elsewhere")
    assert load_images(str(folder)).fingerprint == data.fingerprint
    Image.eval(Image.open(folder / "3.png"), lambda v: 255 - v).save(folder / "3.png")
    assert load_images(str(folder)).fingerprint != data.fingerprint


# --- squares --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (8, 20), (31, 8), (9, 200), (1, 3), (8, 9)])
@pytest.mark.parametrize("crop", [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_a_square_has_the_resolution_and_lies_between_minus_one_and_one(size, crop):
    image = Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    square = fit_square(image, 8, crop)
    assert (square.shape, square.dtype) == ((3, 8, 8), np.float32)
    assert square.min() >= -1
    assert square.max() <= 1


@pytest.mark.parametrize("place", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("tall", [True, False])
def test_the_crop_position_runs_along_the_longer_side(place, tall):
    line = np.arange(16, dtype=np.uint8)
    pixels = np.broadcast_to(line[:, None] if tall else line[None], (16, 8) if tall else (8, 16))
    square = fit_square(Image.fromarray(pixels).convert("RGB"), 8, (0.9, place) if tall else (place, 0.9))
    expected = np.arange(8) + round(8 * place)
    along = square[0, :, 0] if tall else square[0, 0]
    np.testing.assert_allclose((along + 1) * 127.5, expected, atol=1e-4)


def test_squares_keep_colours_and_their_ends():
    square = fit_square(Image.new("RGB", (30, 17), (255, 0, 51)), 8)
    np.testing.assert_allclose(square.mean((1, 2)), [1, -1, -0.6], atol=1e-6)
    assert square.std((1, 2)).max() < 1e-6


@pytest.mark.parametrize(("count", "share", "held"), [(100, 0.07, 7), (50, 0.14, 7), (25, 0.28, 7), (8, 0.1, 1)])
def test_a_share_that_is_held_out_is_not_a_picture_too_many_for_its_rounding(count, share, held):
    examples = [Example(str(i), "", str(i), lambda: None) for i in range(count)]
    assert [len(part) for part in ImageData("set", examples).split(share)] == [count - held, held]
