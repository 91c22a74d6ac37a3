"""Files that are made when they are first asked for, by nobody but who may make them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from difftuning_control.system.rows import StoredFile
from difftuning_control.system.rows_to_come import FilesToCome
from difftuning_control.system.tensors import write_checked


@pytest.fixture
def files(tmp_path: Path) -> tuple[FilesToCome, list[int]]:
    """Three files of 2, 2 and 1 rows, which hold their own numbers, and those that were made."""
    made: list[int] = []

    def make(number: int) -> StoredFile:
        made.append(number)
        path = tmp_path / f"{number}.safetensors"
        rows = range(2 * number, min(2 * number + 2, 5))
        write_checked(path, {"x": torch.tensor([[float(r)] * 3 for r in rows])})
        return StoredFile(path)

    return FilesToCome([2, 2, 1], make), made


def test_a_file_is_made_once_and_when_a_row_of_it_is_asked_for(files):
    found, made = files
    rows = found.rows("x")
    assert torch.equal(rows[3], torch.full((3,), 3.0))
    assert made == [1]
    assert rows.shape == (5, 3)
    assert torch.equal(rows.narrow(0, 2, 2)[:], torch.tensor([[2.0] * 3, [3.0] * 3]))
    assert made == [1]
    assert torch.equal(rows[:][:, 0], torch.arange(5.0))
    assert made == [1, 0, 2]
    assert all(found.is_made(number) for number in range(3))


def test_a_thread_reads_what_is_there_and_makes_nothing(files):
    found, made = files
    rows = found.rows("x")
    rows[0]
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(lambda: rows[1]).result()[0] == 1
        with pytest.raises(RuntimeError, match="file 2 is not there yet"):
            thread.submit(lambda: rows[4]).result()
    assert made == [0]


def test_files_that_moved_are_read_where_they_are(files, tmp_path: Path):
    found, made = files
    rows = found.rows("x")
    rows[:]
    places = [tmp_path / f"{number}.safetensors" for number in range(3)]
    there = [path.rename(tmp_path / f"moved-{path.name}") for path in places]
    found.move([StoredFile(path) for path in there])
    assert torch.equal(rows[:][:, 0], torch.arange(5.0))
    assert len(made) == 3
