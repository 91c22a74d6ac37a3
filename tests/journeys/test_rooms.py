"""The order of the package's rooms, held by import-linter, and what a planted import against it leads to."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LINT, "--no-cache", "--config", str(ROOT / "pyproject.toml")]
    return subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True)


def test_rooms_import_in_one_direction():
    found = lint(ROOT)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "Contracts: 1 kept, 0 broken." in found.stdout


def test_an_import_against_the_order_is_found(tmp_path):
    shutil.copytree(ROOT / "difftuning_control", tmp_path / "difftuning_control", ignore=lambda f, n: {"assets"} & {*n})
    planted = tmp_path / "difftuning_control" / "system" / "text.py"
    planted.write_text(planted.read_text() + "\nfrom difftuning_control.recipe import Recipe  # noqa\n")
    found = lint(tmp_path)
    assert found.returncode == 1
    assert "system is not allowed to import difftuning_control.recipe" in found.stdout


def test_the_root_has_four_modules():
    modules = {p.name for p in (ROOT / "difftuning_control").glob("*.py")}
    assert modules == {"__init__.py", "cli.py", "discovery.py", "errors.py"}
