"""Pictures and captions from a folder or a `datasets` data set, checked before anything is trained on them.

A folder holds pictures with a `.txt` file beside each, or a `metadata.jsonl` or `metadata.csv` with the columns
`file_name` and `text`; or one sub-folder a class, whose name is the caption of the pictures in it. Every picture
becomes 8-bit RGB: EXIF rotation applied, transparency laid on white, CMYK, palette and 16-bit pictures converted.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401 which register

from difftuning_control.errors import UserError
from difftuning_control.outside import (
    BYTES_PER_PIXEL,
    MAX_PIXELS,
    MOST_PIXELS,
    from_json,
    is_text,
    read_file,
    read_text,
)

# what the extensions stand for; pictures of other kinds Pillow may hand to another program (EPS to Ghostscript)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
CONDITION = "has a condition that "  # what is wrong with it follows
EMBEDDED_SETS = ("icons", "icons-eval", "flat", "flat-eval")


@dataclass(frozen=True)
class Example:
    """One picture and its caption. `load` gives the picture as 8-bit RGB; `digest` identifies its bytes.

    `load_condition` and `condition_digest` are those of a condition picture that the user supplies, else None.
    """

    name: str
    caption: str
    digest: str
    load: Callable[[], Image.Image] = field(compare=False, repr=False)
    condition_digest: str | None = None
    load_condition: Callable[[], Image.Image] | None = field(default=None, compare=False, repr=False)
    size: tuple[int, int] = field(default=(0, 0), compare=False)  # width and height, upright


@dataclass(frozen=True)
class ImageData:
    """The usable examples of a data set, what was skipped and why, and how many other files lay beside them."""

    source: str
    examples: list[Example]
    skipped: dict[str, str] = field(default_factory=dict)
    ignored_files: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def fingerprint(self) -> str:
        """Changes when a picture, a caption, a supplied condition or their order does."""
        lines = [" ".join(filter(None, [e.digest, e.condition_digest, e.caption])) for e in self.examples]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def split(self, holdout: float) -> tuple[ImageData, ImageData]:
        """Examples to tune on and held-out ones, the latter rounded up from their share; always the same ones."""
        order = np.random.default_rng(0).permutation(len(self))
        count = int(np.ceil(len(self) * holdout))
        if holdout > 0 and count >= len(self):
            raise UserError(
                f"{self.source} has {len(self)} usable pictures, and holding out {holdout:.0%} of them leaves none to "
                "tune on; add pictures or set --data.holdout 0."
            )
        held = set(order[:count].tolist())
        parts: list[list[Example]] = [[], []]
        for i, example in enumerate(self.examples):
            parts[i in held].append(example)
        return ImageData(self.source, parts[0], self.skipped, self.ignored_files), ImageData(self.source, parts[1])

    def sample(self, count: int) -> ImageData:
        """At most `count` examples, always the same ones of the same data."""
        chosen = np.random.default_rng(0).permutation(len(self))[:count]
        return ImageData(self.source, [self.examples[i] for i in sorted(chosen)], self.skipped, self.ignored_files)


def embedded_set(name: str) -> Path:
    """The folder of a set that the package carries: icons, icons-eval, flat or flat-eval.

    Raises:
        UserError: for any other name.
    """
    if name not in EMBEDDED_SETS:
        known = ", ".join(f"embedded/{n}" for n in EMBEDDED_SETS)
        raise UserError(f"there is no embedded data set {name!r}; expected one of {known}.")
    style, _, part = name.partition("-")
    return Path(str(resources.files("difftuning_control") / "assets" / style / (part or "tune")))


def load_images(
    path: str,
    *,
    caption_column: str = "text",
    image_column: str = "image",
    default_caption: str | None = None,
    skip_bad: bool = False,
    need_captions: bool = True,
    condition_column: str | None = None,
    condition_path: str | None = None,
    classes: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> ImageData:
    """Read a folder, `embedded/<set>`, or a `datasets` data set by name or path (`save_to_disk`, Parquet files).

    Args:
        caption_column, image_column: names of the columns; a folder's metadata uses the former only.
        default_caption: for pictures without a caption of their own.
        skip_bad: leave out what cannot be used, and count it, instead of stopping.
        need_captions: False where captions play no part (pictures that serve as a bank).
        condition_column: column of the condition pictures that the user supplies (file names in a folder's metadata).
        condition_path: folder of these pictures, each named like its picture (another extension is fine).
        classes: folders, where captions are the names of sub-folders, or label, where they are what the column `label`
            names: text, a number, or a `datasets` ClassLabel.
        max_pixels: a picture with more is not decoded, nor is a file read that is larger than such a picture.

    Raises:
        UserError: if nothing usable is there, or if something is wrong and `skip_bad` is off.
    """
    checker = _Checker(skip_bad, default_caption if need_captions else default_caption or "", max_pixels)
    columns = Columns(image_column, "label" if classes == "label" else caption_column, condition_column)
    return checker.data(path, *_rows(path, columns, checker, condition_path, classes))


def list_rows(
    path: str, columns: Columns, default_caption: str | None, condition_path: str | None, classes: str | None
) -> tuple[list[Row], dict[str, str]]:
    """What `load_images` would check and decode, before that; and what is wrong with other pictures, by name.

    Raises:
        UserError: if nothing can be listed.
    """
    checker = _Checker(True, default_caption)
    return _rows(path, columns, checker, condition_path, classes)[0], checker.bad


def _rows(
    path: str, columns: Columns, checker: _Checker, condition_path: str | None, classes: str | None
) -> tuple[list[Row], int]:
    """The pictures before they are checked, and how many other files lie beside them."""
    folder = _place(path)
    rows: list[Row]
    if classes == "folders":
        rows, ignored = _class_rows(path, folder, checker)
    elif folder.is_dir() and (local := _local_dataset(folder)) is not None:
        rows, ignored = dataset_rows(local, columns, checker.default_caption is None, [folder]), 0
    elif folder.is_dir():
        rows, ignored = _folder_rows(folder, columns, checker)
    elif folder.exists():
        raise UserError(f"{path} is a file; expected a folder of pictures with captions.")
    elif path.startswith((".", "/", "~")) or path.count("/") > 1 or path.startswith("embedded"):
        raise UserError(f"the folder {path} does not exist; give a folder of pictures, or a data set's name.")
    else:
        rows, ignored = _dataset_rows(path, columns, checker.default_caption is None), 0
    if condition_path is not None:
        if not folder.is_dir() or _local_dataset(folder) is not None:
            raise UserError(f"the rows of the data set {path} have no names; name a column with --control.column.")
        rows, more = _with_conditions(rows, condition_path, checker)
        ignored += more
    return rows, ignored


def _place(path: str) -> Path:
    """The folder that a path, or the name of an embedded set, stands for."""
    if path.startswith("embedded/"):
        return embedded_set(path.removeprefix("embedded/"))
    return Path(path).expanduser()


Read = Callable[[int], bytes]  # gives the bytes of a picture, if they are no more than so many


@dataclass(frozen=True)
class Row:
    """A picture before it is checked; `condition` reads the picture supplied as its condition."""

    name: str
    read: Read
    caption: Any
    condition: Read | None = None

    def caption_or(self, default: str | None) -> str | None:
        """The caption as it is trained with, or the default where there is none."""
        return (self.caption or "").strip() or default


@dataclass(frozen=True)
class Columns:
    """Names of columns; a folder's metadata has no column of pictures but file_name."""

    image: str = "image"
    caption: str = "text"
    condition: str | None = None

    def caption_of(self, value: Any) -> Any:
        """What stands in the column of captions; a label may be a number."""
        return str(value) if self.caption == "label" and type(value) is int else value


def _with_conditions(rows: list[Row], path: str, checker: _Checker) -> tuple[list[Row], int]:
    """Each row with the picture of the same name in another folder, and how many conditions have no picture."""
    folder = _place(path)
    if not folder.is_dir():
        raise UserError(f"the folder of conditions {path} does not exist; give one with a picture for each picture.")
    found: dict[str, list[Path]] = {}
    for file in sorted(_visible_files(folder)):
        if file.suffix.lower() in EXTENSIONS and file.is_file() and _outside(file, folder) is None:
            found.setdefault(str(file.relative_to(folder).with_suffix("")), []).append(file)
    wanted = {str(Path(name).with_suffix("")) for name in (*(row.name for row in rows), *checker.bad)}
    extra = [file for key, files in found.items() if key not in wanted for file in files]
    if extra and not checker.skip_bad:
        raise UserError(
            f"{path} has {len(extra)} conditions without a picture, such as {extra[0].name}; take them out, or leave "
            "such files out: --data.skip_bad true."
        )
    paired = []
    for row in rows:
        files = found.get(str(Path(row.name).with_suffix("")), [])
        if len(files) == 1:
            paired.append(replace(row, condition=partial(read_file, files[0])))
        else:
            names = " and ".join(file.name for file in files)
            checker.bad[row.name] = f"has {len(files)} conditions, {names}" if files else f"has no condition in {path}"
    return paired, len(extra)


class _Checker:
    """Turns raw rows into examples, collecting what is wrong with each."""

    def __init__(self, skip_bad: bool, default_caption: str | None, max_pixels: int = MAX_PIXELS):
        self.skip_bad, self.default_caption, self.max_pixels = skip_bad, default_caption, max_pixels
        self.bad: dict[str, str] = {}

    def data(self, source: str, rows: Iterable[Row], ignored: int = 0) -> ImageData:
        examples = [e for row in rows if (e := self._example(row)) is not None]
        self._stop_if_bad(source)
        if not examples:
            found = f"{ignored} other files" if ignored else "nothing"
            skipped = f" ({len(self.bad)} skipped as unusable)" if self.bad else ""
            raise UserError(
                f"{source} has no usable picture{skipped}, but {found}; expected {', '.join(sorted(EXTENSIONS))} files."
            )
        return ImageData(source, examples, self.bad, ignored)

    def _example(self, row: Row) -> Example | None:
        caption = row.caption
        if caption is not None and not isinstance(caption, str):
            self.bad[row.name] = f"has a {type(caption).__name__} for a caption; expected text"
            return None
        caption = row.caption_or(self.default_caption)
        if caption is None:
            self.bad[row.name] = "has no caption; write one, or give one for all with --data.default_caption"
            return None
        if not is_text(caption):
            self.bad[row.name] = "has a caption with halves of characters (lone surrogates); expected Unicode text"
            return None
        picture = self._picture(row.name, row.read)
        if picture is None:
            return None
        if row.condition is None:
            return Example(row.name, caption, picture[1], lambda: self.decode(row.read), size=picture[0])
        condition = self._picture(row.name, row.condition, CONDITION)
        if condition is None:
            return None
        (width, height), (wide, high) = picture[0], condition[0]
        if abs(width * high - wide * height) > max(width * high, wide * height) / min(width, height, wide, high):
            self.bad[row.name] = f"is {width}x{height}, but its condition {wide}x{high}; expected the same proportions"
            return None
        read = row.condition
        return Example(
            row.name, caption, picture[1], lambda: self.decode(row.read), condition[1], lambda: self.decode(read),
            picture[0],
        )  # fmt: skip

    def decode(self, read: Read) -> Image.Image:
        return decode_image(read(self.max_pixels * BYTES_PER_PIXEL), self.max_pixels)

    def _picture(self, name: str, read: Read, what: str = "") -> tuple[tuple[int, int], str] | None:
        """Size and digest of a picture that can be used."""
        try:
            content = read(self.max_pixels * BYTES_PER_PIXEL)
            return decode_image(content, self.max_pixels).size, hashlib.sha256(content).hexdigest()
        except UserError as error:
            self.bad[name] = f"{what}{error}"
        except OSError as error:
            self.bad[name] = f"{what}cannot be read ({error.strerror})"
        return None

    def _stop_if_bad(self, source: str) -> None:
        if self.bad and not self.skip_bad:
            name, reason = next(iter(self.bad.items()))
            more = f" (and {len(self.bad) - 1} more files with a problem)" if len(self.bad) > 1 else ""
            raise UserError(
                f"{name} in {source} {reason}{more}; mend it, or leave such files out: --data.skip_bad true."
            )


def decode_image(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An encoded picture as 8-bit RGB, upright, on white where it is transparent.

    Raises:
        UserError: if it is empty, no picture of the known formats, damaged, animated, or has more than `max_pixels`.
    """
    if not content:
        raise UserError("is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata in pictures that are whole
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                if opened.width * opened.height > max_pixels:
                    raise _too_large(opened.width * opened.height, max_pixels)
                # the further frames of a phone's JPEG (MPO) are its previews, depth and gain maps
                if opened.format != "MPO" and (frames := getattr(opened, "n_frames", 1)) > 1:
                    raise UserError(f"is animated ({frames} frames); save the frame you want as a picture")
                opened.load()
                return to_rgb(opened)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError("is not a picture that can be read") from None
    except Image.DecompressionBombError:
        raise _too_large(MOST_PIXELS + 1, max_pixels) from None
    except Exception as error:  # decoders raise whatever they stumble over
        raise UserError(f"is damaged or of an unsupported kind ({' '.join(str(error).split())})") from None


def _too_large(pixels: int, allowed: int) -> UserError:
    if pixels > MOST_PIXELS:
        return UserError(f"has more than {MOST_PIXELS} pixels, expected at most {allowed}; scale it down")
    return UserError(f"has {pixels} pixels, expected at most {allowed} (--data.max_pixels allows more)")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as 8-bit RGB: upright, on white where it is transparent, 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _to_eight_bit(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, "white")
        ground.alpha_composite(rgba)
        image = ground
    return image.convert("RGB")


def _to_eight_bit(image: Image.Image) -> Image.Image:
    """16-bit and float greys; Pillow's own `convert` clips them instead of scaling.

    Raises:
        UserError: if floats lie outside of 0 to 255: depth in metres or normals in −1 to 1 must be scaled first.
    """
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F" and values.size and not (values.min() >= 0 and values.max() <= 255):
        raise UserError(f"has values from {values.min():g} to {values.max():g}; expected 0 to 1 or 0 to 255")
    if not image.mode.startswith("I"):
        full = 1.0 if values.max(initial=0) <= 1 else 255.0
    else:
        full = 65535.0 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 255.0
    return Image.fromarray((values / full * 255).round().clip(0, 255).astype(np.uint8))


def _outside(path: Path, root: Path) -> str | None:
    """Where a path leads if that is not in the folder `root`; symbolic links are followed."""
    if "\0" in str(path):  # which no file has in its name
        return None
    target = os.path.realpath(path)
    return None if Path(target).is_relative_to(os.path.realpath(root)) else target


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a NUL
        return False


def _visible_files(folder: Path) -> set[Path]:
    """Files and links anywhere below a folder, without hidden ones and what lies in hidden folders."""
    files = {p for p in folder.rglob("*") if p.is_file() or p.is_symlink()}
    return {p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)}


def _folder_rows(folder: Path, columns: Columns, checker: _Checker) -> tuple[list[Row], int]:
    metadata = [p for n in ("metadata.jsonl", "metadata.csv") if (p := folder / n).exists()]
    if len(metadata) > 1:
        raise UserError(f"{folder} has both metadata.jsonl and metadata.csv; keep one.")
    files = _visible_files(folder)
    if metadata:
        named = list(_metadata_rows(metadata[0], folder, columns, checker))
        return [row for row, _ in named], len(files.difference([metadata[0]], *(used for _, used in named)))
    if columns.condition is not None:
        raise UserError(f"{folder} has no metadata, so no column {columns.condition!r}; name a folder of conditions.")
    rows: list[Row] = []
    used: set[Path] = set()
    for path in sorted(p for p in files if p.suffix.lower() in EXTENSIONS or p.is_dir()):
        name, beside = str(path.relative_to(folder)), path.with_suffix(".txt")
        used |= {path, beside}
        if (target := _outside(path, folder) or _outside(beside, folder)) is not None:
            checker.bad[name] = f"leads outside the folder, to {target}"
        elif not path.is_dir():
            try:
                text = read_text(beside) if beside.exists() else None
            except OSError as error:
                checker.bad[name] = f"has a caption, {beside.name}, that cannot be read ({error.strerror})"
                continue
            except UnicodeDecodeError:
                checker.bad[name] = f"has a caption, {beside.name}, that is not UTF-8 text; save it as UTF-8"
                continue
            rows.append(Row(name, partial(read_file, path), text))
    return rows, len(files - used)


def _class_rows(path: str, folder: Path, checker: _Checker) -> tuple[list[Row], int]:
    """Pictures of class folders, one level deep, and how many other files lie in them."""
    if not folder.is_dir() or _local_dataset(folder) is not None:
        raise UserError(f"{path} is no folder of pictures, so it has no class folders; leave out data.classes.")
    if (metadata := next((n for n in ("metadata.jsonl", "metadata.csv") if (folder / n).exists()), None)) is not None:
        raise UserError(
            f"{path} has {metadata}, but data.classes is folders; name classes in one place "
            "(--data.classes label reads its column label)."
        )
    files = _visible_files(folder)
    pictures = sorted(p for p in files if p.suffix.lower() in EXTENSIONS)
    rows: list[Row] = []
    for picture in pictures:
        name, parts = str(picture.relative_to(folder)), picture.relative_to(folder).parts
        if (target := _outside(picture, folder)) is not None:
            checker.bad[name] = f"leads outside the folder, to {target}"
        elif len(parts) != 2:
            where = "lies in no class folder" if len(parts) == 1 else "lies deeper than its class folder"
            checker.bad[name] = f"{where}; expected {folder.name}/class/picture"
        else:
            rows.append(Row(name, partial(read_file, picture), parts[0]))
    found = {row.caption for row in rows}
    subfolders = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    empty = next((name for name in subfolders if name not in found), None)
    if empty is not None and not checker.skip_bad and not checker.bad:
        raise UserError(
            f"the class folder {empty} in {path} has no picture; add some, take it out, or leave such ones out: "
            "--data.skip_bad true."
        )
    return rows, len(files) - len(pictures)


def _metadata_rows(path: Path, folder: Path, names: Columns, checker: _Checker) -> Iterable[tuple[Row, set[Path]]]:
    """Each row of a metadata file, and the files that it uses."""
    if (target := _outside(path, folder)) is not None:
        raise UserError(f"{path} leads outside the folder, to {target}; copy it into the folder.")
    try:
        text = read_text(path)
        if path.suffix == ".csv":
            rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text)))
        else:
            rows = [from_json(line) for line in text.split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8.") from None
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read: {str(error).partition('; use sys')[0]}; expected one JSON object a line, or CSV."
        ) from None
    columns = sorted({key for row in rows if isinstance(row, dict) for key in row if key})
    if not rows or not all(isinstance(row, dict) and row.get("file_name") for row in rows):
        raise UserError(f"{path} needs a file_name in every row; found the columns {', '.join(columns) or 'none'}.")
    if names.caption not in columns and checker.default_caption is None:
        raise UserError(
            f"{path} has no column {names.caption!r}, only {', '.join(columns)}; name it with --data.caption_column."
        )
    if names.condition is not None and names.condition not in columns:
        raise UserError(
            f"{path} has no column {names.condition!r}, only {', '.join(columns)}; name it with --control.column."
        )
    for number, row in enumerate(rows, 1):
        file_name = row["file_name"]
        if not isinstance(file_name, str):
            checker.bad[f"row {number}"] = f"has a {type(file_name).__name__} for a file_name; expected text"
            continue
        used = {"": folder / file_name}
        if names.condition is not None:
            used[CONDITION] = folder / str(row.get(names.condition) or "")
        for what, file in used.items():
            if _outside(file, folder) is not None:
                checker.bad[file_name] = f"{what}is named by {path.name} but lies outside the folder"
            elif not _is_file(file):
                checker.bad[file_name] = f"{what}is named by {path.name} but does not exist"
        if file_name not in checker.bad:
            picture, *condition = (partial(read_file, file) for file in used.values())
            yield Row(file_name, picture, names.caption_of(row.get(names.caption)), *condition), set(used.values())


def _local_dataset(folder: Path) -> Any:
    """What `save_to_disk` left, or the rows of Parquet files; None for a folder of pictures."""
    parquet = sorted(str(p) for p in folder.rglob("*.parquet") if p.is_file())
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))
    if not parquet and not saved:
        return None
    for file in parquet:
        if (target := _outside(Path(file), folder)) is not None:
            raise UserError(f"{file} leads outside the folder, to {target}; copy it into the folder.")
    import datasets

    try:
        if parquet:
            return datasets.load_dataset("parquet", data_files=parquet, split="train")
        found = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"the data set {folder} cannot be read ({type(error).__name__}); save it again.") from None
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise UserError(f"the data set {folder} has the splits {', '.join(found)}; expected one called train.")
        return found["train"]
    return found


def _dataset_rows(name: str, columns: Columns, need_captions: bool) -> list[Row]:
    """Rows of the train split of a `datasets` data set, by Hub name."""
    import datasets

    try:
        data = datasets.load_dataset(name, split="train")
    except Exception as error:
        raise UserError(
            f"{name} is no folder here and cannot be loaded as a data set ({type(error).__name__}); "
            "give a folder of pictures, or a data set that this machine can reach."
        ) from None
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = [Path(HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE)]
    return dataset_rows(data, columns, need_captions, cached)


def dataset_rows(
    data: Any, columns: Columns, need_captions: bool = True, within: Sequence[Path] | None = None
) -> list[Row]:
    """Rows of a `datasets.Dataset` with an `Image` column, a caption column and perhaps a column of conditions.

    Args:
        within: folders in which files that are named instead of held must lie, the first for relative names; files
            from anywhere when None.
    """
    import datasets

    if not isinstance(data, datasets.Dataset):
        raise UserError(f"the data set is a {type(data).__name__}; expected a datasets.Dataset, such as one split.")
    wanted = {columns.image: True, columns.caption: need_captions}
    if columns.condition is not None:
        wanted[columns.condition] = True
    missing = [c for c, needed in wanted.items() if needed and c not in data.column_names]
    if missing:
        found = ", ".join(data.column_names)
        raise UserError(
            f"the data set has no column {missing[0]!r}, only {found}; name it with --data.image_column, "
            "--data.caption_column or --control.column."
        )
    read = _reader(data, columns.image, within)
    read_condition = _reader(data, columns.condition, within) if columns.condition is not None else None
    captions = list(data[columns.caption]) if columns.caption in data.column_names else [None] * len(data)
    feature = data.features.get(columns.caption)
    if isinstance(feature, datasets.ClassLabel):
        captions = [feature.int2str(c) if c is not None and c >= 0 else None for c in captions]
    captions = [columns.caption_of(c) for c in captions]
    return [
        Row(f"row {i}", read(i), captions[i], read_condition(i) if read_condition is not None else None)
        for i in range(len(data))
    ]


def _reader(data: Any, column: str, within: Sequence[Path] | None) -> Callable[[int], Read]:
    """Gives for a row's number what reads the bytes of its picture."""
    import datasets

    try:
        raw = data.cast_column(column, datasets.Image(decode=False))
    except Exception:  # pyarrow's, of several kinds
        raise UserError(
            f"the column {column!r} of the data set holds no pictures; name another with --data.image_column or "
            "--control.column."
        ) from None

    def content(i: int) -> Read:
        def read(most: int) -> bytes:
            cell = raw[i][column] or {}
            if cell.get("bytes") is not None:
                return cell["bytes"]
            if cell.get("path") is None:
                raise UserError("has no picture")
            path = Path(cell["path"]) if within is None else within[0] / cell["path"]
            if within is not None and all(_outside(path, folder) is not None for folder in within):
                raise UserError(f"names a picture outside the data set, {path}")
            return read_file(path, most)

        return read

    return content


def images_from_dataset(
    data: Any, *, image_column: str = "image", caption_column: str = "text", skip_bad: bool = False
) -> ImageData:
    """Examples of a `datasets.Dataset` object that is already in memory."""
    checker = _Checker(skip_bad, None)
    return checker.data("the data set", dataset_rows(data, Columns(image_column, caption_column)))


def frame(
    image: Image.Image,
    height: int,
    width: int,
    crop: tuple[float, float] = (0.5, 0.5),
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> np.ndarray:
    """Resize until the frame is just covered and crop it at the relative position, (height, width, 3) uint8.

    Args:
        crop: relative position (x, y) of the frame within what is left over, each in [0, 1]; the middle by default.
    """
    size, left, top = placed(image.size, height, width, crop)
    if size != image.size:
        image = image.resize(size, resample)
    return np.array(image.crop((left, top, left + width, top + height)))  # a copy that may be written to


def placed(
    size: tuple[int, int], height: int, width: int, crop: tuple[float, float] = (0.5, 0.5)
) -> tuple[tuple[int, int], int, int]:
    """What `frame` does to a picture of (width, height): the size it is resized to, and the crop's left and top."""
    scale = max(height / size[1], width / size[0])
    if scale != 1:
        size = (max(width, round(size[0] * scale)), max(height, round(size[1] * scale)))
    return size, round((size[0] - width) * crop[0]), round((size[1] - height) * crop[1])


def fit_square(image: Image.Image, resolution: int, crop: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """A picture in a square frame, scaled to [-1, 1], (3, resolution, resolution) float32."""
    pixels = frame(image, resolution, resolution, crop).astype(np.float32)
    return np.ascontiguousarray((pixels / 127.5 - 1).transpose(2, 0, 1))
