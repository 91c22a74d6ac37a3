"""Paths as a person writes them: those that begin with `~`, and what is a path rather than a name on the Hub."""

from __future__ import annotations

import os
from typing import Any

from difftuning_control.errors import UserError


def at_home(path: str) -> str:
    """The path with the home folder for a `~` in front; any other path as it is.

    Raises:
        UserError: if there is no such user.
    """
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"the path {path} begins with ~, and there is no such user; write ./{path} if that is a name.")
    return expanded


def is_path(text: str) -> bool:
    """Whether a text that names no folder can only be meant as a path: what is on the Hub is called `user/name`."""
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text or text[1:2] == ":"


def expand_paths(values: Any, *names: str) -> None:
    """Put the home folder for a `~` in front of these fields of a dataclass: paths, lists of paths or None."""
    for name in names:
        value = getattr(values, name)
        if isinstance(value, list):
            object.__setattr__(values, name, [at_home(path) for path in value])  # some are frozen
        elif value is not None:
            object.__setattr__(values, name, at_home(value))
