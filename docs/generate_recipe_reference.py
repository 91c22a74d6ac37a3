"""docs/recipe.md, written from the dataclasses of a recipe: `make recipe-reference`.

A key's type and default are those of its field. Its sentence, its unit and its range are its entry in the docstring:

    resolution: side of the square that pictures are cropped to; the model's own when empty. [pixels, ≥ 8]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from difftuning_control.recipe.recipe import Recipe  # noqa: E402 the checkout's own
from difftuning_control.recipe.studies import AnalysisConfig, PilotConfig  # noqa: E402

PAGE = ROOT / "docs" / "recipe.md"
ENTRY = re.compile(r"^    (\w+): (.*(?:\n     +\S.*)*)", re.MULTILINE)
BRACKETS = re.compile(r"\s*\[([^\[\]]+)\]$")
INTRODUCTION = """\
# Recipe

<!-- Written by `make recipe-reference` from the docstrings in difftuning_control/recipe: change those instead. -->

A recipe is a YAML file with the sections below. Every key is also a flag: `--training.max_steps 400` overrides the
recipe's value, and flags alone suffice. A key that is left out has its default. `null` leaves a key empty.

```yaml
model: {id: embedded}
data: {path: embedded/icons}
training: {max_steps: 300, learning_rate: 1.0e-3}
output: runs/icons
```

An unknown key, a value of another type and one out of its range are refused before anything starts. Numbers are
finite.
"""
STUDIES = {"analysis": AnalysisConfig, "pilot": PilotConfig}  # sections of recipes for `analyze` and `pilot`


@dataclass(frozen=True)
class Key:
    """A key of a recipe.

    Args:
        name: with its sections, such as training.max_steps.
        kind: its type in words.
        default: as YAML writes it.
        unit: what is counted; empty for a number without one.
        range: such as `≥ 1` or `0 to 1`; empty for what is no number.
        meaning: its sentence.
    """

    name: str
    kind: str
    default: str
    unit: str
    range: str
    meaning: str


def sections() -> dict[str, type]:
    """The dataclasses by the dotted name of their section; that of the recipe itself is empty."""
    found: dict[str, type] = {"": Recipe}
    pending = ["", *STUDIES]
    found |= STUDIES
    while pending:
        name = pending.pop(0)
        for entry in dataclasses.fields(found[name]):
            if dataclasses.is_dataclass(entry.default_factory):
                inner = f"{name}.{entry.name}".lstrip(".")
                found[inner] = typing.cast(type, entry.default_factory)
                pending.append(inner)
    top = [entry.name for entry in dataclasses.fields(Recipe)] + list(STUDIES)
    return dict(sorted(found.items(), key=lambda item: top.index(item[0].partition(".")[0]) if item[0] else -1))


def keys(name: str, section: type) -> Iterator[Key]:
    """The keys of a section, without the sections in it.

    Raises:
        ValueError: for a key without a sentence.
    """
    said, hints = documented(section), typing.get_type_hints(section)
    for entry in dataclasses.fields(section):
        if dataclasses.is_dataclass(entry.default_factory):
            continue
        if entry.name not in said:
            raise ValueError(f"{section.__name__}.{entry.name} has no entry in the docstring.")
        text, unit, allowed = said[entry.name]
        make = entry.default_factory
        default = entry.default if make is dataclasses.MISSING else make()
        dotted = f"{name}.{entry.name}".lstrip(".")
        yield Key(dotted, kind_of(hints[entry.name]), json.dumps(default), unit, allowed, text)


def documented(section: type) -> dict[str, tuple[str, str, str]]:
    """Sentence, unit and range of each key, of a dataclass and those that it extends."""
    found = {}
    for cls in reversed(section.__mro__):
        for name, text in ENTRY.findall(textwrap.dedent(f"    {cls.__doc__ or ''}")):
            text = " ".join(text.split())
            unit = allowed = ""
            if brackets := BRACKETS.search(text):
                text = text[: brackets.start()]
                first, _, rest = brackets[1].partition(", ")
                is_range = re.match(r"[≥><≤\d-]", first) is not None
                unit, allowed = ("", brackets[1]) if is_range else (first, rest)
            text = text[0].upper() + text[1:] if text[0].isascii() and " " in text.partition(",")[0] else text
            found[name] = (text, unit, allowed)
    return found


def kind_of(hint: Any) -> str:
    """A type in words."""
    parts = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin is list:
        inner = kind_of(parts[0])
        return f"list of {inner}" if typing.get_origin(parts[0]) is not typing.Literal else f"list of any of {inner}"
    if origin is dict:
        return "names and values"
    if origin in (typing.Union, UnionType):
        return " or ".join("null" if part is type(None) else kind_of(part) for part in parts)
    return {int: "whole number", float: "number", bool: "true or false", str: "text"}[hint]


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for name, section in sections().items():
        first = (section.__doc__ or "").partition("\n")[0]
        title = f"`{name}`" if name else "Top level"
        verb = f" Read by `difftune {'analyze' if name == 'analysis' else 'pilot'}` alone." if name in STUDIES else ""
        rows = [
            f"| `{key.name}` | {key.kind} | {key.range} | `{key.default}` | {key.unit} | {key.meaning} |"
            for key in keys(name, section)
        ]
        table = ["| key | type | range | default | unit | meaning |", "|---|---|---|---|---|---|", *rows]
        parts.append("\n".join([f"## {title}", "", first + verb, "", *table, ""]))
    return "\n".join(parts)


def main() -> None:
    """Write the page, or with --check say whether it is current by the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is not current")
    if parser.parse_args().check:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
