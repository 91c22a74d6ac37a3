"""The terminal: safe lines, progress bars, and the phases of a long command with their seconds."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType

from difftuning_control.system.secrets import without_secrets
from difftuning_control.system.text import harmless


@dataclass(frozen=True)
class _Phases:
    seconds: dict[str, float]
    show: bool


_PHASES: ContextVar[_Phases] = ContextVar("phases")


def say(text: str) -> None:
    """Print lines in which names and captions from outside cannot command the terminal."""
    print(shown(text))


def shown(text: str) -> str:
    """The text line by line without control characters and secrets."""
    return "\n".join(harmless(line) for line in without_secrets(text).split("\n"))


def crashed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python prints of an error that nobody expected, as `sys.excepthook`."""
    print(shown("".join(traceback.format_exception(kind, error, trace)).rstrip()), file=sys.stderr)


class Record(logging.LogRecord):
    """What libraries log: addresses with a password in them, and prompts."""

    def getMessage(self) -> str:  # noqa: N802 as it is called there
        return shown(super().getMessage())


@contextmanager
def phases(show: bool = True) -> Iterator[dict[str, float]]:
    """Inside, the seconds of each `phase` and `progress` are added up here by name.

    Args:
        show: print a line for each; also done where it encloses others that would not.
    """
    shown_phases = _Phases({}, show or phases_are_shown())
    token = _PHASES.set(shown_phases)
    try:
        yield shown_phases.seconds
    finally:
        _PHASES.reset(token)


def phases_are_shown() -> bool:
    return _current().show


def _current() -> _Phases:
    return _PHASES.get(None) or _Phases({}, False)


@contextmanager
def phase(text: str, show: bool = True, detail: str = "") -> Iterator[None]:
    """A part of the work that cannot be counted: named when it begins, with its seconds when it is over.

    Args:
        detail: what is shown behind the name.
    """
    show = show and phases_are_shown()
    if show:
        print(shown(f"{text}{detail and f' {detail}'} … "), end="", flush=True)
    begun = time.monotonic()
    try:
        yield
    except BaseException:
        if show:
            print(flush=True)
        raise
    seconds = add_phase(text, time.monotonic() - begun)
    if show:
        print(duration(seconds), flush=True)


def add_phase(text: str, seconds: float) -> float:
    """Count seconds to a phase; returns them."""
    totals = _current().seconds
    totals[text] = totals.get(text, 0.0) + seconds
    return seconds


def phase_seconds() -> dict[str, float]:
    """The seconds of the phases so far."""
    return dict(_current().seconds)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


@contextmanager
def progress(total: int, text: str, show: bool = True) -> Iterator[Callable[[int], object]]:
    """A progress bar, unless it is over at once; gives the function that is told of the number of items done."""
    from tqdm import tqdm  # saves it where nothing takes long

    begun = time.monotonic()
    with tqdm(total=total, desc=text, disable=not show, mininterval=1.0, delay=0.5, leave=False) as bar:
        yield bar.update
    seconds = add_phase(text, time.monotonic() - begun)
    if show and phases_are_shown():
        print(shown(f"{text} … {total} in {duration(seconds)}"), flush=True)
