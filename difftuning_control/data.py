"""Pictures and captions from a folder or a `datasets` data set, checked before anything is trained on them.

A folder holds pictures with a `.txt` file beside each, or a `metadata.jsonl` or `metadata.csv` with the columns
`file_name` and `text`. Every picture becomes 8-bit RGB: EXIF rotation applied, transparency laid on white, CMYK,
palette and 16-bit pictures converted.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from difftuning_control.errors import UserError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
EMBEDDED_SETS = ("icons", "icons-eval", "flat", "flat-eval")


@dataclass(frozen=True)
class Example:
    """One picture and its caption. `load` gives the picture as 8-bit RGB; `digest` identifies its bytes."""

    name: str
    caption: str
    digest: str
    load: Callable[[], Image.Image] = field(compare=False, repr=False)


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
        """Changes when a picture, a caption or their order does."""
        lines = [f"{e.digest} {e.caption}" for e in self.examples]
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
) -> ImageData:
    """Read a folder, `embedded/<set>`, or a `datasets` data set by name or path (`save_to_disk`, Parquet files).

    Args:
        caption_column, image_column: names of the columns; a folder's metadata uses the former only.
        default_caption: for pictures without a caption of their own.
        skip_bad: leave out what cannot be used, and count it, instead of stopping.
        need_captions: False where captions play no part (pictures that serve as a bank).

    Raises:
        UserError: if nothing usable is there, or if something is wrong and `skip_bad` is off.
    """
    checker = _Checker(skip_bad, default_caption if need_captions else default_caption or "")
    if path.startswith("embedded/"):
        folder = embedded_set(path.removeprefix("embedded/"))
    else:
        folder = Path(path).expanduser()
    rows: list[Row]
    if folder.is_dir() and (local := _local_dataset(folder)) is not None:
        rows, ignored = dataset_rows(local, image_column, caption_column, checker.default_caption is None), 0
    elif folder.is_dir():
        rows, ignored = _folder_rows(folder, caption_column, checker)
    elif folder.exists():
        raise UserError(f"{path} is a file; expected a folder of pictures with captions.")
    elif path.startswith((".", "/", "~")) or path.count("/") > 1 or path.startswith("embedded"):
        raise UserError(f"the folder {path} does not exist; give a folder of pictures, or a data set's name.")
    else:
        rows, ignored = _dataset_rows(path, image_column, caption_column, checker.default_caption is None), 0
    return checker.data(path, rows, ignored)


Row = tuple[str, Callable[[], bytes], Any]  # name, bytes of the picture, caption


class _Checker:
    """Turns raw rows into examples, collecting what is wrong with each."""

    def __init__(self, skip_bad: bool, default_caption: str | None):
        self.skip_bad, self.default_caption = skip_bad, default_caption
        self.bad: dict[str, str] = {}

    def data(self, source: str, rows: Iterable[Row], ignored: int = 0) -> ImageData:
        examples = [e for row in rows if (e := self._example(*row)) is not None]
        self._stop_if_bad(source)
        if not examples:
            found = f"{ignored} other files" if ignored else "nothing"
            skipped = f" ({len(self.bad)} skipped as unusable)" if self.bad else ""
            raise UserError(
                f"{source} has no usable picture{skipped}, but {found}; expected {', '.join(sorted(EXTENSIONS))} files."
            )
        return ImageData(source, examples, self.bad, ignored)

    def _example(self, name: str, data: Callable[[], bytes], caption: Any) -> Example | None:
        if caption is not None and not isinstance(caption, str):
            self.bad[name] = f"has a {type(caption).__name__} for a caption; expected text"
            return None
        caption = (caption or "").strip() or self.default_caption
        if caption is None:
            self.bad[name] = "has no caption; write one, or give one for all with --data.default_caption"
            return None
        try:
            content = data()
            decode_image(content)
        except UserError as error:
            self.bad[name] = str(error)
            return None
        except OSError as error:
            self.bad[name] = f"cannot be read ({error.strerror})"
            return None
        digest = hashlib.sha256(content).hexdigest()
        return Example(name, caption, digest, lambda: decode_image(data()))

    def _stop_if_bad(self, source: str) -> None:
        if self.bad and not self.skip_bad:
            name, reason = next(iter(self.bad.items()))
            more = f" (and {len(self.bad) - 1} more files with a problem)" if len(self.bad) > 1 else ""
            raise UserError(
                f"{name} in {source} {reason}{more}; mend it, or leave such files out: --data.skip_bad true."
            )


def decode_image(content: bytes) -> Image.Image:
    """An encoded picture as 8-bit RGB, upright, on white where it is transparent.

    Raises:
        UserError: if it is empty, no picture, damaged, or animated.
    """
    if not content:
        raise UserError("is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata in pictures that are whole
            with Image.open(io.BytesIO(content)) as opened:
                # the further frames of a phone's JPEG (MPO) are its previews, depth and gain maps
                if opened.format != "MPO" and (frames := getattr(opened, "n_frames", 1)) > 1:
                    raise UserError(f"is animated ({frames} frames); save the frame you want as a picture")
                opened.load()
                return _on_white(ImageOps.exif_transpose(opened))
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError("is not a picture that can be read") from None
    except Image.DecompressionBombError:
        raise UserError("has too many pixels to be read safely") from None
    except Exception as error:  # decoders raise whatever they stumble over
        raise UserError(f"is damaged or of an unsupported kind ({' '.join(str(error).split())})") from None


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _to_eight_bit(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, "white")
        ground.alpha_composite(rgba)
        image = ground
    return image.convert("RGB")


def _to_eight_bit(image: Image.Image) -> Image.Image:
    """16-bit and float greys; Pillow's own `convert` clips them instead of scaling."""
    values = np.asarray(image).astype(np.float64)
    if not image.mode.startswith("I"):
        full = 1.0 if values.max(initial=0) <= 1 else 255.0
    else:
        full = 65535.0 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 255.0
    return Image.fromarray((values / full * 255).round().clip(0, 255).astype(np.uint8))


def _outside(path: Path, root: Path) -> str | None:
    """Where a path leads if that is not in the folder `root`; symbolic links are followed."""
    target = os.path.realpath(path)
    return None if Path(target).is_relative_to(os.path.realpath(root)) else target


def _folder_rows(folder: Path, caption_column: str, checker: _Checker) -> tuple[list[Row], int]:
    metadata = [p for n in ("metadata.jsonl", "metadata.csv") if (p := folder / n).exists()]
    if len(metadata) > 1:
        raise UserError(f"{folder} has both metadata.jsonl and metadata.csv; keep one.")
    files = {p for p in folder.rglob("*") if p.is_file() or p.is_symlink()}
    files -= {p for p in files if any(part.startswith(".") for part in p.relative_to(folder).parts)}
    if metadata:
        named = list(_metadata_captions(metadata[0], folder, caption_column, checker))
        rows: list[Row] = [(name, path.read_bytes, caption) for name, path, caption in named]
        return rows, len(files - {metadata[0], *(folder / name for name, _, _ in named)})
    rows, used = [], set()
    for path in sorted(p for p in files if p.suffix.lower() in EXTENSIONS or p.is_dir()):
        name, beside = str(path.relative_to(folder)), path.with_suffix(".txt")
        used |= {path, beside}
        if (target := _outside(path, folder) or _outside(beside, folder)) is not None:
            checker.bad[name] = f"leads outside the folder, to {target}"
        elif not path.is_dir():
            try:
                text = beside.read_text(encoding="utf-8-sig") if beside.exists() else None
            except UnicodeDecodeError:
                checker.bad[name] = f"has a caption, {beside.name}, that is not UTF-8 text; save it as UTF-8"
                continue
            rows.append((name, path.read_bytes, text))
    return rows, len(files - used)


def _metadata_captions(
    path: Path, folder: Path, caption_column: str, checker: _Checker
) -> Iterable[tuple[str, Path, Any]]:
    if (target := _outside(path, folder)) is not None:
        raise UserError(f"{path} leads outside the folder, to {target}; copy it into the folder.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text)))
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8.") from None
    except (json.JSONDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}; expected one JSON object a line, or CSV.") from None
    columns = sorted({key for row in rows if isinstance(row, dict) for key in row if key})
    if not rows or not all(isinstance(row, dict) and row.get("file_name") for row in rows):
        raise UserError(f"{path} needs a file_name in every row; found the columns {', '.join(columns) or 'none'}.")
    if caption_column not in columns and checker.default_caption is None:
        raise UserError(
            f"{path} has no column {caption_column!r}, only {', '.join(columns)}; name it with --data.caption_column."
        )
    for row in rows:
        name = str(row["file_name"])
        file = folder / name
        if _outside(file, folder) is not None:
            checker.bad[name] = f"is named by {path.name} but lies outside the folder"
        elif not file.is_file():
            checker.bad[name] = f"is named by {path.name} but does not exist"
        else:
            yield name, file, row.get(caption_column)


def _local_dataset(folder: Path) -> Any:
    """What `save_to_disk` left, or the rows of Parquet files; None for a folder of pictures."""
    parquet = sorted(str(p) for p in folder.rglob("*.parquet"))
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))
    if not parquet and not saved:
        return None
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


def _dataset_rows(name: str, image_column: str, caption_column: str, need_captions: bool) -> list[Row]:
    """Rows of the train split of a `datasets` data set, by Hub name."""
    import datasets

    try:
        data = datasets.load_dataset(name, split="train")
    except Exception as error:
        raise UserError(
            f"{name} is no folder here and cannot be loaded as a data set ({type(error).__name__}); "
            "give a folder of pictures, or a data set that this machine can reach."
        ) from None
    return dataset_rows(data, image_column, caption_column, need_captions)


def dataset_rows(data: Any, image_column: str, caption_column: str, need_captions: bool = True) -> list[Row]:
    """Rows of a `datasets.Dataset` with an `Image` column and a caption column."""
    import datasets

    if not isinstance(data, datasets.Dataset):
        raise UserError(f"the data set is a {type(data).__name__}; expected a datasets.Dataset, such as one split.")
    missing = [c for c in (image_column, caption_column) if c not in data.column_names]
    if missing and (need_captions or missing[0] == image_column):
        found = ", ".join(data.column_names)
        raise UserError(
            f"the data set has no column {missing[0]!r}, only {found}; name it with --data.image_column or "
            "--data.caption_column."
        )
    try:
        raw = data.cast_column(image_column, datasets.Image(decode=False))
    except Exception:  # pyarrow's, of several kinds
        raise UserError(
            f"the column {image_column!r} of the data set holds no pictures; name another with --data.image_column."
        ) from None

    def content(i: int) -> Callable[[], bytes]:
        def read() -> bytes:
            cell = raw[i][image_column] or {}
            if cell.get("bytes") is None and cell.get("path") is None:
                raise UserError("has no picture")
            return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

        return read

    captions = [None] * len(data) if caption_column in missing else list(data[caption_column])
    return [(f"row {i}", content(i), captions[i]) for i in range(len(data))]


def images_from_dataset(
    data: Any, *, image_column: str = "image", caption_column: str = "text", skip_bad: bool = False
) -> ImageData:
    """Examples of a `datasets.Dataset` object that is already in memory."""
    checker = _Checker(skip_bad, None)
    return checker.data("the data set", dataset_rows(data, image_column, caption_column))


def fit_square(image: Image.Image, resolution: int, crop: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Resize the shorter side to `resolution`, crop a square at the relative position, scale to [-1, 1].

    Args:
        crop: relative position (x, y) of the square within what is left over, each in [0, 1]; the middle by default.

    Returns:
        (3, resolution, resolution) float32.
    """
    scale = resolution / min(image.size)
    if scale != 1:
        size = (max(resolution, round(image.width * scale)), max(resolution, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    left = round((image.width - resolution) * crop[0])
    top = round((image.height - resolution) * crop[1])
    pixels = np.asarray(image.crop((left, top, left + resolution, top + resolution)), dtype=np.float32)
    return np.ascontiguousarray((pixels / 127.5 - 1).transpose(2, 0, 1))
