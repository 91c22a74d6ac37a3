"""Pictures that belong to others of the same name: conditions and masks in folders of their own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from difftuning_control.data.checker import Checker
from difftuning_control.data.examples import Row, listed
from difftuning_control.data.images import EXTENSIONS
from difftuning_control.data.splits import splits_of_pictures, visible_files
from difftuning_control.errors import UserError
from difftuning_control.system.untrusted import leads_outside, read_file


def paired(
    rows: list[Row],
    path: str,
    folder: Path,
    split: str,
    checker: Checker,
    what: Literal["condition", "mask"],
) -> tuple[list[Row], int]:
    """Each row with the picture of the same name in another folder, and how many of those have no picture.

    Args:
        path, folder: that folder, as it was given and where it lies.
        split: of the pictures; where the other folder is split too, its other splits are of no concern.
        what: they are, and the field of the row that reads them.
    """
    if not folder.is_dir():
        raise UserError(f"the folder of {what}s {path} does not exist; give one with a picture for each picture.")
    by_stem: dict[str, list[Path]] = {}
    files = [p for p in visible_files(folder) if p.suffix.lower() in EXTENSIONS]
    for file in splits_of_pictures(folder, files).get(split, files):
        if file.is_file() and leads_outside(file, folder) is None:
            by_stem.setdefault(_key(file.relative_to(folder).as_posix()), []).append(file)
    wanted = {_key(name) for name in (*(row.name for row in rows), *checker.bad)}
    extra = [file for key, files in by_stem.items() if key not in wanted for file in files]
    said = f"{len(extra)} {what}s without a picture: {listed(file.name for file in extra)}"
    if extra and not checker.skip_bad:
        raise UserError(f"{path} has {said}; take them out, or leave such files out: --data.skip_bad true.")
    if extra:
        checker.notes.append(f"left out of {path}: {said}")
    found = []
    for row in rows:
        files = by_stem.get(_key(row.name), [])
        if len(files) == 1:
            read = partial(read_file, files[0])
            found.append(replace(row, condition=read) if what == "condition" else replace(row, mask=read))
        else:
            names = " and ".join(file.name for file in files)
            checker.bad[row.name] = f"has {len(files)} {what}s, {names}" if files else f"has no {what} in {path}"
    return found, len(extra)


def _key(name: str) -> str:
    return Path(name).with_suffix("").as_posix()
