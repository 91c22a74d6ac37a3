"""Files that come with the package for users to take: one-line pipelines, recipes, and examples of the hook.

In a checkout they lie in `pipelines/` and `examples/` at its root; the build copies them into the wheel, as
`difftuning_control/shipped/` (see `setup.py`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from difftuning_control.errors import UserError

PACKAGE = Path(__file__).parents[1]
INDENT = "#   "  # of the commands in a recipe's first comment
SCRIPT = "script: "  # how the lines of a hook begin


@dataclass(frozen=True)
class Example:
    """A file that a user copies and changes.

    Args:
        name: by which it is asked for.
        path: where it lies.
    """

    name: str
    path: Path

    @property
    def about(self) -> str:
        """The first sentence of its first comment or docstring, or the script that a hook's lines are for."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        if lines[0].startswith(SCRIPT):
            return f"The hook's lines for {lines[0].removeprefix(SCRIPT)}."
        comment = takewhile(lambda line: line.startswith("#") and not line.startswith(INDENT), lines)
        text = " ".join(line.strip("# ") for line in comment) or lines[0].strip('"')
        return re.split(r"(?<=[.?]) ", text, maxsplit=1)[0]


def shipped(kind: str) -> Path:
    """The folder `pipelines` or `examples`, of the installed package or else of the checkout."""
    inside = PACKAGE / "shipped" / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind


def examples() -> list[Example]:
    """The recipes by name, then the loops and lines that use the hook, as `hooks/…`."""
    folder = shipped("examples")
    recipes = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("launch/*.yaml"))]
    hooks = [folder / "hook_into_your_loop.py", *sorted(folder.glob("hooks/*.*"))]
    named = [Example(path.stem, path) for path in recipes]
    return named + [Example(f"hooks/{path.stem}", path) for path in hooks if path.is_file()]


def example(name: str) -> Example:
    """The one of this name.

    Raises:
        UserError: with near names, if there is none.
    """
    known = {one.name: one for one in examples()}
    wanted = name.removesuffix(".yaml").removeprefix("examples/")
    if wanted not in known:
        raise UserError(f"there is no recipe {name!r}; {near(wanted, known)}; difftune recipes lists them.")
    return known[wanted]


def near(name: str, known: Iterable[str], most: int = 3) -> str:
    """`did you mean a or b?` without its mark, or what there is where nothing is near."""
    known = list(known)
    close = difflib.get_close_matches(name, known, most, 0.5)
    return f"did you mean {' or '.join(close)}" if close else f"expected one of {', '.join(known)}"
