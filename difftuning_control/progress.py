"""Progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(total: int, text: str, show: bool = True) -> Iterator[Callable[[int], object]]:
    """A progress bar, unless it is over at once; gives the function that is told of the number of items done."""
    from tqdm import tqdm

    with tqdm(total=total, desc=text, disable=not show, mininterval=1.0, delay=0.5) as bar:
        yield bar.update
