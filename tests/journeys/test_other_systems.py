"""The package on a Python without what only POSIX has: modules, functions and signals that Windows lacks."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.command_line import flags, settings
from support.other_systems import MODULES, OF_OS, OF_SIGNAL

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "difftuning_control"
START = "from support.other_systems import take_away, LOCKED; take_away()\nfrom difftuning_control.cli import main\n"
ALLOWED = {("os", "getuid")}  # asked for with hasattr


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(PACKAGE.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-c", START + script, *words]
    return subprocess.run(command, capture_output=True, text=True, encoding="cp1252", env=environment, check=False)


@pytest.mark.wide
def test_verbs_run_where_nothing_of_posix_is_there(model_dir, pictures, tmp_path):
    """Files are synced, the audit is locked, and text is written in a code page without Greek letters."""
    script = """
import sys
run, more = sys.argv[1], sys.argv[2:]
main(["train", *more])
main(["resume", run, "--training.max_steps", "4"])
main(["sample", "--run", run, "--prompts", '["red"]', "--steps", "2", "--output", run + "-samples"])
main(["export", run, "--to", run + "-export"])
main(["verify", run])
main(["runs", run])
print("locked", LOCKED.count(1), LOCKED.count(0))
"""
    done = run(script, str(tmp_path / "run"), *flags(settings(model_dir, pictures, tmp_path)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["status"] == "complete"
    assert (tmp_path / "run-samples" / "samples.json").exists()
    assert (tmp_path / "run-export" / "README.md").exists()
    word, locked, unlocked = done.stdout.split()[-3:]
    assert word == "locked"
    assert int(locked) == int(unlocked) >= 4  # a line of the audit each


def test_help_is_printed_in_a_code_page_without_its_letters():
    """As Windows prints into a pipe."""
    command = [sys.executable, "-m", "difftuning_control.cli", "train", "--help"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"learning_rate" in done.stdout


def uses(source: str) -> set[tuple[str, str]]:
    """What a file reads of `os` and `signal` without asking whether it is there, and the modules that it imports."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("os", "signal"):
            found.add((node.value.id, node.attr))
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "", alias.name) for alias in node.names} | {("import", node.module or "")}
        elif isinstance(node, ast.Import):
            found |= {("import", alias.name) for alias in node.names}
    return found


LACKING = {("os", name) for name in OF_OS} | {("signal", name) for name in OF_SIGNAL} | {("import", m) for m in MODULES}


def test_the_check_sees_what_it_is_for():
    assert uses("import fcntl\nos.fork()\nfrom signal import SIGHUP") & LACKING == {
        ("import", "fcntl"),
        ("os", "fork"),
        ("signal", "SIGHUP"),
    }


def test_no_file_uses_what_only_posix_has():
    found = {(path.name, *use) for path in PACKAGE.rglob("*.py") for use in uses(path.read_text("utf-8")) & LACKING}
    assert {(module, name) for _, module, name in found} <= ALLOWED, sorted(found)
