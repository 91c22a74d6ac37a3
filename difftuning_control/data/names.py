"""Names of files in either form of Unicode: é is one character to most systems, two on a Mac and in its archives."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from difftuning_control.system.text import composed


def in_either_form(place: Path) -> Path:
    """A place as the folder has it: each part by its own characters or else by the one entry that is composed alike."""
    if str(place).isascii() or "\0" in str(place) or place == place.parent or _exists(place):
        return place
    folder = in_either_form(place.parent)
    try:
        names = _entries(folder, folder.stat().st_mtime_ns).get(composed(place.name), [])
    except OSError:
        return place
    return folder / (names[0] if len(names) == 1 else place.name)


class FilesByStem:
    """Files that lie beside pictures under their names, each by its path without its ending."""

    def __init__(self, files: dict[Path, Path]):
        self.files, self._alike = files, dict[str, list[Path]]()
        for stem, file in files.items():
            self._alike.setdefault(composed(str(stem)), []).append(file)

    def beside(self, picture: Path) -> Path | None:
        """The file of a picture's own name, or else the one of a name that is composed alike."""
        stem = picture.with_suffix("")
        alike = self._alike.get(composed(str(stem)), [])
        return self.files.get(stem, alike[0] if len(alike) == 1 else None)


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except OSError:  # a name that is too long
        return False


@lru_cache(maxsize=8)
def _entries(folder: Path, _changed: int) -> dict[str, list[str]]:
    """The names of a folder's entries by their composed form; asked anew when the folder has changed."""
    names: dict[str, list[str]] = {}
    for entry in folder.iterdir():
        names.setdefault(composed(entry.name), []).append(entry.name)
    return names
