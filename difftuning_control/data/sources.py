"""The sources of pictures and captions: folders, sets that the package carries, and `datasets` data sets.

A folder holds pictures with a `.txt` file beside each, or a `metadata.jsonl` or `metadata.csv` with the columns
`file_name` and `text`; or one sub-folder a class, whose name is the caption of the pictures in it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from difftuning_control.data.datasets import dataset_rows, local_dataset, named_dataset_rows
from difftuning_control.data.examples import CONDITION, Checker, Columns, ImageData, Row
from difftuning_control.data.images import EXTENSIONS
from difftuning_control.errors import UserError
from difftuning_control.system.untrusted import MAX_PIXELS, from_json, leads_outside, read_file, read_text

EMBEDDED_SETS = ("icons", "icons-eval", "flat", "flat-eval")


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
    checker = Checker(skip_bad, default_caption if need_captions else default_caption or "", max_pixels)
    columns = Columns(image_column, "label" if classes == "label" else caption_column, condition_column)
    return checker.data(path, *_rows(path, columns, checker, condition_path, classes))


def list_rows(
    path: str, columns: Columns, default_caption: str | None, condition_path: str | None, classes: str | None
) -> tuple[list[Row], dict[str, str]]:
    """What `load_images` would check and decode, before that; and what is wrong with other pictures, by name.

    Raises:
        UserError: if nothing can be listed.
    """
    checker = Checker(True, default_caption)
    return _rows(path, columns, checker, condition_path, classes)[0], checker.bad


def _rows(
    path: str, columns: Columns, checker: Checker, condition_path: str | None, classes: str | None
) -> tuple[list[Row], int]:
    """The pictures before they are checked, and how many other files lie beside them."""
    folder = place_of_data(path)
    rows: list[Row]
    if classes == "folders":
        rows, ignored = _class_rows(path, folder, checker)
    elif folder.is_dir() and (local := local_dataset(folder)) is not None:
        rows, ignored = dataset_rows(local, columns, checker.default_caption is None, [folder]), 0
    elif folder.is_dir():
        rows, ignored = _folder_rows(folder, columns, checker)
    elif folder.exists():
        raise UserError(f"{path} is a file; expected a folder of pictures with captions.")
    elif path.startswith((".", "/", "~")) or path.count("/") > 1 or path.startswith("embedded"):
        raise UserError(f"the folder {path} does not exist; give a folder of pictures, or a data set's name.")
    else:
        rows, ignored = named_dataset_rows(path, columns, checker.default_caption is None), 0
    if condition_path is not None:
        if not folder.is_dir() or local_dataset(folder) is not None:
            raise UserError(f"the rows of the data set {path} have no names; name a column with --control.column.")
        rows, more = _with_conditions(rows, condition_path, checker)
        ignored += more
    return rows, ignored


def place_of_data(path: str) -> Path:
    """The folder that a path, or the name of an embedded set, stands for."""
    if path.startswith("embedded/"):
        return embedded_set(path.removeprefix("embedded/"))
    return Path(path).expanduser()


def _with_conditions(rows: list[Row], path: str, checker: Checker) -> tuple[list[Row], int]:
    """Each row with the picture of the same name in another folder, and how many conditions have no picture."""
    folder = place_of_data(path)
    if not folder.is_dir():
        raise UserError(f"the folder of conditions {path} does not exist; give one with a picture for each picture.")
    found: dict[str, list[Path]] = {}
    for file in sorted(_visible_files(folder)):
        if file.suffix.lower() in EXTENSIONS and file.is_file() and leads_outside(file, folder) is None:
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


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a NUL
        return False


def _visible_files(folder: Path) -> set[Path]:
    """Files and links anywhere below a folder, without hidden ones and what lies in hidden folders."""
    files = {p for p in folder.rglob("*") if p.is_file() or p.is_symlink()}
    return {p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)}


def _folder_rows(folder: Path, columns: Columns, checker: Checker) -> tuple[list[Row], int]:
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
        if (target := leads_outside(path, folder) or leads_outside(beside, folder)) is not None:
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


def _class_rows(path: str, folder: Path, checker: Checker) -> tuple[list[Row], int]:
    """Pictures of class folders, one level deep, and how many other files lie in them."""
    if not folder.is_dir() or local_dataset(folder) is not None:
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
        if (target := leads_outside(picture, folder)) is not None:
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


def _metadata_rows(path: Path, folder: Path, names: Columns, checker: Checker) -> Iterable[tuple[Row, set[Path]]]:
    """Each row of a metadata file, and the files that it uses."""
    if (target := leads_outside(path, folder)) is not None:
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
            if leads_outside(file, folder) is not None:
                checker.bad[file_name] = f"{what}is named by {path.name} but lies outside the folder"
            elif not _is_file(file):
                checker.bad[file_name] = f"{what}is named by {path.name} but does not exist"
        if file_name not in checker.bad:
            picture, *condition = (partial(read_file, file) for file in used.values())
            yield Row(file_name, picture, names.caption_of(row.get(names.caption)), *condition), set(used.values())
