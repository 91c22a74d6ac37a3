"""Tensors that stay in their files: rows are read when a batch asks for them, so memory does not grow with the data.

A safetensors file is read through once when it is opened, which checks its digest and takes a CRC-32 of every row. A
row is held against that whenever it is read, so that bytes which change meanwhile end a run and never train it. Rows
are read, not mapped: the system may keep the file's pages or drop them, and they are no part of the process's memory.
"""

from __future__ import annotations

import hashlib
import json
import threading
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from difftuning_control.errors import UserError
from difftuning_control.system.digests import DIGEST
from difftuning_control.system.tensors import title_of_tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
OPEN = 128  # files of a set that are held open at once


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Args:
        begin: where its bytes begin.
        places: the leading dimensions that can be asked for one by one.
        size: bytes at one place of these.
        sums: the CRC-32 of what is there, place by place.
    """

    dtype: torch.dtype
    shape: torch.Size
    begin: int
    places: torch.Size
    size: int
    sums: np.ndarray

    def find(self, index: tuple[int, ...]) -> tuple[int, int]:
        """The first place under an index of fewer dimensions, and how many there are."""
        first, count = 0, len(self.sums)
        for i, size in zip(index, self.places):
            if not 0 <= i < size:
                raise IndexError(f"{index} is not in {tuple(self.shape)}")
            count //= size
            first += i * count
        return first, count


class StoredFile:
    """The tensors of a safetensors file, none of them in memory, and the digest of their bytes.

    Args:
        lead: how many leading dimensions of its tensors can be asked for one by one.

    Raises:
        SafetensorError: if it is no whole safetensors file.
    """

    def __init__(self, path: Path, lead: int = 1):
        self.path, digest = path, hashlib.blake2b(digest_size=8)
        with safe_open(path, "pt") as checked:  # whether the header is true
            self.metadata: dict[str, str] = checked.metadata() or {}
        self.entries: dict[str, Entry] = {}
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size))
            header.pop("__metadata__", None)
            for name, values in sorted(header.items()):
                dtype, shape = DTYPES[values["dtype"]], torch.Size(values["shape"])
                entry = Entry(
                    dtype,
                    shape,
                    8 + size + values["data_offsets"][0],
                    shape[:lead],
                    prod(shape[lead:]) * dtype.itemsize,
                    np.zeros(prod(shape[:lead]), np.uint32),
                )
                digest.update(title_of_tensor(name, entry.shape, entry.dtype))
                file.seek(entry.begin)
                for place in range(len(entry.sums)):
                    part = file.read(entry.size)
                    digest.update(part)
                    entry.sums[place] = zlib.crc32(part)
                self.entries[name] = entry
        self.digest = digest.hexdigest()

    def read(self, file: IO[bytes], name: str, index: tuple[int, ...]) -> Tensor:
        """What is at one place of a tensor's first dimension, or of more of those that can be asked for.

        Raises:
            UserError: if it is not what it was when the file was opened.
        """
        entry = self.entries[name]
        first, count = entry.find(index)
        content = bytearray(count * entry.size)
        file.seek(entry.begin + first * entry.size)
        read = file.readinto(content)  # type: ignore[attr-defined]
        view, size = memoryview(content), entry.size
        sums = [zlib.crc32(view[i * size : (i + 1) * size]) for i in range(count)]
        if read != len(content) or sums != entry.sums[first : first + count].tolist():
            raise UserError(
                f"{self.path} changed while it was in use; run the command again (a training goes on from its last "
                "checkpoint with difftune resume)."
            )
        shape = entry.shape[len(index) :]
        return (
            torch.frombuffer(content, dtype=entry.dtype).view(shape)
            if content
            else torch.empty(shape, dtype=entry.dtype)
        )


def open_checked(path: Path, lead: int = 1) -> StoredFile | None:
    """A file that `write_checked` wrote; None if it is absent, or a single bit of it has changed."""
    try:
        stored = StoredFile(path, lead)
    except (FileNotFoundError, SafetensorError, KeyError):
        return None
    return stored if stored.metadata.get(DIGEST) == stored.digest else None


class Files:
    """A set of files whose tensors follow each other, at most so many of them open at once."""

    def __init__(self, files: Sequence[StoredFile]):
        self.files, self._handles, self._lock = list(files), OrderedDict[int, IO[bytes]](), threading.Lock()

    def __len__(self) -> int:
        return len(self.files)

    def file(self, number: int) -> StoredFile:
        return self.files[number]

    def read(self, number: int, name: str, index: tuple[int, ...]) -> Tensor:
        """See `StoredFile.read`."""
        file = self.file(number)
        with self._lock:
            return file.read(self._handle(number, file.path), name, index)

    def _handle(self, number: int, path: Path) -> IO[bytes]:
        if number not in self._handles:
            if len(self._handles) >= OPEN:
                self._handles.popitem(last=False)[1].close()
            self._handles[number] = path.open("rb", buffering=0)
        self._handles.move_to_end(number)
        return self._handles[number]

    def close(self) -> None:
        """Close what is held open; reading opens it again."""
        with self._lock:
            while self._handles:
                self._handles.popitem()[1].close()

    def __del__(self) -> None:
        self.close()

    @property
    def names(self) -> list[str]:
        """Of the tensors in each file."""
        return list(self.file(0).entries)

    def shape(self, number: int, name: str) -> torch.Size:
        return self.file(number).entries[name].shape

    def rows_in(self, number: int, name: str) -> int:
        """How many rows a file has."""
        return self.shape(number, name)[0]

    def rows(self, name: str) -> Rows:
        """The tensors of one name, one after another."""
        return Rows(self, name)

    def each(self, name: str) -> list[Rows]:
        """The tensors of one name, each by itself."""
        ends = [0, *accumulate(self.rows_in(i, name) for i in range(len(self)))]
        return [Rows(self, name, range(*ends[i : i + 2])) for i in range(len(self))]


class Rows:
    """A tensor (N, …) that lies in files. What is indexed is read: rows by a number, a slice or a list of numbers, and
    with [rows, places] one place of the second dimension each; `rows[:]` reads all. What is read belongs to the reader.

    Args:
        part: of all rows.
        at: a place of the dimensions after the first, where only that one is meant.
        function: makes rows (B, …) what they are, one by one.
    """

    def __init__(
        self,
        files: Files,
        name: str,
        part: range | None = None,
        at: tuple[int, ...] = (),
        function: Callable[[Tensor], Tensor] | None = None,
    ):
        self.files, self.name, self.at, self.function = files, name, at, function
        self.part = range(self._ends[-1]) if part is None else part

    @cached_property
    def _ends(self) -> list[int]:
        """How many rows there are up to the end of each file."""
        return list(accumulate(self.files.rows_in(i, self.name) for i in range(len(self.files))))

    def __len__(self) -> int:
        return len(self.part)

    @property
    def shape(self) -> torch.Size:
        first = self.files.shape(self._place(0)[0] if self.part else 0, self.name)
        return torch.Size([len(self), *first[1 + len(self.at) :]])

    @property
    def digest(self) -> str:
        """What `digest_of_tensors` gives for it under its name, known since the file was opened: of all rows of a file
        that holds nothing else."""
        file = self.files.file(self._place(0)[0])
        assert list(file.entries) == [self.name]
        assert len(self) == file.entries[self.name].shape[0]
        return file.digest

    def narrow(self, dim: int, start: int, length: int) -> Rows:
        """As of a tensor: rows start … start + length − 1, unread."""
        assert dim == 0
        return Rows(self.files, self.name, self.part[start : start + length], self.at, self.function)

    def first_of_each(self, function: Callable[[Tensor], Tensor]) -> Rows:
        """The first of each row's places, as a function makes them, unread."""
        return Rows(self.files, self.name, self.part, (0,), function)

    def __getitem__(self, index: Any) -> Tensor:
        rows, *more = (self._numbers(i) for i in (index if isinstance(index, tuple) else (index,)))
        if isinstance(rows, int):
            return self._read(rows, *more)
        wanted = list(zip(rows, *more))
        by_place = {place: self._read(*place) for place in dict.fromkeys(wanted)}  # the prompts of a batch repeat
        return torch.stack([by_place[place] for place in wanted])

    def _numbers(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(range(*index.indices(len(self))))
        return index.tolist() if isinstance(index, Tensor) else index

    def _place(self, row: int) -> tuple[int, int]:
        """The file of a row, and which one of that file's it is."""
        number = self.part[row]
        file = bisect_right(self._ends, number)
        return file, number - (self._ends[file - 1] if file else 0)

    def _read(self, row: int, *more: int) -> Tensor:
        file, number = self._place(row)
        tensor = self.files.read(file, self.name, (number, *self.at, *more))
        return tensor if self.function is None else self.function(tensor[None])[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))
