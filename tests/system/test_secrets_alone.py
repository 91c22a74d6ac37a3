"""Secrets are hidden by the module that knows them, whichever others were imported before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = (
    "import sys; from difftuning_control.system.secrets import without_secrets; print(without_secrets(sys.argv[1]))"
)


@pytest.mark.parametrize("text", ["hf_abcdefghijklmnop12", "ghp_abcdefghijkl12345", "token=abcdefgh1234"])
def test_the_module_alone_hides_secrets_by_name_and_by_form(text):
    command = [sys.executable, "-c", SCRIPT, f"before {text} after"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert text.rpartition("=")[2] not in shown
    assert "(secret)" in shown
    assert shown.startswith("before ")
    assert shown.rstrip().endswith(" after")
