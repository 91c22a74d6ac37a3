"""The shape of the package's files: their length, private names, and imports inside functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "difftuning_control"
ROOMS = (
    "system",
    "objective",
    "recipe",
    "families",
    "data",
    "adapters",
    "evaluation",
    "runs",
    "pipelines",
    "training",
    "verbs",
)
HEAVY = ("torch", "diffusers", "transformers", "peft", "datasets", "controlnet_aux", "matplotlib", "torchmetrics")
room = pytest.mark.parametrize("room", ROOMS)


def files(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


def imports_in_functions(source: str) -> Iterator[ast.Import | ast.ImportFrom]:
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from (n for n in ast.walk(function) if isinstance(n, (ast.Import, ast.ImportFrom)))


def unexplained(source: str) -> list[int]:
    """Lines of imports inside functions without a comment on them, above them, or on the import just above."""
    lines, missing = source.split("\n"), []
    explained: set[int] = set()  # last lines of imports that are
    for found in sorted(imports_in_functions(source), key=lambda n: n.lineno):
        last = found.end_lineno or found.lineno
        own = any("#" in line for line in lines[found.lineno - 1 : last])
        above = lines[found.lineno - 2].strip()
        previous = found.lineno - 1 - (above == "")
        if own or above.startswith("#") or previous in explained:
            explained.add(last)
        else:
            missing.append(found.lineno)
    return missing


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_imports(source: str) -> list[str]:
    """Private names of this package that a file imports, or reads from a module that it imports."""
    tree, found, modules = ast.parse(source), [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("difftuning_control"):
            found += [a.name for a in node.names if is_private(a.name)]
            place = PACKAGE.parent / (node.module or "").replace(".", "/")
            modules |= {a.asname or a.name for a in node.names if (place / f"{a.name}.py").exists()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            found += [node.attr] if is_private(node.attr) else []
    return found


@room
def test_no_module_is_longer_than_400_lines(room):
    assert {p.name: n for p in files(room) if (n := len(p.read_text().splitlines())) > 400} == {}


def test_at_most_twelve_modules_are_longer_than_300_lines():
    long = [p.name for p in PACKAGE.rglob("*.py") if len(p.read_text().splitlines()) > 300]
    assert len(long) <= 12, long


@room
def test_an_import_inside_a_function_says_why(room):
    assert {str(p): found for p in files(room) if (found := unexplained(p.read_text()))} == {}


@room
def test_private_names_stay_in_their_files(room):
    assert {str(p): found for p in files(room) if (found := private_imports(p.read_text()))} == {}


@pytest.mark.parametrize(
    ("body", "lines"),
    [
        ("import torch", [2]),
        ("import torch  # saves a second", []),
        ("# saves a second\n    import torch", []),
        ("import torch  # saves a second\n    import peft", []),
        ("import torch  # saves a second\n    x = 1\n    import peft", [4]),
    ],
)
def test_an_unexplained_import_is_found(body, lines):
    assert unexplained(f"def f():\n    {body}\n") == lines


def literals(source: str) -> set[str]:
    """All that a source says a value may be, as it is written there."""
    found = (
        n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Subscript) and ast.unparse(n.value) == "Literal"
    )
    return {ast.unparse(node.slice) for node in found}


def test_no_two_literals_hold_the_same_in_another_order():
    """Python takes them for equal and keeps a union of the first one, so that help would depend on what ran before."""
    said = set().union(*(literals(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")))
    assert len(said) > 10
    kinds = [frozenset(ast.literal_eval(f"({each},)")) for each in (words.strip("()") for words in said)]
    assert len(set(kinds)) == len(kinds)


def test_a_private_import_is_found():
    assert private_imports("from difftuning_control.system.text import _show, harmless") == ["_show"]
    assert private_imports("from difftuning_control.system import text\n\ntext._show('a')\ntext.harmless('a')") == [
        "_show"
    ]


@pytest.mark.parametrize("arguments", [["-c", "import difftuning_control"], ["-m", "difftuning_control.cli", "--help"]])
def test_start_up_imports_nothing_heavy(arguments):
    command = [sys.executable, "-X", "importtime", *arguments]
    told = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True).stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in told.splitlines()}
    assert "difftuning_control" in imported
    assert not imported & set(HEAVY)
