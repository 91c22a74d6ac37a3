"""The rows of the next forward, read, checked and pinned by a thread while the model computes on those of this one."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from difftuning_control.data.batches import TrainingRows


class Source(Protocol):
    """What gives the rows of a forward, whichever are asked for; a thread may ask."""

    def rows(self, step: int, forward: int = 0) -> TrainingRows: ...


class RowReader:
    """Reads one forward ahead.

    Args:
        forwards: to an optimizer step.
        ahead: whether the source may be asked by a thread.
        pinned: keep the rows where a GPU copies them from without anybody waiting.
    """

    def __init__(self, source: Source, forwards: int = 1, ahead: bool = True, pinned: bool = False):
        self.source, self.forwards, self.pinned = source, forwards, pinned
        self._thread = ThreadPoolExecutor(1, "rows") if ahead else None
        self._next: tuple[tuple[int, int], Future[TrainingRows]] | None = None

    def rows(self, step: int, forward: int = 0, more: bool = True) -> TrainingRows:
        """The rows of a forward; where `more` follow, those of the next one are read from now on.

        Raises:
            UserError: if they cannot be read.
        """
        place, batch = (step, forward), None
        if self._next is not None:
            ahead, future = self._next
            self._next = None
            batch = future.result() if ahead == place else None
        if batch is None:
            batch = self._read(*place)
        if more and self._thread is not None:
            after = (step, forward + 1) if forward + 1 < self.forwards else (step + 1, 0)
            self._next = (after, self._thread.submit(self._read, *after))
        return batch

    def _read(self, step: int, forward: int) -> TrainingRows:
        rows = self.source.rows(step, forward)
        return rows.pinned() if self.pinned else rows
