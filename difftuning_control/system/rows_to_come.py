"""Tensors in files that are made when somebody first asks for one of their rows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from difftuning_control.system.rows import Files, StoredFile


class FilesToCome(Files):
    """Files that are made when something of them is first asked for, which the thread that made this set may do.

    Args:
        counts: the rows that each is going to have.
        make: from a file's number to the file; its tensors have the same shape as the others' but for the rows.
    """

    def __init__(self, counts: Sequence[int], make: Callable[[int], StoredFile]):
        super().__init__([])
        self.counts, self._make, self._made = list(counts), make, dict[int, StoredFile]()
        self._thread = threading.get_ident()

    def __len__(self) -> int:
        return len(self.counts)

    def file(self, number: int) -> StoredFile:
        found = self._made.get(number)
        if found is None:
            if threading.get_ident() != self._thread:
                raise RuntimeError(f"file {number} is not there yet, and a thread asks for it that may not make it.")
            found = self._made[number] = self._make(number)
        return found

    def shape(self, number: int, name: str) -> torch.Size:
        """Known of all files once one is there."""
        any_file = next(iter(self._made.values()), None) or self.file(number)
        return torch.Size([self.counts[number], *any_file.entries[name].shape[1:]])

    def rows_in(self, number: int, name: str) -> int:
        return self.counts[number]

    def is_made(self, number: int) -> bool:
        return number in self._made

    def move(self, files: Sequence[StoredFile]) -> None:
        """Read the same files in another place from now on."""
        self.close()
        self._made = dict(enumerate(files))
