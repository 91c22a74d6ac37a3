"""The folders that a page may read and write: a path is used only if it lies in one of them, links followed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from difftuning_control.data.sources import EMBEDDED_SETS, embedded_set
from difftuning_control.errors import UserError
from difftuning_control.runs.kept import STEP
from difftuning_control.runs.record import RECORD

STATE = ".difftune-ui"  # of the page, below its folder: jobs, their logs, captions as they were
EMBEDDED = tuple(f"embedded/{name}" for name in EMBEDDED_SETS)


@dataclass(frozen=True)
class Places:
    """Folders by their real paths.

    Args:
        folder: of the runs.
        pictures: further ones with pictures.
    """

    folder: Path
    pictures: tuple[Path, ...] = ()

    @classmethod
    def of(cls, folder: str | Path, pictures: Iterable[str | Path] = ()) -> Places:
        """The folders as a user names them.

        Raises:
            UserError: if one of them is no folder.
        """
        for place in (folder, *pictures):
            if not Path(place).is_dir():
                raise UserError(f"{place} is no folder; name one that is there, or make it: mkdir {place}.")
        return cls(_real(folder), tuple(_real(p) for p in pictures))

    @property
    def state(self) -> Path:
        """The page's own folder, hidden from all that lists runs and pictures."""
        return self.folder / STATE

    def writable(self, path: str | Path) -> Path:
        """The real path of something in the folders; relative ones are from the folder of the runs.

        Raises:
            UserError: if it leads elsewhere, or is hidden.
        """
        if Path(path).is_absolute() and any(_real(path).is_relative_to(s) for s in _sets()):
            raise UserError(f"{path} comes with the package, and is not changed; copy it into {self.folder}.")
        return self._inside(path, (self.folder, *self.pictures))

    def readable(self, path: str | Path) -> Path:
        """As `writable`, also in the sets that the package carries (`embedded/icons`).

        Raises:
            UserError: as there.
        """
        if str(path) in EMBEDDED:
            return _real(embedded_set(str(path).removeprefix("embedded/")))
        return self._inside(path, (self.folder, *self.pictures, *_sets()))

    def run(self, name: str) -> Path:
        """The real path of a run, or of a step that it kept, by its name in the table; a run in the page's own folder
        has that folder's name.

        Raises:
            UserError: as `writable`.
        """
        first, _, step = name.partition("/")
        is_own = first == self.folder.name and (self.folder / RECORD).is_file()
        return self.writable(self.folder / step if is_own and (not step or STEP.fullmatch(step)) else name)

    def name(self, path: Path) -> str:
        """A path as people write it: from the folder of the runs where it lies there."""
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else path.as_posix()

    def _inside(self, path: str | Path, roots: tuple[Path, ...]) -> Path:
        if "\0" in str(path):
            raise UserError("a path with a NUL is no path; name a file or a folder.")
        asked = Path(path).expanduser()
        real = _real(asked if asked.is_absolute() else self.folder / asked)
        root = next((r for r in roots if real.is_relative_to(r)), None)
        if root is None:
            raise UserError(
                f"{path} leads out of the folders of this page; name a place in {self.folder}, or start the page with "
                "--pictures for another folder of pictures."
            )
        if any(part.startswith(".") for part in real.relative_to(root).parts):
            raise UserError(f"{path} is hidden (a dot begins a part of it); name another place.")
        return real


def _sets() -> tuple[Path, ...]:
    """Those that the package carries."""
    return tuple(_real(embedded_set(name)) for name in EMBEDDED_SETS)


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))
