"""SIGTERM and Ctrl-C, as schedulers and people send them: a command stops where it can go on later.

The first signal ends a command at once, except in training, which finishes its step and saves a checkpoint. A second
one ends the process as it stands. Exit codes are the shell's for these signals: 143 for SIGTERM, 130 for Ctrl-C.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

AGAIN = 2.0  # seconds within which a second signal is the first one, passed on by a launcher to its group
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # set by accelerate launch and torchrun
PARENT_DIES = 1  # PR_SET_PDEATHSIG of prctl(2)


class Interrupted(KeyboardInterrupt):
    """A signal that ends the command.

    Args:
        number: of the signal.
        saved: the step of the checkpoint that was saved, if one was.
    """

    def __init__(self, number: int, saved: int | None = None):
        super().__init__(number)
        self.number, self.saved = number, saved

    @property
    def code(self) -> int:
        return 128 + self.number

    def describe(self) -> str:
        what = "stopped by SIGTERM" if self.number == signal.SIGTERM else "interrupted"
        return what if self.saved is None else f"{what}, with a checkpoint of step {self.saved}"


class _Watch:
    """What was asked, when, and whether it is only noted."""

    number, since, deferring = 0, 0.0, False

    def __call__(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.number:
            if now - self.since > AGAIN:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.number, self.since = number, now
        if not self.deferring:
            raise Interrupted(number)


_watch = _Watch()


@contextmanager
def watched() -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C raise `Interrupted`, or are noted where that is deferred."""
    global _watch
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _watch = _Watch()
    before = {number: signal.signal(number, _watch) for number in (signal.SIGTERM, signal.SIGINT)}
    _die_with_launcher()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _watch = _Watch()


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a first signal is only noted; see `asked`."""
    _watch.deferring = True
    try:
        yield
    finally:
        _watch.deferring = False


def asked() -> int:
    """The number of the signal that was noted, or 0."""
    return _watch.number


def _die_with_launcher() -> None:
    """accelerate launch passes no signal on to its one process, which would train on alone: its end is a SIGTERM."""
    if sys.platform == "linux" and any(name in os.environ for name in LAUNCHED):
        ctypes.CDLL(None).prctl(PARENT_DIES, int(signal.SIGTERM), 0, 0, 0)
