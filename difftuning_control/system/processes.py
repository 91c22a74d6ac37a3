"""Several processes that act as one: who makes which part, and how the failure of one ends them all."""

from __future__ import annotations

import atexit
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from difftuning_control.errors import NonFiniteLossError, UserError
from difftuning_control.system.durable import alone, sweep
from difftuning_control.system.memory import no_memory
from difftuning_control.system.rows import Files, StoredFile, open_checked
from difftuning_control.system.tensors import write_checked

if TYPE_CHECKING:
    from accelerate import Accelerator

# keys of the store that all processes of a run can read: who failed first, and that it has said so
FIRST, FAILED = "difftuning-control/first", "difftuning-control/failed"
WATCH, PATIENCE = 0.5, 60.0  # seconds between two looks at them, and until a process that failed too ends by itself


@dataclass(frozen=True)
class Share:
    """One process's share of work that several do together; all of it where there is one process.

    Args:
        index, count: of the processes.
        wait: their barrier.
    """

    index: int = 0
    count: int = 1
    wait: Callable[[], object] = lambda: None

    @classmethod
    def of(cls, accelerator: Accelerator) -> Share:
        return cls(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)

    def numbers(self, total: int) -> range:
        """Which of `total` parts this process makes."""
        return range(self.index, total, self.count)

    def agreed(self, value: bool) -> bool:
        """What the first process finds; a file may appear between two processes' looks at it."""
        return value if self.count == 1 else bool(broadcast_object_list([value])[0])


ALONE = Share()


def files_together(
    paths: Sequence[Path],
    make: Callable[[int], dict[str, Tensor]],
    share: Share,
    advance: Callable[[int], object] = lambda number: None,
    lead: int = 1,
) -> Files:
    """The files; each one that is not there, or is damaged, is made by one process.

    Args:
        make: from a file's number to its tensors; it waits for no other process, since it runs under the file's lock.
        advance: told of the number of each file that this process did not make.
        lead: how many leading dimensions of the tensors can be read one by one.
    """

    def file_of(number: int) -> StoredFile:
        return kept(paths[number], partial(make, number), partial(advance, number), lead)

    files = {number: file_of(number) for number in share.numbers(len(paths))}
    share.wait()  # with no lock held
    # where the others' files are not seen, they are made again
    return Files([files[number] if number in files else file_of(number) for number in range(len(paths))])


def kept(path: Path, make: Callable[[], dict[str, Tensor]], there: Callable[[], object], lead: int = 1) -> StoredFile:
    """A file of the cache, made anew where it is absent or damaged.

    Of several jobs on a machine that share a cache one makes it, and the others wait. `there()` is called where it was
    not made.
    """
    stored = open_checked(path, lead)
    if stored is None:
        with alone(path):
            stored = open_checked(path, lead)  # perhaps the job that we waited for has made it
            if stored is None:
                sweep(path.parent, path.name + "*")
                write_checked(path, make())
                stored = open_checked(path, lead)
                assert stored is not None
                return stored
    there()
    return stored


@contextmanager
def ending_together(accelerator: Accelerator) -> Iterator[None]:
    """Inside, what one process raises ends them all, also those that wait for it: the first to fail raises its error,
    marked `speaks_for_all`, and once it has ended the others do without a word and with the same exit code."""
    if accelerator.num_processes == 1:
        yield
        return
    store, over = torch.distributed.distributed_c10d._get_default_store(), threading.Event()
    watcher = threading.Thread(target=_watch, args=(store.clone(), over), daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:
        mine = f"{accelerator.process_index} {_exit_code(error)}"
        first = store.compare_set(FIRST, "", mine).decode()
        if first != mine:
            time.sleep(PATIENCE)  # the watcher ends this process
            raise SystemExit(int(first.split()[1])) from None
        error.speaks_for_all = True  # type: ignore[attr-defined]  # see cli
        atexit.register(_end_the_others, store, _exit_code(error))  # launchers kill all once one ends: speak first
        raise
    finally:
        over.set()
        watcher.join()


def _end_the_others(store: Any, code: int) -> None:
    store.set(FAILED, str(code))
    time.sleep(3 * WATCH)  # the store may end with this process, and the others must have read it


def _watch(store: Any, over: threading.Event) -> None:
    """End this process, wherever it waits, once another one has failed."""
    while not over.wait(WATCH):
        try:
            if store.check([FAILED]) and not over.is_set():
                os._exit(int(store.get(FAILED).decode()))
        except RuntimeError:  # the store is gone, and with it whoever kept it
            return


def _exit_code(error: BaseException) -> int:
    if isinstance(code := getattr(error, "code", None), int):  # of SystemExit, and of signals
        return code
    codes: tuple[tuple[type[BaseException], int], ...] = (
        (UserError, 2),
        (OSError, 2),
        (NonFiniteLossError, 3),
        (KeyboardInterrupt, 130),
    )
    if no_memory(error) is not None:
        return 2
    return next((code for kind, code in codes if isinstance(error, kind)), 1)


def check_shared(accelerator: Accelerator, folder: Path, option: str) -> None:
    """Refuse a folder that not every process sees: they read there what others wrote.

    Raises:
        UserError: naming the option that names the folder.
    """
    if accelerator.num_processes == 1:
        return
    name = broadcast_object_list([f".seen-by-all-{uuid.uuid4().hex}"])[0]
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    accelerator.wait_for_everyone()
    seen = all(gather_object([(folder / name).exists()]))
    if accelerator.is_main_process:
        (folder / name).unlink(missing_ok=True)
    if not seen:
        raise UserError(
            f"the folder {folder} is not the same for all processes; give one on a disk that all machines share, with "
            f"--{option}."
        )
