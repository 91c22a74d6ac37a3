"""Rows of `datasets` data sets: by Hub name, or as `save_to_disk` or Parquet files left them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from difftuning_control.data.examples import Columns, Read, Row
from difftuning_control.data.images import EXTENSIONS
from difftuning_control.data.loading_faults import refuse_known
from difftuning_control.data.splits import (
    ALL,
    FOR_TRAINING,
    TRAIN,
    chosen,
    is_hidden,
    splits_of,
    taken,
    visible_files,
)
from difftuning_control.errors import UserError
from difftuning_control.recipe.captioning import Captioning
from difftuning_control.system.hub import hub_or_cache
from difftuning_control.system.untrusted import leads_outside, read_file


@dataclass(frozen=True)
class Choice:
    """Which split of a data set is wanted.

    Args:
        split: its name, or all; the first of `prefer` that is there when None.
        option: which names it on the command line.
    """

    split: str | None = None
    prefer: Sequence[str] = FOR_TRAINING
    option: str = "--data.split"


FIRST = Choice()  # train


def is_dataset(folder: Path) -> bool:
    """Whether a folder holds what `save_to_disk` left, or Parquet files, and not pictures alone."""
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))
    return saved or bool(visible_files(folder, "*.parquet"))


def local_dataset(folder: Path, choice: Choice) -> tuple[Any, list[str]]:
    """The chosen split of what `save_to_disk` left, or of Parquet files, and what is to be said of it.

    Raises:
        UserError: if it cannot be read, lies elsewhere, or has no such split.
    """
    parquet = [p for p in visible_files(folder, "*.parquet") if p.is_file()]
    refuse_outside(parquet, folder)
    if parquet:
        return _of_parquet(folder, parquet, choice)
    import datasets  # saves a second where pictures lie in a folder

    try:
        saved = datasets.load_from_disk(literal(folder)).with_format(None)  # it keeps tensors and chosen columns
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the data set {folder} cannot be read ({type(error).__name__}); save it again.") from None
    if not isinstance(saved, datasets.DatasetDict):
        chosen([TRAIN], choice.split, choice.prefer, folder, choice.option)
        return saved, []
    split = chosen(saved, choice.split, choice.prefer, folder, choice.option)
    data = datasets.concatenate_datasets(list(saved.values())) if split == ALL else saved[split]
    return data, taken(folder, split, saved, 0, choice.option)


def _of_parquet(folder: Path, files: list[Path], choice: Choice) -> tuple[Any, list[str]]:
    import datasets  # saves a second where pictures lie in a folder

    files, lines = files_of_split(folder, files, choice)
    pictures = sum(p.suffix.lower() in EXTENSIONS for p in visible_files(folder))
    if pictures:
        lines.append(f"using the Parquet files of {folder}, without the {pictures} picture files beside them")
    names = [escape(literal(file)) for file in files]
    try:
        return datasets.load_dataset("parquet", data_files={TRAIN: names}, split=TRAIN), lines
    except Exception as error:
        refuse_known(folder, error)
        raise UserError(f"the data set {folder} cannot be read ({type(error).__name__}); save it again.") from None


def files_of_split(folder: Path, files: list[Path], choice: Choice) -> tuple[list[Path], list[str]]:
    """Those of a data set's files that are of the chosen split, and what is to be said of that."""
    splits = splits_of(folder, files)
    split = chosen(splits, choice.split, choice.prefer, folder, choice.option)
    if split == ALL:
        return files, []
    left = set(files).difference(*splits.values())
    return splits[split], taken(folder, split, splits, len(left), choice.option)


def refuse_outside(files: list[Path], folder: Path) -> None:
    """Refuse files of a data set that are links to elsewhere.

    Raises:
        UserError: naming the first of them.
    """
    for file in files:
        if (target := leads_outside(file, folder)) is not None:
            raise UserError(f"{file} leads outside the folder, to {target}; copy it into the folder.")


def literal(path: Path) -> str:
    """A path as `datasets` takes it.

    Raises:
        UserError: if it has a sign in it that would make another file of it.
    """
    if "::" in str(path):
        raise UserError(f"{path} has :: in its name, which stands for a file within an archive; rename it.")
    return str(path)


def named_dataset_rows(
    name: str, columns: Columns, captioning: Captioning, choice: Choice, notes: list[str]
) -> list[Row]:
    """Rows of a split of a `datasets` data set, by Hub name; `notes` gets lines to be shown."""
    import datasets  # saves a second where pictures lie in a folder

    try:
        split = choice.split or TRAIN
        with hub_or_cache(name):
            if choice.split is None and len(choice.prefer) > 1:
                split = chosen(datasets.get_dataset_split_names(name), None, choice.prefer, name, choice.option)
            data = datasets.load_dataset(name, split=split)
    except UserError:
        raise
    except Exception as error:
        refuse_known(name, error)
        unknown = isinstance(error, ValueError) and "split" in str(error)
        reason = f"no split {split}" if unknown else type(error).__name__
        raise UserError(
            f"{name} is no folder here and cannot be loaded as a data set ({reason}); "
            "give a folder of pictures, or a data set that this machine can reach."
        ) from None
    from huggingface_hub.constants import HF_HUB_CACHE  # as datasets, which imports it

    cached = [Path(HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE)]
    return dataset_rows(data, columns, captioning, cached, notes)


def dataset_rows(
    data: Any,
    columns: Columns,
    captioning: Captioning,
    within: Sequence[Path],
    notes: list[str],
    folder: Path | None = None,
) -> list[Row]:
    """Rows of a `datasets.Dataset` with an `Image` column, a caption column and perhaps a column of conditions.

    Args:
        within: folders in which files that are named instead of held must lie, the first for relative names.
        notes: gets lines to be shown.
        folder: that the data set lies in, of which pictures beside it may be meant.
    """
    import datasets  # saves a second where pictures lie in a folder

    others = (columns.image, columns.condition or "", "label")
    lacks = captioning.finds_none(data.column_names, [columns.caption], others)
    notes += captioning.hidden_by_default("the data set", data.column_names, [columns.caption], others)
    wanted = {columns.image: True, columns.caption: lacks}
    if columns.condition is not None:
        wanted[columns.condition] = True
    missing = [c for c, needed in wanted.items() if needed and c not in data.column_names]
    if missing:
        there = ", ".join(data.column_names)
        beside = _of_pictures_beside(folder) if folder is not None and missing[0] == columns.image else ""
        raise UserError(
            f"the data set has no column {missing[0]!r}, only {there}; name it with --data.image_column, "
            f"--data.caption_column or --control.column{beside}."
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


def _of_pictures_beside(folder: Path) -> str:
    """For the end of a sentence about Parquet files that are no pictures: that there are some beside them."""
    count = sum(p.suffix.lower() in EXTENSIONS for p in visible_files(folder))
    if not count or not visible_files(folder, "*.parquet"):
        return ""
    return f", or take the Parquet files out of {folder} so that the {count} picture files beside them are read"


def _reader(data: Any, column: str, within: Sequence[Path]) -> Callable[[int], Read]:
    """Gives for a row's number what reads the bytes of its picture."""
    import datasets  # saves a second where pictures lie in a folder

    try:
        raw = data.select_columns([column]).cast_column(column, datasets.Image(decode=False))  # reading decodes a row
    except Exception:  # pyarrow's, of several kinds
        raise UserError(
            f"the column {column!r} of the data set holds no pictures; name another with --data.image_column or "
            "--control.column."
        ) from None

    def content(i: int) -> Read:
        def read(most: int) -> bytes:
            return bytes_of(raw[i][column], within, most)

        return read

    return content


def bytes_of(cell: dict[str, Any] | None, within: Sequence[Path], most: int) -> bytes:
    """The content of the picture that a cell holds or names.

    Args:
        within: see `dataset_rows`.

    Raises:
        UserError: if it has none, or names a hidden file or one outside these folders.
    """
    cell = cell or {}
    if cell.get("bytes") is not None:
        return cell["bytes"]
    if cell.get("path") is None:
        raise UserError("has no picture")
    path = within[0] / cell["path"]
    if path.is_relative_to(within[0]) and is_hidden(path, within[0]):
        raise UserError(f"names a hidden picture, {path.name}; give it a name without a dot in front")
    if all(leads_outside(path, folder) is not None for folder in within):
        raise UserError(f"names a picture outside the data set, {path}")
    return read_file(path, most)
