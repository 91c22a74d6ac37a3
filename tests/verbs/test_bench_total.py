"""Whole commands under one watch: what is run, what is added up, and what the table says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from difftuning_control.recipe.recipe import Recipe
from difftuning_control.verbs.bench.run import table
from difftuning_control.verbs.bench.settings import Bench
from difftuning_control.verbs.bench.sides import Timed, ours
from difftuning_control.verbs.bench.total import SIDES, Job, job_steps
from difftuning_control.verbs.parse import parse

BANK = {"seconds": 8.0, "forwards": 8}


def job(tmp_path: Path, steps: int, done: int, peer: bool = True) -> tuple[Job, list[str]]:
    """A job whose runs take 10 seconds and 2 a step, half of that of the CPU; those that draw a bank say so."""
    asked: list[str] = []
    command = ours("lora", "embedded", tmp_path / "data", tmp_path, 64, done, 5)
    (tmp_path / "ours-lora").mkdir()

    def run(given: list[str], name: str) -> Timed:
        tuned = "--tuning.retention_ratio=0.2" in given
        caches = (tmp_path / "cache").exists()
        asked.append(f"{name}{' with caches' if caches else ''}")
        (tmp_path / "cache").mkdir(exist_ok=True)
        phases = {"bank": BANK} if tuned and not caches else {"load": {"seconds": 1.0, "forwards": 0}}
        (tmp_path / "ours-lora" / "run.json").write_text(json.dumps({"phases": phases}))
        return Timed([2.0] * (done - 1), [1.0] * (done - 1), 3.0, 10.0, 1, 5.0)

    theirs = ["script.py"] if peer else None
    return Job(steps, done, 5, tmp_path, command, theirs, run), asked


def test_each_side_runs_in_turn_and_cold_ones_without_caches(tmp_path):
    made, asked = job(tmp_path, 3, 3)
    found = made.measure(2)
    assert asked == [
        f"total-{side}-{n}{caches}"
        for n in range(2)
        for side, caches in [
            ("plain-cold", ""),
            ("plain-warm", " with caches"),
            ("Diff-Tuning-cold", ""),
            ("Diff-Tuning-warm", " with caches"),
            ("peer", " with caches"),
        ]
    ]
    assert found["seconds"]["wall"] == {side: [10.0, 10.0] for side in SIDES}
    assert found["seconds"]["cpu"] == {side: [5.0, 5.0] for side in SIDES}
    assert set(found["ratios"]["wall"].values()) == {1.0}
    assert not found["added_up"]


def test_what_is_left_out_is_added_at_the_speed_of_what_was_done(tmp_path):
    """100 steps of 5 rows draw 100 samples, so the bank has 32 of 15 steps, 2 forwards each: 960, not 8, at 1 s."""
    made, _ = job(tmp_path, 100, 3)
    seconds = made.measure(1)["seconds"]
    steps = 10 + 97 * 2.0
    assert seconds["wall"]["plain, cold"] == [steps]
    assert seconds["wall"]["Diff-Tuning, warm"] == [steps]
    assert seconds["wall"]["Diff-Tuning, cold"] == pytest.approx([steps + 952])
    assert seconds["cpu"]["Diff-Tuning, cold"] == pytest.approx([5 + 97 + 952 / 2])


def test_both_commands_are_the_same_but_for_retention(tmp_path):
    made, _ = job(tmp_path, 3, 3)
    plain, tuned = (parse(command[2:])[1] for command in (made.command, made.tuned))
    assert isinstance(plain, Recipe)
    assert isinstance(tuned, Recipe)
    assert (plain.tuning.retention_ratio, tuned.tuning.retention_ratio) == (0.0, 0.2)
    assert tuned.bank.size == "auto"
    assert plain.training == tuned.training
    assert plain.data == tuned.data


def test_the_table_says_the_seconds_and_the_ratios(tmp_path):
    made, _ = job(tmp_path, 100, 3, peer=False)
    result = {"settings": {"threads": 1}, "parts": {"total": made.measure(1)}}
    assert table(result).strip().split("\n") == [
        "From the command to the LoRA (24 pictures, 100 steps of 5 rows, added up from parts), cpu time: "
        "plain, cold 102 s, plain, warm 102 s, Diff-Tuning, cold 578 s, Diff-Tuning, warm 102 s.",
        "Ratios: Diff-Tuning, cold / plain, cold 5.67, Diff-Tuning, warm / plain, warm 1.00.",
    ]


def test_the_steps_follow_the_size():
    assert job_steps(Bench()) == (200, 200, 10)
    assert job_steps(Bench(size="sd15", steps=4)) == (800, 5, 5)
    assert job_steps(Bench(total_steps=7)) == (7, 7, 10)
