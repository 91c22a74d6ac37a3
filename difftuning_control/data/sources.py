"""The sources of pictures and captions: folders, sets that the package carries, and `datasets` data sets.

A folder holds pictures with a `.txt` or `.caption` file beside each, or a `metadata.jsonl` or `metadata.csv` with the
columns `file_name` and `text`; or one sub-folder a class, whose name is the caption of the pictures in it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path

from difftuning_control.data.beside import inside, paired, without_labels
from difftuning_control.data.caption_files import caption_files, unread_captions, with_unread
from difftuning_control.data.checker import Checker
from difftuning_control.data.class_folders import class_rows, numbers_of
from difftuning_control.data.datasets import FIRST, Choice, dataset_rows, is_dataset, local_dataset, named_dataset_rows
from difftuning_control.data.examples import Columns, ImageData, Row, listed
from difftuning_control.data.images import EXTENSIONS, unread_among
from difftuning_control.data.metadata import METADATA, metadata_of, metadata_rows
from difftuning_control.data.splits import ALL, TRAIN, chosen, splits_of_pictures, taken, visible_files
from difftuning_control.errors import UserError
from difftuning_control.recipe.captioning import Captioning
from difftuning_control.recipe.masking import Masking
from difftuning_control.system.home import is_path
from difftuning_control.system.untrusted import MAX_PIXELS, leads_outside, read_file, read_text

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
    trigger: str | None = None,
    skip_bad: bool = False,
    need_captions: bool = True,
    condition_column: str | None = None,
    condition_path: str | None = None,
    classes: str | None = None,
    max_pixels: int = MAX_PIXELS,
    choice: Choice = FIRST,
    masking: Masking | None = None,
    apart: Sequence[str] = (),
) -> ImageData:
    """Read a folder, `embedded/<set>`, or a `datasets` data set by name or path (`save_to_disk`, Parquet files).

    Args:
        caption_column, image_column: names of the columns; a folder's metadata uses the former only.
        default_caption: for pictures without a caption of their own.
        trigger: words that are put where captions have `[trigger]`, or before those that lack them.
        skip_bad: leave out what cannot be used, and count it, instead of stopping.
        need_captions: False where captions play no part (pictures that serve as a bank).
        condition_column: column of the condition pictures that the user supplies (file names in a folder's metadata).
        condition_path: folder of these pictures, each named like its picture (another extension is fine).
        classes: folders, where captions are the names of sub-folders, or label, where they are what the column `label`,
            or another one that `caption_column` names, says: text, a number, or a `datasets` ClassLabel.
        max_pixels: a picture with more is not decoded, nor is a file read that is larger than such a picture.
        choice: of the split, where there are several.
        masking: where masks come from, if the pictures have some.
        apart: folders of other pictures, such as masks of a data set that this one is held out of; they may lie in it.

    Raises:
        UserError: if nothing usable is there, or if something is wrong and `skip_bad` is off.
    """
    captioning = Captioning(default_caption if need_captions else default_caption or "", trigger)
    checker = Checker(skip_bad, captioning, max_pixels, masking)
    columns = Columns.of(image_column, caption_column, condition_column, classes)
    return checker.data(path, *_rows(path, columns, checker, condition_path, classes, choice, apart))


def list_rows(
    path: str,
    columns: Columns,
    captioning: Captioning,
    condition_path: str | None,
    classes: str | None,
    choice: Choice = FIRST,
    masking: Masking | None = None,
    apart: Sequence[str] = (),
) -> tuple[list[Row], dict[str, str]]:
    """What `load_images` would check and decode, before that; and what is wrong with other pictures, by name.

    Raises:
        UserError: if nothing can be listed.
    """
    checker = Checker(True, captioning, masking=masking)
    return _rows(path, columns, checker, condition_path, classes, choice, apart)[0], checker.bad


def _rows(
    path: str,
    columns: Columns,
    checker: Checker,
    condition_path: str | None,
    classes: str | None,
    choice: Choice,
    apart: Sequence[str],
) -> tuple[list[Row], int]:
    """The pictures before they are checked, and how many other files lie beside them."""
    folder = place_of_data(path)
    rows: list[Row]
    is_set, split = folder.is_dir() and is_dataset(folder), ALL
    masks = checker.masking.folder if checker.masking is not None else None
    named = [place_of_data(other) for other in (condition_path, masks, *apart) if other is not None]
    others_in_it = inside(folder, named)
    if classes == "folders" and (is_set or not folder.is_dir()):
        raise UserError(f"{path} is no folder of pictures, so it has no class folders; leave out data.classes.")
    if is_set:
        dataset, lines = local_dataset(folder, choice)
        checker.notes += lines
        rows, ignored = dataset_rows(dataset, columns, checker.captioning, [folder], checker.notes, folder), 0
    elif folder.is_dir():
        rows, ignored, split = _rows_in(path, folder, columns, checker, others_in_it, classes == "folders", choice)
    elif folder.exists():
        raise UserError(f"{path} is a file; expected a folder of pictures with captions.")
    elif is_path(path) or path.startswith("embedded"):
        raise UserError(f"the folder {path} does not exist; give a folder of pictures, or a data set's name.")
    else:
        rows, ignored = named_dataset_rows(path, columns, checker.captioning, choice, checker.notes), 0
    has_names = folder.is_dir() and not is_set
    if condition_path is not None:
        if not has_names:
            raise UserError(f"the rows of the data set {path} have no names; name a column with --control.column.")
        rows, more = paired(rows, folder, condition_path, place_of_data(condition_path), split, checker, "condition")
        ignored += more
    if masks is not None:
        if not has_names:
            raise UserError(f"the rows of the data set {path} have no names, so no masks in a folder; say alpha.")
        rows, more = paired(rows, folder, masks, place_of_data(masks), split, checker, "mask")
        ignored += more
    return rows, ignored


def _rows_in(
    path: str,
    folder: Path,
    columns: Columns,
    checker: Checker,
    apart: list[Path],
    by_class: bool,
    choice: Choice,
) -> tuple[list[Row], int, str]:
    """The pictures of a folder, how many other files lie beside them, and the split that they are of."""
    files, others, split, is_split = _files_of_split(path, folder, apart, choice, checker, by_class)
    if unread := [p.relative_to(folder).as_posix() for p in unread_among(files)]:
        kinds = "HEIC, JPEG XL, JPEG 2000 and raw files are not read; save them as PNG or JPEG"
        checker.notes.append(f"left out of {path}: {listed(unread)}; {kinds}")
    count = len(files)
    metadata = [] if by_class else metadata_of(folder, files)
    if not metadata:
        files = without_labels(path, folder, files, checker)
    if by_class:
        rows, ignored = class_rows(path, folder, files, apart, is_split, checker)
    else:
        rows, ignored = _folder_rows(folder, files, others, metadata, columns, checker)
    shards = sum(p.suffix.lower() == ".tar" for p in files)
    if shards and not rows:
        checker.notes.append(f"{shards} .tar files are read by train and bank with --data.stream true")
    return rows, ignored + count - len(files), split


def _files_of_split(
    path: str, folder: Path, apart: list[Path], choice: Choice, checker: Checker, by_class: bool
) -> tuple[set[Path], set[Path], str, bool]:
    """The files of a folder of pictures that are of the chosen split, the others, its name (`all` where there are
    none), and whether there are several.

    Args:
        apart: folders of other pictures in this one.
    """
    files = [p for p in visible_files(folder) if not any(other in (p, *p.parents) for other in apart)]
    pictures = [p for p in files if p.suffix.lower() in EXTENSIONS]
    splits = splits_of_pictures(folder, pictures)
    if by_class and not any(len(p.relative_to(folder).parts) > 2 for p in pictures):
        splits = {}  # of classes with these names
    if not splits:
        chosen([TRAIN], choice.split, choice.prefer, path, choice.option)
        return set(files), set(), ALL, False
    split = chosen(splits, choice.split, choice.prefer, path, choice.option)
    if split == ALL:
        return set(files), set(), ALL, True
    left = len(set(pictures).difference(*splits.values()))
    checker.notes += taken(path, split, splits, left, choice.option)
    mine = {*splits_of_pictures(folder, files)[split], *(p for p in files if p.parent == folder and p.name in METADATA)}
    return mine, set(files) - mine, split, True


def place_of_data(path: str) -> Path:
    """The folder that a path, or the name of an embedded set, stands for."""
    if path.startswith("embedded/"):
        return embedded_set(path.removeprefix("embedded/"))
    return Path(path).expanduser()


def _folder_rows(
    folder: Path, files: set[Path], others: set[Path], metadata: list[Path], columns: Columns, checker: Checker
) -> tuple[list[Row], int]:
    """The rows that a folder's metadata name, or its pictures, and how many of the files are something else.

    Args:
        files: those of the chosen split; where there are several splits, each may have metadata of its own.
        others: those of other splits, or of none.
        metadata: of the folder, or of its splits.
    """
    if metadata:
        named = [pair for path in metadata for pair in metadata_rows(path, folder, others, columns, checker)]
        rest = files.difference(metadata, *(used for _, used in named))
        wrong = {os.path.normpath(folder / name) for name in checker.bad}
        unnamed = sorted(p for p in rest if p.suffix.lower() in EXTENSIONS and str(p) not in wrong)
        if unnamed:
            checker.notes.append(
                f"left out of {folder}: {len(unnamed)} pictures that no file_name of {metadata[0].name} names: "
                f"{listed(p.relative_to(folder).as_posix() for p in unnamed)}"
            )
        return [row for row, _ in named], len(rest)
    if columns.condition is not None:
        raise UserError(f"{folder} has no metadata, so no column {columns.condition!r}; name a folder of conditions.")
    rows: list[Row] = []
    used: set[Path] = set()
    texts = caption_files(files)
    tables = {p.parent: p for p in files if p.name in METADATA}  # which are read at the top, or of a split
    pictures = [p for p in files if p.suffix.lower() in EXTENSIONS]
    for path in sorted({*pictures, *(p for p in files if p.is_dir())}):
        name, beside = path.relative_to(folder).as_posix(), texts.beside(path)
        own = [path] if beside is None else [path, beside]
        used.update(own)
        if (target := next(filter(None, (leads_outside(p, folder) for p in own)), None)) is not None:
            checker.bad[name] = f"leads outside the folder, to {target}"
        elif not path.is_dir():
            try:
                text = read_text(beside) if beside is not None else None
                table = next((tables[p] for p in path.parents if p in tables), None)
                if text is None and table is not None and checker.captioning.of_none != "":
                    checker.bad[name] = (
                        f"has no caption but in {table.relative_to(folder)}, and metadata are read at the top of the "
                        f"folder that is given; give {table.parent}"
                    )
                    continue
            except OSError as error:
                checker.bad[name] = f"has a caption, {own[-1].name}, that cannot be read ({error.strerror})"
                continue
            except UnicodeDecodeError:
                checker.bad[name] = f"has a caption, {own[-1].name}, that is not UTF-8 text; save it as UTF-8"
                continue
            rows.append(Row(name, partial(read_file, path), text))
    rows = with_unread(rows, folder, files)
    if checker.captioning.of_none != "":  # else captions play no part
        checker.notes += unread_captions(rows)
    checker.notes += numbers_of(p.parent.name for p in pictures if p.parent != folder)
    return rows, len(files - used)
