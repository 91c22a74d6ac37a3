"""The pre-commit hooks run the tools of `make lint`, from the environment that it makes."""

from __future__ import annotations

import re

import yaml

from support.documents import ROOT

HOOKS = {
    hook["id"]: hook
    for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    for hook in repo["hooks"]
}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_ruff_and_mypy_run_before_each_commit():
    assert {"ruff", "ruff-format", "mypy"} <= HOOKS.keys()
    venv = re.search(r"^VENV := (\S+)$", MAKEFILE, re.MULTILINE)
    assert venv is not None
    lint = MAKEFILE[MAKEFILE.index("\nlint:") :].partition("\n\n")[0].replace("$(BIN)", f"{venv[1]}/bin")
    for hook in HOOKS.values():
        assert hook["language"] == "system"  # no environment but the project's own
        assert f"\t{hook['entry']}" in lint, hook["entry"]


def test_mypy_checks_the_files_that_its_settings_name():
    assert HOOKS["mypy"]["pass_filenames"] is False
    assert all(hook["types"] == ["python"] for hook in HOOKS.values())
