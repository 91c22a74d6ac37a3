"""Rows of `datasets` data sets: by Hub name, as `save_to_disk` or Parquet files left them, or in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from difftuning_control.data.examples import Checker, Columns, ImageData, Read, Row
from difftuning_control.errors import UserError
from difftuning_control.system.untrusted import leads_outside, read_file


def local_dataset(folder: Path) -> Any:
    """What `save_to_disk` left, or the rows of Parquet files; None for a folder of pictures."""
    parquet = sorted(str(p) for p in folder.rglob("*.parquet") if p.is_file())
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))
    if not parquet and not saved:
        return None
    for file in parquet:
        if (target := leads_outside(Path(file), folder)) is not None:
            raise UserError(f"{file} leads outside the folder, to {target}; copy it into the folder.")
    import datasets  # saves a second where pictures lie in a folder

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


def named_dataset_rows(name: str, columns: Columns, need_captions: bool) -> list[Row]:
    """Rows of the train split of a `datasets` data set, by Hub name."""
    import datasets  # saves a second where pictures lie in a folder

    try:
        data = datasets.load_dataset(name, split="train")
    except Exception as error:
        raise UserError(
            f"{name} is no folder here and cannot be loaded as a data set ({type(error).__name__}); "
            "give a folder of pictures, or a data set that this machine can reach."
        ) from None
    from huggingface_hub.constants import HF_HUB_CACHE  # as datasets, which imports it

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
    import datasets  # saves a second where pictures lie in a folder

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
    import datasets  # saves a second where pictures lie in a folder

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
            if within is not None and all(leads_outside(path, folder) is not None for folder in within):
                raise UserError(f"names a picture outside the data set, {path}")
            return read_file(path, most)

        return read

    return content


def images_from_dataset(
    data: Any, *, image_column: str = "image", caption_column: str = "text", skip_bad: bool = False
) -> ImageData:
    """Examples of a `datasets.Dataset` object that is already in memory."""
    checker = Checker(skip_bad, None)
    return checker.data("the data set", dataset_rows(data, Columns(image_column, caption_column)))
