"""The progress of the steps: a bar on a terminal, lines in a log, with a time that counts all that is still to come."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from difftuning_control.system.terminal import activities_are_shown, duration, say
from difftuning_control.training.calendar import Calendar

EVERY = 60.0  # seconds between lines in a log
WEIGHT = 0.05  # of the newest step in the mean seconds of a step


class _Bar(tqdm):
    """tqdm with the remaining time of somebody who knows more than the mean of steps."""

    remaining = ""

    @property
    def format_dict(self) -> dict[str, Any]:
        return super().format_dict | {"to_come": self.remaining}


class StepProgress:
    """Shows steps as they are done.

    Args:
        seconds: of a validation, a sample grid and a measurement of fidelity, by these names, as they are known.
        show: whether this process shows anything.
    """

    def __init__(self, calendar: Calendar, seconds: dict[str, float], first: int, total: int, show: bool):
        self.calendar, self.seconds, self.done, self.show = calendar, seconds, first, show
        self.step_seconds: float | None = None
        self.beside = 0.0  # seconds of what is still to be done beside steps and measurements
        self._said = time.monotonic()
        self._bar = _Bar(
            total=total,
            initial=first,
            desc="training",
            mininterval=1.0,
            leave=False,
            disable=not (show and sys.stderr.isatty()),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {to_come} to go{postfix}]",
        )

    def __enter__(self) -> StepProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def remaining(self, end: int) -> float | None:
        """Seconds until all steps and all that is due on the way are done; None before the first step."""
        if self.step_seconds is None:
            return None
        due = self.calendar.to_come(self.done, end)
        steps = (end - self.done) * self.step_seconds + self.beside
        return steps + sum(n * self.seconds.get(name, 0.0) for name, n in due.items())

    def advance(self, seconds: float, losses: dict[str, float], end: int) -> None:
        """Count a step that took so many seconds."""
        self.done += 1
        before = self.step_seconds
        self.step_seconds = seconds if before is None else before + WEIGHT * (seconds - before)
        left = self.remaining(end)
        said = {
            k.removesuffix("_loss"): f"{v:.4f}"
            for k, v in losses.items()
            if k in ("target_loss", "bank_loss", "teacher_loss")
        }
        self._bar.remaining = duration(left) if left is not None else "?"
        self._bar.set_postfix(said, refresh=False)
        self._bar.update(1)
        now = time.monotonic()
        if self.show and activities_are_shown() and self._bar.disable and now - self._said > EVERY:
            self._said = now
            figures = ", ".join(f"loss on {name} {value}" for name, value in said.items())
            say(f"training: step {self.done} of {end}, {figures}; {self._bar.remaining} to go")
