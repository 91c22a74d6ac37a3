"""A run at a real model's size, added up from its parts: what is counted, what is measured, what the table says."""

from __future__ import annotations

from pathlib import Path

import pytest

from difftuning_control.verbs.bench.price import added_up
from difftuning_control.verbs.bench.run import bench, table
from difftuning_control.verbs.bench.settings import Bench
from difftuning_control.verbs.bench.total import bank_forwards


@pytest.mark.parametrize(
    ("steps", "rows", "forwards"),
    [(800, 5, 32 * 15 * 2), (200, 10, 32 * 15 * 2), (10, 5, 13 * 15 * 2), (3, 4, 8 * 15 * 2)],
)
def test_the_bank_is_counted_as_a_run_with_the_defaults_draws_it(steps, rows, forwards):
    """A fifth of the rows, and a quarter more for validation, at most 32 and at least 8."""
    assert bank_forwards(steps, rows) == forwards


def test_only_difftuning_pays_for_the_bank():
    whole = added_up(100, {"plain": 2.0, "Diff-Tuning": 3.0}, encoding=7.0, bank=50.0)
    assert whole == {"plain": 207.0, "Diff-Tuning": 357.0}


def test_the_table_says_the_parts_and_what_they_add_up_to():
    part = {
        "clock": "cpu",
        "steps": 800,
        "rows": 5,
        "pictures": 24,
        "timed_rows": 2,
        "seconds": {"picture": 7, "forward": {"2": 9.5, "4": 9}, "row": {"plain": 26, "Diff-Tuning": 26.5}},
        "bank_forwards": 960,
        "whole": {"plain": 104168, "Diff-Tuning": 114808},
        "ratio": 1.10214,
    }
    assert table({"settings": {"threads": 1}, "parts": {"price": part}}).strip().split("\n") == [
        "Added up from parts, cpu time, without start-up, validation and saving: 24 pictures, 800 steps of 5 rows, "
        "960 forwards of the bank: plain 104,168 s, Diff-Tuning 114,808 s, 1.102 times.",
        "Parts: a picture encoded 7.00 s; a row's forward 9.50 s in a batch of 2, 9.00 s in a batch of 4; a row of a "
        "step 26.00 s plain and 26.50 s Diff-Tuning, in steps of 2 rows.",
    ]


@pytest.mark.wide
def test_the_whole_follows_from_the_parts_that_were_measured(tmp_path: Path):
    settings = Bench(
        parts=["price"],
        size="sd15",
        small=True,
        rounds=1,
        steps=1,
        total_steps=4,
        threads=1,
        output=str(tmp_path / "bench"),
    )
    result = bench(settings)
    part = result["parts"]["price"]
    seconds, whole = part["seconds"], part["whole"]
    each = [seconds["picture"], *seconds["forward"].values(), *seconds["row"].values()]
    assert all(value > 0 for value in each)
    assert set(seconds["forward"]) == {"2", "4"}
    assert (part["steps"], part["rows"], part["timed_rows"], part["clock"]) == (4, 5, 2, "cpu")
    plain = 24 * seconds["picture"] + 20 * seconds["row"]["plain"]
    tuned = 24 * seconds["picture"] + 20 * seconds["row"]["Diff-Tuning"]
    assert whole["plain"] == pytest.approx(plain)
    assert whole["Diff-Tuning"] == pytest.approx(tuned + 8 * 15 * 2 * min(seconds["forward"].values()))
    assert part["ratio"] == pytest.approx(whole["Diff-Tuning"] / whole["plain"])
    shown = table(result)
    assert "24 pictures, 4 steps of 5 rows, 240 forwards of the bank" in shown
    assert "in steps of 2 rows" in shown
