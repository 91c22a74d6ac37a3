"""The table family × capability of docs/models.md names tests that there are, where they are and when they run."""

import ast
import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "models.md"
FILE = re.compile(r"`([\w/]+\.py)`")
FUNCTION = re.compile(r"`(test_\w+)`(ʷ?)")


@cache
def defined(file: str) -> dict[str, bool]:
    """The tests of a file, and whether each is `wide`."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {f.name: "pytest.mark.wide" in map(ast.unparse, f.decorator_list) for f in functions}


def table() -> list[list[str]]:
    section = PAGE.read_text(encoding="utf-8").split("## What is tested, family by family")[1]
    lines = [line for line in section.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]


def test_every_cell_is_a_test_or_a_reason():
    head, files, *rows = table()
    assert files[0] == "file"
    assert len(rows) > 15
    assert {len(row) for row in (head, files, *rows)} == {6}
    assert [row for row in (head[1:], files, *rows) if not all(row)] == []
    wrong, known = [], 0
    for name, *cells in rows:
        for column, cell in enumerate(cells, 1):
            of_column = [file for part in (files[column], cell) for file in FILE.findall(part)]
            for function, mark in FUNCTION.findall(cell):
                known += 1
                found = [defined(file)[function] for file in of_column if function in defined(file)]
                if found != [mark == "ʷ"]:
                    wrong.append(f"{name}, {head[column]}: {function} is wide: {found}")
    assert wrong == []
    assert known > 20


def test_every_file_of_the_table_is_there():
    files = {file for row in table() for cell in row for file in FILE.findall(cell)}
    assert len(files) > 10
    assert [file for file in files if not (TESTS / file).exists()] == []
