"""The phases of a run: the seconds and the forwards of the denoiser that each has taken, and will take.

The record, the run's page, the price of the next run, and the lines on what is to come and on what was spent have
them from here alone.

A forward is one row through the denoiser: drawing a bank's item in 15 steps at a guidance above 1 is 30 of them. Phases
lie within each other; what an inner one takes is not the outer one's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from difftuning_control.runs.record_sections import PhaseCost, PhaseCosts, read_phases
from difftuning_control.system.terminal import duration

PHASES = ("load", "encode", "bank", "analysis", "validation", "training", "sampling", "saving")
BEFORE = ("load", "encode", "bank", "analysis")  # of a run's training
LEAST = 0.05  # seconds that are told
TRAINING = 3  # a row's forward and backward take as long as about three forwards alone


@dataclass
class Phase:
    """What one phase has taken, and how many forwards it is going to take in all, where that is known."""

    seconds: float = 0.0
    forwards: int = 0
    planned: int | None = None


class Phases:
    """Counts what happens in each phase of one process.

        phases = Phases()
        with phases.counting(family.denoiser):
            phases.plan("bank", 720)
            with phases("bank"):
                ...
        phases.costs()                    # {"bank": PhaseCost(seconds=21.3, forwards=720)}

    Args:
        now: a clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now, self._open, self._since = now, list[str](), 0.0
        self._found: dict[str, Phase] = {name: Phase() for name in PHASES}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """While open, time and forwards are those of the phase.

        Raises:
            KeyError: if there is no phase of this name.
        """
        self._found[name]
        self._passed()
        self._open.append(name)
        try:
            yield
        finally:
            self._passed()
            self._open.pop()

    @contextmanager
    def counting(self, denoiser: nn.Module) -> Iterator[None]:
        """While open, the rows that go through a denoiser are counted in the phase that is open."""

        def count(module: nn.Module, given: Any, output: Any) -> None:  # a copy of the module counts here too
            if self._open:
                self._found[self._open[-1]].forwards += len(output[0])

        handle = denoiser.register_forward_hook(count)
        try:
            yield
        finally:
            handle.remove()

    def plan(self, name: str, forwards: int) -> None:
        """Say how many forwards a phase is going to take in all, with those that it has taken already."""
        self._found[name].planned = forwards

    # --- what was found ---------------------------------------------------------------------------------------------

    def seconds(self, name: str) -> float:
        """What a phase has taken until now."""
        self._passed()
        return self._found[name].seconds

    def forwards(self, name: str) -> int:
        return self._found[name].forwards

    def remaining(self, name: str) -> float | None:
        """Seconds that a phase will still take, from the speed of its own forwards, or of others' before its first.

        None where nothing is planned, or no forward was timed yet.
        """
        phase = self._found[name]
        if phase.planned is None:
            return None
        left, each = max(phase.planned - phase.forwards, 0), self._speed(name)
        return 0.0 if not left else None if each is None else left * each

    def _speed(self, name: str) -> float | None:
        """Seconds of a forward in a phase; before its first those of the others, with the gradients' share."""
        self._passed()
        weights = {n: TRAINING if n == "training" else 1 for n in PHASES}
        own = self._found[name]
        known = {name: own} if own.forwards else {n: p for n, p in self._found.items() if p.forwards}
        work = sum(p.forwards * weights[n] for n, p in known.items())
        return weights[name] * sum(p.seconds for p in known.values()) / work if work else None

    def costs(self) -> PhaseCosts:
        """Seconds and forwards of every phase that took any, in their order."""
        self._passed()
        return {
            name: PhaseCost(seconds=round(p.seconds, 3), forwards=p.forwards)
            for name, p in self._found.items()
            if p.seconds or p.forwards
        }

    def add(self, others: PhaseCosts) -> None:
        """Count what another run took, or this one before it broke off."""
        for name, cost in others.items():
            self._found[name].seconds += cost.seconds
            self._found[name].forwards += int(cost.forwards)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: cost.to_dict() for name, cost in self.costs().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint: what was taken since it was loaded counts too."""
        self.add(read_phases(state))

    def _passed(self) -> None:
        """Give the time since the last call to the phase that is open; a device finishes its work in it."""
        if self._open and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = self._now()
        if self._open:
            self._found[self._open[-1]].seconds += now - self._since
        self._since = now


def added(*costs: PhaseCosts) -> PhaseCosts:
    """What several runs took together."""
    together = Phases()
    for one in costs:
        together.add(one)
    return together.costs()


def plan_run(phases: Phases, once: PhaseCosts, to_come: dict[str, int], training: int) -> None:
    """Say how many forwards each phase of a run will take, before its first step.

    Args:
        once: what the phases had taken when each measurement was done once.
        to_come: how many measurements follow, by `Calendar.to_come`; those of fidelity were not done yet.
        training: forwards of all steps.
    """
    names = ["validation"] if to_come["fidelity"] else ["validation", "sampling"]
    forwards = {name: to_come[name] * once.get(name, PhaseCost()).forwards for name in names}
    for name, count in (forwards | {"training": training}).items():
        phases.plan(name, phases.forwards(name) + count)


# --- in words ---------------------------------------------------------------------------------------------------------


def planned_line(phases: Phases) -> str | None:
    """What is still to come, a phase with what it will take; None where nothing is known of it."""
    parts = []
    for name in PHASES:
        left = phases.remaining(name)
        if left:
            parts.append((left, f"{name} {duration(left)}"))
    if not parts:
        return None
    return f"still to come, about {duration(sum(p[0] for p in parts))}: {', '.join(p[1] for p in parts)}"


def spent_line(costs: PhaseCosts) -> str:
    """Where the time went: the longest phase first."""
    parts = []
    for name, cost in sorted(costs.items(), key=lambda item: -item[1].seconds):
        if cost.seconds < LEAST and not cost.forwards:
            continue
        forwards = f" ({int(cost.forwards):,} forwards)" if cost.forwards else ""
        parts.append(f"{name} {duration(cost.seconds)}{forwards}")
    return f"{duration(sum(cost.seconds for cost in costs.values()))} in all: {', '.join(parts)}"
