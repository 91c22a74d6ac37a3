"""Damage to files."""

from __future__ import annotations

from pathlib import Path

DAMAGES = {
    "empty": lambda content: b"",
    "cut short": lambda content: content[:-7],
    "rubbish": lambda content: b"?" * 99,
}


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
