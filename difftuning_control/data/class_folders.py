"""Class folders: sub-folders of pictures whose names are the captions of what lies in them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from difftuning_control.data.checker import Checker
from difftuning_control.data.examples import Row, listed
from difftuning_control.data.images import EXTENSIONS
from difftuning_control.data.metadata import METADATA
from difftuning_control.data.splits import is_split_within
from difftuning_control.errors import UserError
from difftuning_control.system.untrusted import leads_outside, read_file

REPEATS = re.compile(r"\d+_")  # kohya's folders are called so


def numbers_of(folders: Iterable[str]) -> list[str]:
    """What to say of folders whose names begin with kohya's numbers of repeats."""
    numbered = sorted(name for name in set(folders) if REPEATS.match(name))
    return [f"the numbers of {listed(numbered)}, repeats to other trainers, play no part"] if numbered else []


def class_rows(
    path: str, folder: Path, files: set[Path], apart: list[Path], is_split: bool, checker: Checker
) -> tuple[list[Row], int]:
    """Pictures of class folders, one level deep or below a split's folder, and how many other files there are.

    Where all class folders have kohya's numbers (`10_dog`), which are part of the classes' names, that is said.

    Args:
        files: those of the chosen split.
        apart: folders of other pictures in this one.
        is_split: whether there are several splits.

    Raises:
        UserError: if there are metadata too, or a class folder has no picture.
    """
    if (metadata := next((n for n in METADATA if (folder / n).exists()), None)) is not None:
        raise UserError(
            f"{path} has {metadata}, but data.classes is folders; name classes in one place "
            "(--data.classes label reads its column label)."
        )
    pictures = sorted(p for p in files if p.suffix.lower() in EXTENSIONS)
    rows: list[Row] = []
    depth = 1 if is_split else 0
    for picture in pictures:
        name, parts = picture.relative_to(folder).as_posix(), picture.relative_to(folder).parts[depth:]
        if (target := leads_outside(picture, folder)) is not None:
            checker.bad[name] = f"leads outside the folder, to {target}"
        elif len(parts) != 2 or (is_split and is_split_within(folder, picture)):
            where = "lies in no class folder" if len(parts) < 2 else "lies deeper than its class folder"
            checker.bad[name] = f"{where}; expected {folder.name}{'/train' if is_split else ''}/class/picture"
        else:
            rows.append(Row(name, partial(read_file, picture), parts[0]))
    named = {row.caption for row in rows}
    _check_empty(path, folder, pictures, named, apart, is_split, checker)
    if named and all(REPEATS.match(name) for name in named):
        checker.notes.append(
            f"the numbers of {listed(sorted(named))} are part of the classes' names; where they are repeats to another "
            "trainer, rename the folders"
        )
    return rows, len(files) - len(pictures)


def _check_empty(
    path: str,
    folder: Path,
    pictures: list[Path],
    named: set[str],
    apart: list[Path],
    is_split: bool,
    checker: Checker,
) -> None:
    """Refuse class folders without a picture, or leave them out and say so."""
    tops = {p.relative_to(folder).parts[0] for p in pictures if p.parent != folder}
    roots = [folder / top for top in tops] if is_split else [folder]
    below = {p for r in roots for p in r.iterdir() if p.is_dir() and not p.name.startswith(".")}
    subfolders = sorted(p.name for p in below.difference(*([other, *other.parents] for other in apart)))
    empty = [name for name in subfolders if name not in named]
    if empty and checker.skip_bad:
        checker.notes.append(f"left out of {path}: {len(empty)} class folders without a picture: {listed(empty)}")
    elif empty and not checker.bad:
        more = f" (nor has {listed(empty[1:])})" if len(empty) > 1 else ""
        raise UserError(
            f"the class folder {empty[0]} in {path} has no picture{more}; add some, take it out, or leave such ones "
            "out: --data.skip_bad true."
        )
