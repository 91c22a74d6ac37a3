"""Captions edited in place: written whole or not at all, with a journal from which each edit can be taken back."""

from __future__ import annotations

import csv
import io
import json
import os
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any

from filelock import FileLock

from difftuning_control.data.caption_files import caption_files
from difftuning_control.data.metadata import METADATA, csv_rows, metadata_of
from difftuning_control.data.splits import visible_files
from difftuning_control.errors import UserError
from difftuning_control.system.durable import beside
from difftuning_control.system.text import composed
from difftuning_control.system.untrusted import from_json, is_text, read_text
from difftuning_control.verbs.ui.places import Places

JOURNAL = "captions.jsonl"
COLUMN = "text"
MOST = 4000  # characters of a caption


class LostEditError(UserError):
    """An edit that cannot be made or taken back any more: its picture or its row is gone, or its caption was changed
    since."""


def caption_of(folder: Path, name: str) -> str | None:
    """The caption of a picture as it is on disk; None where it has none.

    Raises:
        UserError: if the file with it cannot be read.
        LostEditError: if its table has no row for the picture.
    """
    table = _table_of(folder, name)
    try:
        if table is None:
            path = _file_of(folder / name)
            return read_text(path).strip() if path.exists() else None
        rows = _rows(table)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"the caption of {name} cannot be read ({error}).") from None
    row = next((row for row in rows if _is_of(row, table, folder / name)), None)
    if row is None:
        raise LostEditError(f"{table.relative_to(folder)} has no row for {name}; add one with a text editor.")
    caption = row.get(COLUMN)
    return caption.strip() if isinstance(caption, str) else None


def edit_caption(places: Places, folder: Path, name: str, before: str | None, after: str) -> None:
    """Write a caption beside its picture, or into the folder's metadata; nothing where but white space differs.

    Args:
        before: as the page showed it; one that was changed since is not written over.

    Raises:
        UserError: if it was changed since, is too long, or lies where this page may not write.
    """
    after = " ".join(after.split())
    if not is_text(after) or len(after) > MOST:
        raise UserError(f"the caption has {len(after)} characters; expected at most {MOST} of Unicode text.")
    if after == " ".join((before or "").split()):
        return
    with _alone(places):
        _write(places, folder, name, before, after)
        entry = {"folder": str(folder), "name": name, "before": before, "after": after}
        with (places.state / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(entry) + "\n")


def has_edits(places: Places) -> bool:
    """Whether there is an edit to take back."""
    path = places.state / JOURNAL
    return path.is_file() and path.stat().st_size > 0


def undo_caption(places: Places) -> tuple[Path, str, list[str]]:
    """Take the last edit back that can be; returns the folder, the picture's name, and why later ones were given up.

    Raises:
        UserError: if there is none, or none of them can be taken back.
    """
    with _alone(places):
        path, given_up = places.state / JOURNAL, list[str]()
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        while lines:
            done = _taken_back(places, lines.pop(), given_up)
            with beside(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            if done is not None:
                return *done, given_up
        raise UserError(" ".join([*given_up, "No other is left."]) if given_up else "there is no edit to take back.")


def _taken_back(places: Places, line: str, given_up: list[str]) -> tuple[Path, str] | None:
    """The folder and the picture of an edit that was taken back; None, with the reason noted, where it cannot be."""
    try:
        entry = json.loads(line)
        folder, name = Path(entry["folder"]), entry["name"]
        _write(places, folder, name, entry["after"], entry["before"])
        return folder, name
    except LostEditError as error:
        given_up.append(str(error))
    except UserError:  # a ValueError too: of a disk, or a folder, that may come back
        raise
    except (ValueError, KeyError, TypeError):  # half written, as where the power went
        given_up.append("a line of the journal cannot be read.")
    return None


def _alone(places: Places) -> FileLock:
    places.state.mkdir(exist_ok=True)
    return FileLock(places.state / ".captions.lock")


def _write(places: Places, folder: Path, name: str, before: str | None, after: str | None) -> None:
    """Write a caption, or take its file away where `after` is None."""
    if not places.readable(folder / name).is_file():
        gone = LostEditError if folder.is_dir() else UserError  # a disk that is not there may come back
        raise gone(f"there is no picture {name} in {folder}; look at the folder again.")
    table = _table_of(folder, name)
    path = places.writable(table if table is not None else _file_of(folder / name))
    if (caption_of(folder, name) or "") != (before or ""):
        raise LostEditError(f"the caption of {name} was changed since by somebody else; look at the folder again.")
    if table is None and after is None:
        path.unlink(missing_ok=True)
        return
    text = after or "" if table is None else _with_row(table, folder / name, after)
    marked = path.exists() and path.read_bytes().startswith(BOM_UTF8)  # without it Excel takes it for another encoding
    with beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8-sig" if marked else "utf-8", newline="")


def _file_of(picture: Path) -> Path:
    """Where a picture's caption lies, or is written to."""
    return caption_files(picture.parent.iterdir()).beside(picture) or picture.with_suffix(".txt")


def _table_of(folder: Path, name: str) -> Path | None:
    """The metadata that a picture is described in: the folder's, or those of its split's own folder."""
    top = next((folder / table for table in METADATA if (folder / table).exists()), None)
    if top is not None:
        return top
    tables = {table.parent: table for table in metadata_of(folder, set(visible_files(folder)))}
    return next((tables[parent] for parent in (folder / name).parents if parent in tables), None)


def _rows(table: Path) -> list[dict[str, Any]]:
    text = read_text(table)
    if table.suffix == ".csv":
        return csv_rows(text)
    return [from_json(line) for line in text.split("\n") if line.strip()]


def _is_of(row: Any, table: Path, picture: Path) -> bool:
    """Whether a row of a table is of a picture, whichever form of Unicode either has."""
    named = table.parent / str(row.get("file_name")) if isinstance(row, dict) else table
    return composed(os.path.normpath(named)) == composed(os.path.normpath(picture))


def _with_row(table: Path, picture: Path, caption: str | None) -> str:
    """The metadata with another caption in one row; the others stay as they are."""
    if table.suffix == ".csv":
        rows, written = _rows(table), io.StringIO()
        writer = csv.DictWriter(written, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | {COLUMN: caption} if _is_of(row, table, picture) else row for row in rows)
        return written.getvalue()
    lines = []
    for line in read_text(table).split("\n"):
        row = from_json(line) if line.strip() else {}
        lines.append(json.dumps(row | {COLUMN: caption}, ensure_ascii=False) if _is_of(row, table, picture) else line)
    return "\n".join(lines)
