"""docs/hook.md: its snippets run as they stand, one after another, and what it names is there."""

import re
from pathlib import Path

import pytest

from difftuning_control import DiffTuningObjective, embedded_model

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "hook.md").read_text()


@pytest.mark.wide
def test_fault_15_22_the_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(embedded_model()).exists()
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(snippets) >= 6
    scope: dict = {}
    for snippet in snippets:
        exec(snippet, scope)
    assert scope["step"] == 1
    assert float(scope["loss"].detach()) > 0
    assert len(scope["own_prompts"]) == 2
    assert set(scope["own_prompts"]) <= {"red apple", "dog face"}
    assert isinstance(scope["objective"], DiffTuningObjective)


@pytest.mark.parametrize("page", ["hook.md", "paper.md"])
def test_fault_15_22_the_links_lead_somewhere(page):
    links = re.findall(r"\]\((\.\.[^)]*)\)", (ROOT / "docs" / page).read_text())
    assert links
    for link in links:
        assert (ROOT / "docs" / link).exists(), link


@pytest.mark.parametrize(
    "question",
    ["without any pipeline object", "force_zeros_for_empty_prompt", "base_density", 'reduction="none"', "At batch 1"],
)
def test_fault_15_22_what_was_left_open_is_answered(question):
    assert question in PAGE
