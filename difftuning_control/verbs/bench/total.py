"""From the command to the saved LoRA: this trainer plain and with Diff-Tuning, with cold and warm caches and bank, and
diffusers' script, in turn.

On the embedded model every command runs to its end. At a real model's size each runs a few steps, with a bank
of few samples of few steps, and the rest of its steps and of its bank is added at the speed that was measured.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from difftuning_control.recipe.inputs import BankConfig
from difftuning_control.runs.record import read_run
from difftuning_control.runs.record_sections import PhaseCost, PhaseCosts
from difftuning_control.verbs.bench.settings import Bench
from difftuning_control.verbs.bench.sides import Timed

PICTURES = 24
RETENTION = 0.2  # of a step's rows
FEW = {"bank.size": 2, "bank.steps": 2}  # of the bank where the rest is added up
FEW_ON_GPU = {"bank.size": 16, "bank.steps": 8}  # whose first forward takes as long as many that follow
SIDES = ("plain, cold", "plain, warm", "Diff-Tuning, cold", "Diff-Tuning, warm", "diffusers' script")
PAIRS = (
    ("Diff-Tuning, cold", "plain, cold"),
    ("Diff-Tuning, warm", "plain, warm"),
    ("diffusers' script", "Diff-Tuning, cold"),
    ("diffusers' script", "plain, cold"),
)


@dataclass(frozen=True)
class Job:
    """What is timed.

    Args:
        steps: of the whole training.
        done: steps that are run of it; the rest is added up where they are fewer.
        rows: of a step.
        work: where runs, caches and bank lie.
        command: `difftune train` for the steps that are run, plain.
        peer: diffusers' script for as many, if it is there.
        run: runs one under the stopwatch.
        few: of the bank, where the rest is added up.
    """

    steps: int
    done: int
    rows: int
    work: Path
    command: list[str]
    peer: list[str] | None
    run: Callable[[list[str], str], Timed]
    few: dict[str, int] = field(default_factory=lambda: FEW)

    @property
    def whole(self) -> bool:
        return self.done == self.steps

    @property
    def tuned(self) -> list[str]:
        """The same command with Diff-Tuning as it is by default."""
        retention = {"tuning.retention_ratio": RETENTION, "tuning.retention_weight": 0.1}
        retention |= {} if self.whole else self.few
        kept = [flag for flag in self.command if not flag.startswith("--tuning.")]
        return [*kept, *(f"--{name}={value}" for name, value in retention.items())]

    def measure(self, rounds: int) -> dict[str, Any]:
        """Wall and CPU seconds of every side, round by round, and where those of this trainer went."""
        found: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES if self.peer or side != SIDES[-1]}
        phases: dict[str, PhaseCosts] = {}
        for number in range(rounds):
            for side in found:
                if side == SIDES[-1]:
                    assert self.peer is not None
                    timed = self.run(self.peer, f"total-peer-{number}")
                else:
                    if side.endswith("cold"):
                        shutil.rmtree(self.work / "cache", ignore_errors=True)
                    command = self.command if side.startswith("plain") else self.tuned
                    timed = self.run(command, f"total-{side.replace(', ', '-')}-{number}")
                    phases[side] = self._phases()
                found[side].append(self._in_all(timed, phases.get(side, {})))
        seconds = {clock: {s: [pair[i] for pair in p] for s, p in found.items()} for i, clock in enumerate(CLOCKS)}
        return {
            "steps": self.steps,
            "rows": self.rows,
            "pictures": PICTURES,
            "added_up": not self.whole,
            "seconds": seconds,
            "ratios": {
                clock: {f"{a} / {b}": median(x / y for x, y in zip(its[a], its[b])) for a, b in PAIRS if a in its}
                for clock, its in seconds.items()
            },
            "phases": {side: {name: cost.to_dict() for name, cost in its.items()} for side, its in phases.items()},
        }

    def _phases(self) -> PhaseCosts:
        output = next(flag.partition("=")[2] for flag in self.command if flag.startswith("--output="))
        record = read_run(Path(output))
        return (record.phases if record is not None else None) or {}

    def _in_all(self, timed: Timed, phases: PhaseCosts) -> tuple[float, float]:
        """Wall and CPU seconds of the whole, with what was left out at the speed of what was done."""
        if self.whole:
            return timed.seconds, timed.cpu_seconds
        left = self.steps - self.done
        wall, cpu = timed.seconds + left * median(timed.steps), timed.cpu_seconds + left * median(timed.cpu)
        drawn = phases.get("bank", PhaseCost())
        if drawn.forwards:
            more = (bank_forwards(self.steps, self.rows) / drawn.forwards - 1) * drawn.seconds
            wall, cpu = wall + more, cpu + more * timed.cpu_seconds / timed.seconds
        return wall, cpu


CLOCKS = ("wall", "cpu")


def bank_forwards(steps: int, rows: int) -> int:
    """Forwards of a row that draw the bank of a run with the defaults."""
    bank = BankConfig()
    items = bank.size_for(steps * int(rows * RETENTION))
    return items * bank.steps * (2 if bank.guidance_scale > 1 else 1)


def job_steps(bench: Bench) -> tuple[int, int, int]:
    """The steps of the whole training, how many of them are run, and the rows of each."""
    if bench.size == "embedded":
        return bench.total_steps or 200, bench.total_steps or 200, 10
    steps = bench.total_steps or 800
    return steps, min(bench.steps + 1, steps), 5


def lines(part: dict[str, Any], clock: str) -> list[str]:
    """The result in words, by one clock."""
    how = ", added up from parts" if part["added_up"] else ""
    head = f"From the command to the LoRA ({part['pictures']} pictures, {part['steps']} steps of {part['rows']} rows"
    seconds = (f"{side} {median(found):.0f} s" for side, found in part["seconds"][clock].items())
    ratios = (f"{name} {value:.2f}" for name, value in part["ratios"][clock].items())
    return [f"{head}{how}), {clock} time: {', '.join(seconds)}.", f"Ratios: {', '.join(ratios)}."]
