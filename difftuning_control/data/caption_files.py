"""Caption files beside pictures: which of them are read, and which are not and look as if they held captions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from difftuning_control.data.examples import Row, listed
from difftuning_control.data.names import FilesByStem
from difftuning_control.system.untrusted import read_text

CAPTIONS = (".caption", ".txt")  # the latter where both have words


def caption_files(files: Iterable[Path]) -> FilesByStem:
    """Files with captions, which lie beside their pictures."""
    known, found = sorted(files), dict[Path, Path]()
    for path in (p for end in CAPTIONS for p in known if p.suffix.lower() == end):
        if path.with_suffix("") not in found or _has_words(path):
            found[path.with_suffix("")] = path
    return FilesByStem(found)


def _has_words(path: Path) -> bool:
    """Whether a file holds more than blanks; one that is no text is to be refused, and so is not passed over."""
    try:
        return bool(read_text(path).strip())
    except UnicodeDecodeError:
        return True
    except OSError:
        return path.is_file()


def with_unread(rows: Iterable[Row], folder: Path, files: set[Path]) -> list[Row]:
    """Rows, of which those without words name the file beside them that seems to hold some: `a.json`, `a.png.txt`."""
    return [replace(row, unread=_unread(folder / row.name, files)) if row.is_bare else row for row in rows]


def _unread(picture: Path, files: set[Path]) -> str | None:
    ends = (".json", *CAPTIONS)
    alike = [picture.with_suffix(".json"), *(picture.with_name(picture.name + end) for end in ends)]
    return next((path.name for path in alike if path in files), None)


def unread_captions(rows: Iterable[Row]) -> list[str]:
    """What to say of such files."""
    found = {str(PurePosixPath(row.name).with_name(row.unread)): row.name for row in rows if row.unread is not None}
    if not found:
        return []
    wanted = PurePosixPath(next(iter(found.values()))).with_suffix(".txt")
    return [f"captions in {listed(found)} are not read; write each into a .txt beside its picture, such as {wanted}"]
