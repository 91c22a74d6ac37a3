"""The metadata of a folder of pictures: `metadata.jsonl` or `metadata.csv`, which name each picture and its caption."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from difftuning_control.data.checker import CONDITION, Checker
from difftuning_control.data.examples import Columns, Row
from difftuning_control.data.names import in_either_form
from difftuning_control.data.splits import below, is_hidden, splits_of_pictures, visible_files
from difftuning_control.errors import UserError
from difftuning_control.system.untrusted import from_json, leads_outside, read_file, read_text

METADATA = ("metadata.jsonl", "metadata.csv")


def metadata_of(folder: Path, files: set[Path]) -> list[Path]:
    """The metadata of a folder, or those of its split's own folders.

    Raises:
        UserError: if one of them has two kinds.
    """
    tables = [p for n in METADATA if (p := folder / n).exists()]
    if not tables:
        beside = sorted(p for p in files if p.name in METADATA)
        tables = beside if splits_of_pictures(folder, visible_files(folder)) else []
    if len({p.parent for p in tables}) < len(tables):
        raise UserError(f"{tables[0].parent} has both metadata.jsonl and metadata.csv; keep one.")
    return tables


def csv_rows(text: str) -> list[dict[str, Any]]:
    """The rows of a table.

    Raises:
        ValueError or csv.Error: where it is none, as where a comma in a caption is not quoted.
    """
    table = csv.DictReader(io.StringIO(text), strict=True)  # or a quote that is not closed takes in all that follows
    heads = list(table.fieldnames or ())
    if twice := next((head for head in heads if head and heads.count(head) > 1), None):
        raise ValueError(f"the column {twice!r} stands twice")
    rows = []
    for row in table:
        beyond: Any = row.pop(None, ())  # what csv calls values without a head
        if any(beyond):  # empty ones, as spreadsheets write them, are none
            raise ValueError(
                f"line {table.line_num} has {len(heads) + len(beyond)} values for {len(heads)} columns; put those "
                "with a comma in quotes"
            )
        if any(row.values()):  # spreadsheets write empty rows at the end
            rows.append(row)
    return rows


def _json_rows(text: str) -> list[Any]:
    """The values of the lines; a ValueError with the number of the first that has none."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [from_json(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number}: {str(error).replace('line 1 column', 'column')}") from None
    return rows


def metadata_rows(
    path: Path, folder: Path, others: set[Path], names: Columns, checker: Checker
) -> Iterable[tuple[Row, set[Path]]]:
    """Each row of a metadata file, and the files that it uses.

    Args:
        folder: of all the data, of which the file may describe a part.
        others: files of other splits, whose rows are passed over.
    """
    if (target := leads_outside(path, folder)) is not None:
        raise UserError(f"{path} leads outside the folder, to {target}; copy it into the folder.")
    try:
        rows = csv_rows(read_text(path)) if path.suffix == ".csv" else _json_rows(read_text(path))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8.") from None
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read: {str(error).partition('; use sys')[0]}; expected one JSON object a line, or CSV."
        ) from None
    if (other := next((i for i, row in enumerate(rows, 1) if not isinstance(row, dict)), None)) is not None:
        raise UserError(
            f"{path} needs a file_name in every row, and row {other} is a {type(rows[other - 1]).__name__}; expected "
            "one JSON object a line."
        )
    columns = sorted({key for row in rows for key in row if key})
    bare = next((i for i, row in enumerate(rows, 1) if not row.get("file_name")), None)
    if not rows or bare is not None:
        which = f"row {bare} has none, of" if "file_name" in columns else "found"
        raise UserError(f"{path} needs a file_name in every row; {which} the columns {', '.join(columns) or 'none'}.")
    if checker.captioning.finds_none(columns, [names.caption], ["file_name", names.condition or ""]):
        raise UserError(
            f"{path} has no column {names.caption!r}, only {', '.join(columns)}; name it with --data.caption_column."
        )
    beside = ["file_name", names.condition or "", "label"]
    checker.notes += checker.captioning.hidden_by_default(path, columns, [names.caption], beside)
    if names.condition is not None and names.condition not in columns:
        raise UserError(
            f"{path} has no column {names.condition!r}, only {', '.join(columns)}; name it with --control.column."
        )
    for number, row in enumerate(rows, 1):
        file_name = row["file_name"]
        if not isinstance(file_name, str):
            checker.bad[f"row {number}"] = f"has a {type(file_name).__name__} for a file_name; expected text"
            continue
        wanted = {"": file_name}
        if names.condition is not None:
            wanted[CONDITION] = str(row.get(names.condition) or "")
        if halved := [what for what, place in wanted.items() if not _can_be_named(place)]:
            shown = file_name.encode("utf-8", "backslashreplace").decode()
            checker.bad[shown] = f"{halved[0]}is named by {path.name} but does not exist"
            continue
        used = {"": in_either_form(below(folder, path.parent / file_name))}
        is_above = path.parent == folder or not used[""].is_relative_to(folder)
        name = file_name if is_above else used[""].relative_to(folder).as_posix()
        if Path(os.path.normpath(used[""])) in others:
            continue
        if names.condition is not None:
            used[CONDITION] = in_either_form(below(folder, path.parent / wanted[CONDITION]))
        for what, file in used.items():
            if leads_outside(file, folder) is not None:
                checker.bad[name] = f"{what}is named by {path.name} but lies outside the folder"
            elif not _is_file(file):
                checker.bad[name] = f"{what}is named by {path.name} but does not exist"
            elif is_hidden(file, folder):
                checker.bad[name] = f"{what}is named by {path.name} but is hidden (a dot begins its path)"
        if name not in checker.bad:
            picture, *condition = (partial(read_file, file) for file in used.values())
            yield (
                Row(name, picture, names.caption_of(row.get(names.caption)), next(iter(condition), None)),
                {Path(os.path.normpath(file)) for file in used.values()},
            )


def _can_be_named(name: str) -> bool:
    """Whether a file can be called so: half a character is no name; bytes that are no UTF-8 (`\\udc80` on) are one."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a NUL
        return False
