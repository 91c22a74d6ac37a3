"""What the examples compute beside the package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

EMOJI = Path(__file__).parents[2] / "examples" / "emoji"


@pytest.fixture
def first_reach(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(EMOJI)
    before = set(sys.modules)
    import control_tasks

    yield control_tasks.first_reach
    for name in set(sys.modules) - before:
        if str(EMOJI) in str(getattr(sys.modules[name], "__file__", None)):
            sys.modules.pop(name)


def test_first_reach_interpolates(first_reach):
    assert first_reach([0, 10, 20, 30], [0.0, 0.2, 0.6, 0.7], 0.5) == pytest.approx(17.5)
    assert first_reach([5, 10, 20], [0.6, 0.7, 0.7], 0.5) == 5
    assert first_reach([5, 10, 20], [0.4, 0.5, 0.5], 0.5) == 10


def test_first_reach_is_not_misled_by_a_spike(first_reach):
    values = [0.1, 0.1, 0.6, 0.1, 0.1, 0.4, 0.8, 0.8]
    assert first_reach(list(range(8)), values, 0.5) == pytest.approx(5.25)
    assert first_reach(list(range(8)), [0.1, 0.1, 0.6] + [0.1] * 5, 0.5) is None


def test_first_reach_of_a_level_that_is_not_reached(first_reach):
    assert first_reach([1, 2, 3], [0.1, 0.2, 0.3], 0.5) is None
    assert first_reach([1, 2, 3], [0.1, 0.2, 0.9], 0.5) is None  # nothing confirms it yet
    assert first_reach([], [], 0.5) is None
