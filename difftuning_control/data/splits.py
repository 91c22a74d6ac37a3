"""Splits of a data set in a local folder: which of its files are train, validation and test, as `datasets` finds them.

Files of data sets are split, in this order, by what the folder's README.md says under `configs`, by names such as
`data/train-00000-of-00001.parquet`, by the names of the folders they lie in, and by their own names; where none of
these says anything, all of them are train. Pictures are split by folders alone, and only where some are in one for
train and others in one for another split: a picture called `test 3.png` is no less a picture to tune on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from difftuning_control.errors import UserError
from difftuning_control.system.untrusted import leads_outside, read_text

TRAIN, ALL = "train", "all"
FOR_TRAINING, FOR_JUDGING = (TRAIN,), ("validation", "test", TRAIN)  # what is taken unless a split is named
WORDS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
APART = "[-._ 0-9]"  # what may stand between such a word and others in a name


def visible_files(folder: Path, pattern: str = "*") -> list[Path]:
    """Files and links anywhere below a folder, without hidden ones and what lies in hidden folders, in order."""
    return sorted(p for p in folder.rglob(pattern) if (p.is_file() or p.is_symlink()) and not is_hidden(p, folder))


def is_hidden(path: Path | PurePosixPath, folder: Path | None = None) -> bool:
    """Whether a part of a path begins with a dot, below the folder where one is given."""
    parts = path.parts if folder is None else path.relative_to(folder).parts
    return any(part.startswith(".") and part not in (".", "..") for part in parts)


def below(folder: Path, place: Path) -> Path:
    """A place in a folder, as one that begins with the folder: it may be named in full where the folder is not."""
    if "\0" in str(place):  # which no file has in its name
        return folder / place.name
    if place.is_relative_to(folder) or leads_outside(place, folder) is not None:
        return place
    return folder / os.path.relpath(os.path.realpath(place), os.path.realpath(folder))


def splits_of(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of a data set in this folder by split; of its files some may be in none.

    Raises:
        UserError: if its README.md names several configurations, and none as the default one.
    """
    names = {p.relative_to(folder).as_posix(): p for p in files}
    splits = _configured(folder, list(names)) or _by_rule(list(names))
    first = [name for name in WORDS if name in splits]
    return {split: [names[n] for n in sorted(splits[split])] for split in (*first, *sorted(splits.keys() - set(first)))}


def splits_of_pictures(folder: Path, files: Iterable[Path]) -> dict[str, list[Path]]:
    """Pictures, or what lies beside them, by the folders named after splits; nothing where they are not split."""
    splits: dict[str, list[Path]] = {}
    for path in files:
        for split in _by_folder(path.relative_to(folder).as_posix().lower()):
            splits.setdefault(split, []).append(path)
    return {split: splits[split] for split in WORDS if split in splits} if TRAIN in splits and len(splits) > 1 else {}


def is_of_split(folder: Path, picture: Path, split: str) -> bool:
    """Whether a picture of a folder whose pictures are split is of this split."""
    return split in _by_folder(picture.relative_to(folder).as_posix().lower())


def is_split_within(folder: Path, picture: Path) -> bool:
    """Whether a picture is of a split of a part of the folder, as in `cat/train/1.png`, and not of the folder."""
    parts = picture.relative_to(folder).as_posix().lower().split("/")
    return not _by_folder(f"{parts[0]}/") and bool(_by_folder("/".join(parts)))


def chosen(splits: Iterable[str], split: str | None, prefer: Sequence[str], place: object, option: str) -> str:
    """The split that is asked for, or the first of the preferred ones that is there; `all` for all of them.

    Raises:
        UserError: if it is not there.
    """
    names = list(splits)
    if split == ALL or split in names:
        return split
    if split is None and (first := next((name for name in prefer if name in names), None)) is not None:
        return first
    expected = "expected one called train" if split is None else f"none is called {split}"
    raise UserError(
        f"the data set {place} has the splits {', '.join(names)}; {expected}: choose with {option}, or all."
    )


def taken(place: object, split: str, splits: Iterable[str], left: int, option: str) -> list[str]:
    """What to say of the choice, if there was one.

    Args:
        left: files that are of no split.
    """
    others = [name for name in splits if name != split]
    if split == ALL or not (others or left):
        return []
    beside = [f"the other splits ({', '.join(others)})"] if others else []
    beside += [f"{left} files that are of no split"] if left else []
    return [f"using the split {split} of {place}, without {' and '.join(beside)}; {option} chooses"]


def _by_rule(names: list[str]) -> dict[str, list[str]]:
    """Names of files by split, by the first rule that says something of any of them."""
    for rule in (_by_shard, _by_folder, _by_name):
        splits: dict[str, list[str]] = {}
        for name in names:
            for split in rule(name):
                splits.setdefault(split, []).append(name)
        if splits:
            return splits
    return {TRAIN: names}


def _by_shard(name: str) -> list[str]:
    shard = SHARD.fullmatch(name)
    return [] if shard is None else [shard[1]]


def _by_folder(name: str) -> list[str]:
    return _splits_in(name.split("/")[:-1], f"(?:{APART}|$)")


def _by_name(name: str) -> list[str]:
    return _splits_in(name.split("/")[-1:], APART)


def _splits_in(parts: Iterable[str], after: str) -> list[str]:
    """The splits that parts of a path are named after; what may follow such a word is an expression."""
    expressions = {split: re.compile(f"(?:^|{APART})(?:{'|'.join(words)}){after}") for split, words in WORDS.items()}
    return [split for split, known in expressions.items() if any(known.search(part) for part in parts)]


# --- what a README.md says ------------------------------------------------------------------------------------------


def _configured(folder: Path, names: list[str]) -> dict[str, list[str]] | None:
    """Names of files by split as the folder's README.md has them under `configs`; None where it says nothing."""
    configs = _configs(folder)
    if not configs:
        return None
    default = [c for c in configs if c.get("default") is True or c.get("config_name", "default") == "default"]
    if len(configs) > 1 and not default:
        known = ", ".join(str(c.get("config_name")) for c in configs)
        raise UserError(
            f"the README.md of {folder} names several configurations of its files ({known}), and no default; give the "
            "folder of one, or copy its files into a folder."
        )
    config = (default or configs)[0]
    below = f"{str(config['data_dir']).strip('/')}/" if config.get("data_dir") else ""
    mine = {name.removeprefix(below): name for name in names if name.startswith(below)}
    patterns = _patterns(config.get("data_files"))
    if patterns:
        splits = {split: _matching(mine, those) for split, those in patterns.items()}
    else:
        splits = _by_rule(list(mine)) if mine else {}
    named = {split: [mine[n] for n in those] for split, those in splits.items() if those}
    return named or None


def _configs(folder: Path) -> list[dict[str, Any]]:
    import yaml  # needed for this alone

    try:
        card = read_text(folder / "README.md")
    except (OSError, UnicodeDecodeError):
        return []
    head = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    try:
        values = yaml.safe_load(head[1]) if head is not None else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return []
    configs = values.get("configs") if isinstance(values, dict) else None
    return [c for c in configs if isinstance(c, dict)] if isinstance(configs, list) else []


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Patterns by split from any of the forms that a README.md may have."""
    if isinstance(data_files, dict):
        pairs = list(data_files.items())
    elif isinstance(data_files, list) and data_files and all(isinstance(entry, dict) for entry in data_files):
        pairs = [(entry.get("split", TRAIN), entry.get("path")) for entry in data_files]
    else:
        pairs = [(TRAIN, data_files)]
    files: dict[str, list[str]] = {}
    for split, paths in pairs:
        files.setdefault(str(split), []).extend(
            map(str, paths if isinstance(paths, list) else [paths] if paths else [])
        )
    return {split: paths for split, paths in files.items() if paths}


def _matching(names: Iterable[str], patterns: list[str]) -> list[str]:
    known = [re.compile(_as_expression(pattern)) for pattern in patterns]
    return [name for name in names if any(k.fullmatch(name) for k in known)]


def _as_expression(pattern: str) -> str:
    """A pattern with *, **, ? and [ ] as a regular expression."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern.removeprefix("./"))
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(signs.get(p) or (p.replace("[!", "[^") if p.startswith("[") else re.escape(p)) for p in parts)
