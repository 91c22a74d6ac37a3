"""The repository's Markdown pages: their fenced blocks, commands, links and anchors."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
NAMES = {path.relative_to(ROOT).as_posix(): path for path in PAGES}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LAUNCHERS = ("torchrun", "accelerate", "python", "python3")
OPENED = re.compile(r"[|&;><]+")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, without the indentation of the fence."""
    found = FENCE.findall(text)
    return [re.sub(f"^{indent}", "", body, flags=re.MULTILINE) for indent, name, body in found if name == language]


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", text)


def shell_commands(text: str) -> Iterator[list[str]]:
    """The commands of the bash blocks, as the words that a shell makes of each line."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            end = next((i for i, word in enumerate(words) if OPENED.fullmatch(word)), len(words))
            if words[:end]:
                yield words[:end]


def difftune_commands(text: str) -> Iterator[list[str]]:
    """The arguments of each `difftune` in bash blocks, alone or under a launcher, and of each whole one in prose."""
    for words in shell_commands(text):
        if words[0] == "difftune":
            yield words[1:]
        elif words[0] in LAUNCHERS and "difftuning_control.cli" in words:
            yield words[words.index("difftuning_control.cli") + 1 :]
    for span in re.findall(r"`difftune ([^`]+)`", prose(text)):
        words = shlex.split(" ".join(span.split()))
        if len(words) > 1 and "…" not in span:
            yield words


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE):
        plain = unicodedata.normalize("NFKD", re.sub(r"[`*]", "", heading)).lower()
        found.add(re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", plain).strip()))
    return found


def links(text: str) -> list[str]:
    """The targets of links and pictures in prose."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(text)))
