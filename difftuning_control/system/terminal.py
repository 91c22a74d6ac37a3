"""The terminal: safe lines, progress bars, and a line for each activity of a long command with its seconds."""

from __future__ import annotations

import logging
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType

from difftuning_control.system.secrets import without_secrets
from difftuning_control.system.text import harmless

_SHOWN: ContextVar[bool] = ContextVar("shown", default=False)


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
def showing_activities(show: bool = True) -> Iterator[None]:
    """Inside, each `activity` and `progress` prints its line.

    Args:
        show: off changes nothing, so that what encloses others decides for them.
    """
    token = _SHOWN.set(show or activities_are_shown())
    try:
        yield
    finally:
        _SHOWN.reset(token)


def activities_are_shown() -> bool:
    return _SHOWN.get()


@contextmanager
def activity(text: str, show: bool = True, detail: str = "") -> Iterator[None]:
    """A part of the work that cannot be counted: named when it begins, with its seconds when it is over.

    Args:
        detail: what is shown behind the name.
    """
    show = show and activities_are_shown()
    if show:
        print(shown(f"{text}{detail and f' {detail}'} … "), end="", flush=True)
    begun = time.monotonic()
    try:
        yield
    except BaseException:
        if show:
            print(flush=True)
        raise
    if show:
        print(duration(time.monotonic() - begun), flush=True)


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
    if show and activities_are_shown():
        print(shown(f"{text} … {total} in {duration(time.monotonic() - begun)}"), flush=True)


def sample_command(folder: str, prompts: Sequence[str], more: str = "") -> str:
    """The `difftune sample` of a run to go on with, for the first of its prompts, to be pasted into a shell."""
    prompt = shlex.quote(prompts[0]) if prompts else '"a prompt"'
    return f"difftune sample {shlex.quote(folder)} {prompt}{more} --compare"
