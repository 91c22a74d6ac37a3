"""Refused commands: one sentence, exit code 2, and a folder that stays as it was, but for whole files in a cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from difftuning_control.cli import main


def snapshot(root: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder; the folders of caches have an entry for what is not whole in them."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if not name.parts[0].startswith("cache"):
            found[str(name)] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        elif path.name.startswith(".") or (path.parent.name == "banks" and not (path / "manifest.json").exists()):
            found[str(name)] = None
    return found


def refusal(words: list[str], capsys: pytest.CaptureFixture[str], root: Path) -> str:
    """The sentence that a refused command prints; that it is one, and that `root` stays as it was, is checked here."""
    before = snapshot(root)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(words)
    # on a slow machine a progress bar may have come and gone on lines of its own
    lines = [line for line in capsys.readouterr().err.split("\n") if line and "\r" not in line]
    assert (stopped.value.code, len(lines)) == (2, 1), lines
    assert lines[0].startswith("difftune: ")
    assert lines[0].endswith((".", "?"))
    assert snapshot(root) == before
    return lines[0].removeprefix("difftune: ")


def assert_refused(words: list[str], capsys: pytest.CaptureFixture[str], root: Path, *expected: str) -> None:
    """Refused, and the sentence has each of the expected phrases."""
    shown = refusal(words, capsys, root)
    assert [e for e in expected if e not in shown] == [], shown
