"""The table family × capability of docs/models.md names tests that there are."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "models.md"


def test_every_cell_is_a_test_or_a_reason():
    section = PAGE.read_text(encoding="utf-8").split("## What is tested, family by family")[1]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    assert len(rows) > 15
    assert {len(row) for row in rows[1:]} == {6}
    named = re.findall(r"`([\w/]+(?:\.py)?)`", "\n".join(" | ".join(row) for row in rows))
    files = [name for name in named if name.endswith(".py")]
    functions = [name for name in named if name.startswith("test_") and not name.endswith(".py")]
    assert len(files) > 10
    assert len(functions) > 20
    assert [name for name in files if not (TESTS / name).exists()] == []
    defined = set()
    for path in TESTS.rglob("test_*.py"):
        defined |= set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M))
    assert sorted(set(functions) - defined) == []
