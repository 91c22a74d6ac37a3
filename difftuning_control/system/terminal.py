"""Progress bars."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from difftuning_control.system.secrets import without_secrets
from difftuning_control.system.text import harmless


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
def progress(total: int, text: str, show: bool = True) -> Iterator[Callable[[int], object]]:
    """A progress bar, unless it is over at once; gives the function that is told of the number of items done."""
    from tqdm import tqdm  # saves it where nothing takes long

    with tqdm(total=total, desc=text, disable=not show, mininterval=1.0, delay=0.5) as bar:
        yield bar.update
