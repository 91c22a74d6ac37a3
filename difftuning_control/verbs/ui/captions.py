"""Captions edited in place: written whole or not at all, with a journal from which each edit can be taken back."""

from __future__ import annotations

import csv
import io
import json
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any

from filelock import FileLock

from difftuning_control.data.metadata import METADATA, csv_rows
from difftuning_control.data.sources import caption_files
from difftuning_control.errors import UserError
from difftuning_control.system.durable import beside
from difftuning_control.system.text import composed
from difftuning_control.system.untrusted import from_json, is_text, read_text
from difftuning_control.verbs.ui.places import Places

JOURNAL = "captions.jsonl"
COLUMN = "text"
MOST = 4000  # characters of a caption


def caption_of(folder: Path, name: str) -> str | None:
    """The caption of a picture as it is on disk; None where it has none.

    Raises:
        UserError: if the file with it cannot be read.
    """
    table = _table_of(folder)
    try:
        if table is None:
            path = _file_of(folder / name)
            return read_text(path).strip() if path.exists() else None
        rows = _rows(table)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"the caption of {name} cannot be read ({error}).") from None
    row = next((row for row in rows if _is_of(row, name)), None)
    if row is None:
        raise UserError(f"{table.name} has no row for {name}; add one with a text editor.")
    caption = row.get(COLUMN)
    return caption.strip() if isinstance(caption, str) else None


def edit_caption(places: Places, folder: Path, name: str, before: str | None, after: str) -> None:
    """Write a caption beside its picture, or into the folder's metadata.

    Args:
        before: as the page showed it; one that was changed since is not written over.

    Raises:
        UserError: if it was changed since, is too long, or lies where this page may not write.
    """
    after = " ".join(after.split())
    if not is_text(after) or len(after) > MOST:
        raise UserError(f"the caption has {len(after)} characters; expected at most {MOST} of Unicode text.")
    with _alone(places):
        _write(places, folder, name, before, after)
        entry = {"folder": str(folder), "name": name, "before": before, "after": after}
        with (places.state / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(entry) + "\n")


def has_edits(places: Places) -> bool:
    """Whether there is an edit to take back."""
    path = places.state / JOURNAL
    return path.is_file() and path.stat().st_size > 0


def undo_caption(places: Places) -> tuple[Path, str]:
    """Take the last edit back; returns the folder and the picture's name.

    Raises:
        UserError: if there is none, or the caption was changed since.
    """
    with _alone(places):
        path = places.state / JOURNAL
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if not lines:
            raise UserError("there is no edit to take back.")
        entry = json.loads(lines[-1])
        _write(places, Path(entry["folder"]), entry["name"], entry["after"], entry["before"])
        with beside(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines[:-1]), encoding="utf-8")
        return Path(entry["folder"]), entry["name"]


def _alone(places: Places) -> FileLock:
    places.state.mkdir(exist_ok=True)
    return FileLock(places.state / ".captions.lock")


def _write(places: Places, folder: Path, name: str, before: str | None, after: str | None) -> None:
    """Write a caption, or take its file away where `after` is None."""
    if not places.readable(folder / name).is_file():
        raise UserError(f"there is no picture {name} in {folder}; look at the folder again.")
    table = _table_of(folder)
    path = places.writable(table if table is not None else _file_of(folder / name))
    if (caption_of(folder, name) or "") != (before or ""):
        raise UserError(f"the caption of {name} was changed since by somebody else; look at the folder again.")
    if table is None and after is None:
        path.unlink(missing_ok=True)
        return
    text = after or "" if table is None else _with_row(table, name, after)
    marked = path.exists() and path.read_bytes().startswith(BOM_UTF8)  # without it Excel takes it for another encoding
    with beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8-sig" if marked else "utf-8", newline="")


def _file_of(picture: Path) -> Path:
    """Where a picture's caption lies, or is written to."""
    return caption_files(picture.parent.iterdir()).beside(picture) or picture.with_suffix(".txt")


def _table_of(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).exists()), None)


def _rows(table: Path) -> list[dict[str, Any]]:
    text = read_text(table)
    if table.suffix == ".csv":
        return csv_rows(text)
    return [from_json(line) for line in text.split("\n") if line.strip()]


def _is_of(row: Any, name: str) -> bool:
    """Whether a row is of a picture, whichever form of Unicode either has."""
    return isinstance(row, dict) and composed(str(row.get("file_name"))) == composed(name)


def _with_row(table: Path, name: str, caption: str | None) -> str:
    """The metadata with another caption in one row; the others stay as they are."""
    if table.suffix == ".csv":
        rows, written = _rows(table), io.StringIO()
        writer = csv.DictWriter(written, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | {COLUMN: caption} if _is_of(row, name) else row for row in rows)
        return written.getvalue()
    lines = []
    for line in read_text(table).split("\n"):
        row = from_json(line) if line.strip() else {}
        lines.append(json.dumps(row | {COLUMN: caption}, ensure_ascii=False) if _is_of(row, name) else line)
    return "\n".join(lines)
