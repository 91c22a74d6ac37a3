"""Pictures that belong to others of the same name: conditions and masks, in folders of their own or beside them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from difftuning_control.data.checker import Checker
from difftuning_control.data.examples import Row, listed
from difftuning_control.data.images import EXTENSIONS, UNREAD
from difftuning_control.data.splits import below, splits_of_pictures, visible_files
from difftuning_control.errors import UserError
from difftuning_control.system.text import composed
from difftuning_control.system.untrusted import leads_outside, read_file

LABELS = ("-masklabel", "-condlabel")  # ends of the names of OneTrainer's masks and conditions


def without_labels(path: str, folder: Path, files: set[Path], checker: Checker) -> set[Path]:
    """Files without the masks and conditions that OneTrainer keeps beside their pictures, which a note names.

    Args:
        path, folder: as it was given and where it lies.
    """
    stems = {p.with_suffix("") for p in files if p.suffix.lower() in EXTENSIONS | UNREAD.keys()}
    labels = [
        p
        for p in sorted(files)
        if p.suffix.lower() in EXTENSIONS
        and (end := next((e for e in LABELS if p.stem.lower().endswith(e)), None)) is not None
        and len(p.stem) > len(end)
        and p.with_name(p.stem[: -len(end)]) in stems
    ]
    if labels:
        names = listed(p.relative_to(folder).as_posix() for p in labels)
        checker.notes.append(
            f"left out of {path}: {names}; masks and conditions are not read beside their pictures, but from a folder "
            "of their own (--masks, --control.path)"
        )
    return files.difference(labels)


def inside(folder: Path, places: Iterable[Path]) -> list[Path]:
    """Those places that lie in a folder, or that a link in it leads to, however they are named, as paths that begin
    with it."""
    root, named = Path(os.path.abspath(folder)), [Path(os.path.abspath(place)) for place in places]
    found = {folder / place.relative_to(root): None for place in named if place.is_relative_to(root)}
    found |= {below(folder, Path(os.path.realpath(place))): None for place in places}
    return [place for place in found if folder in place.parents]


def paired(
    rows: list[Row],
    home: Path,
    path: str,
    folder: Path,
    split: str,
    checker: Checker,
    what: Literal["condition", "mask"],
) -> tuple[list[Row], int]:
    """Each row with the picture of the same name in another folder, and how many of those have no picture.

    Args:
        home: folder of the rows' pictures.
        path, folder: the other, as it was given and where it lies.
        split: of the pictures; where the other folder is split too, its other splits are of no concern.
        what: they are, and the field of the row that reads them.
    """
    if not folder.is_dir():
        raise UserError(f"the folder of {what}s {path} does not exist; give one with a picture for each picture.")
    by_stem: dict[str, list[Path]] = {}
    files = [p for p in visible_files(folder) if p.suffix.lower() in EXTENSIONS]
    for file in splits_of_pictures(folder, files).get(split, files):
        if file.is_file():
            by_stem.setdefault(_key(folder, file.relative_to(folder)), []).append(file)
    there = {_key(home, file.relative_to(home)) for file in visible_files(home)}  # some may be left out
    there.update(_key(home, name) for name in (*(row.name for row in rows), *checker.bad))
    extra = [file for key, files in by_stem.items() if key not in there for file in files]
    said = f"{len(extra)} {what}{'' if len(extra) == 1 else 's'} without a picture of the same name: "
    said += listed(file.name for file in extra)
    if extra and not checker.skip_bad:
        raise UserError(f"{path} has {said}; take them out, or leave such files out: --data.skip_bad true.")
    if extra:
        checker.notes.append(f"left out of {path}: {said}")
    found = []
    for row in rows:
        files = by_stem.get(_key(home, row.name), [])
        if len(files) != 1:
            names = " and ".join(file.name for file in files)
            checker.bad[row.name] = f"has {len(files)} {what}s, {names}" if files else f"has no {what} in {path}"
        elif (target := leads_outside(files[0], folder)) is not None:
            checker.bad[row.name] = f"has a {what} that leads outside its folder, to {target}"
        else:
            read = partial(read_file, files[0])
            found.append(replace(row, condition=read) if what == "condition" else replace(row, mask=read))
    return found, len(extra)


def _key(folder: Path, name: str | Path) -> str:
    """The way to a picture from its folder, without the ending of its name, in composed form."""
    return composed(Path(os.path.relpath(folder / name, folder)).with_suffix("").as_posix())
