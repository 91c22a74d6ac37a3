"""The table of drop-in pipelines is the one place that a new one is registered in."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

import difftuning_control
from difftuning_control import pipelines
from difftuning_control.pipelines.registry import DROP_INS
from support.marks import need_pipeline

ROOT = Path(difftuning_control.__file__).parents[1]
each = pytest.mark.parametrize("row", DROP_INS, ids=lambda row: row.name)


@each
def test_a_row_is_what_the_classes_are(row):
    need_pipeline(row.stock)
    ours = getattr(pipelines, row.name)
    assert ours.__name__ == row.name
    assert ours.__module__ == f"difftuning_control.pipelines.{row.module}"
    assert issubclass(ours, getattr(diffusers, row.stock))
    assert getattr(diffusers, row.name) is getattr(difftuning_control, row.name) is ours


@each
def test_a_row_names_its_place_in_diffusers_tables(row):
    need_pipeline(row.stock)
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING as TABLE

    rows = {name for name, value in TABLE.items() if value is getattr(diffusers, row.stock)}
    assert rows == ({row.auto} if row.auto is not None else set())
    assert TABLE.get(row.auto_name) is (getattr(pipelines, row.name) if row.auto is not None else None)


def test_the_one_line_files_are_the_table():
    """Each file imports the class of its row and nothing else, and there is none without a row."""
    found = {}
    for path in (ROOT / "pipelines").glob("*.py"):
        (line,) = ast.parse(path.read_text()).body
        assert isinstance(line, ast.ImportFrom)
        found[path.stem] = (line.module, [alias.name for alias in line.names])
    assert found == {row.file: ("difftuning_control.pipelines", [row.name]) for row in DROP_INS}


def test_names_are_listed_before_they_are_used():
    code = """
import sys, difftuning_control, difftuning_control.pipelines as pipelines
names = {row.name for row in pipelines.registry.DROP_INS}
assert names | {"add_control"} <= set(dir(pipelines)) & set(pipelines.__all__)
assert names <= set(dir(difftuning_control)) & set(difftuning_control.__all__)
assert not hasattr(pipelines, "NoSuchPipeline") and not hasattr(difftuning_control, "NoSuchPipeline")
print(sorted({"torch", "diffusers", "transformers", "peft"} & set(sys.modules)))
"""
    assert run(code, ROOT) == "[]"


@pytest.mark.wide
@pytest.mark.parametrize("row", DROP_INS[:1] + DROP_INS[-1:], ids=lambda row: row.name)
def test_a_class_imports_its_own_file_only(row):
    """Exports on people's disks import one name."""
    code = f"""
import sys
from difftuning_control.pipelines import {row.name}
print(sorted(n.rpartition(".")[2] for n in sys.modules if n.startswith("difftuning_control.pipelines.")))
"""
    files = {entry.module for entry in DROP_INS}
    assert files & set(ast.literal_eval(run(code, ROOT))) == {row.module}


@pytest.mark.wide
def test_a_new_drop_in_is_its_file_and_one_row(tmp_path):
    """Planted in a copy of the package: every place knows it."""
    shutil.copytree(ROOT / "difftuning_control", tmp_path / "difftuning_control", ignore=lambda f, n: {"assets"} & {*n})
    folder = tmp_path / "difftuning_control" / "pipelines"
    (folder / "pixart.py").write_text(
        "from diffusers import PixArtAlphaPipeline\n\nclass DiffTuningPixArtPipeline(PixArtAlphaPipeline):\n    pass\n"
    )
    table = (folder / "registry.py").read_text()
    row = 'DropIn("PixArtAlphaPipeline", "DiffTuningPixArtPipeline", "pixart", "difftuning_pixart", "pixart-alpha")'
    planted = table.replace("DROP_INS = (\n", f"DROP_INS = (\n    {row},\n")
    assert planted != table
    (folder / "registry.py").write_text(planted)
    code = """
import difftuning_control, diffusers
from difftuning_control import DiffTuningPixArtPipeline as one
from difftuning_control.pipelines import DiffTuningPixArtPipeline as two
from difftuning_control.pipelines.controlled import controlled
from difftuning_control.pipelines.registry import BY_STOCK
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING as table
assert one is two is diffusers.DiffTuningPixArtPipeline is table["difftuning-pixart"]
assert one.__name__ in dir(difftuning_control) and one.__name__ in dir(difftuning_control.pipelines)
assert BY_STOCK["PixArtAlphaPipeline"].file == "difftuning_pixart" and controlled("PixArtAlphaPipeline") is None
print(difftuning_control.__file__)
"""
    assert run(code, tmp_path) == str(tmp_path / "difftuning_control" / "__init__.py")


def run(code: str, place: Path) -> str:
    """What a fresh interpreter prints that has the package of a folder."""
    environment = os.environ | {"PYTHONPATH": str(place)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
