"""A call in a process of its own that runs beside this one; what it prints is kept, and its error is raised here."""

from __future__ import annotations

import io
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import get_context, parent_process
from typing import Any

import torch


@contextmanager
def beside(function: Callable[..., Any], *arguments: Any, threads: int) -> Iterator[Callable[[], tuple[Any, str]]]:
    """Begin a call; inside, what is given waits for it: what it returned, and what it printed.

    Args:
        function, arguments: that another process can import and be sent; so can what is returned.
        threads: of torch there; here there are as many fewer while it is open.

    Raises:
        RuntimeError: when it is waited for, if the process ended without a word.
    """
    context = get_context("spawn")  # torch does not survive a fork
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(there, threads, function, arguments))
    usual = torch.get_num_threads()

    def result() -> tuple[Any, str]:
        try:
            returned, printed, trace = here.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"a process beside this one ended with {process.exitcode} and said nothing.") from None
        if isinstance(returned, BaseException):
            print(printed, end="", flush=True)
            raise returned from RuntimeError(trace)
        return returned, printed

    try:
        process.start()
        there.close()
        torch.set_num_threads(max(usual - threads, 1))
        yield result
    finally:
        torch.set_num_threads(usual)
        if process.pid is not None:
            process.terminate()  # nothing where it has ended
            process.join()
        here.close()


def _run(there: Any, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The other process, which a Ctrl-C leaves to the first to end, and which ends where the first was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    torch.set_num_threads(threads)
    printed, trace = io.StringIO(), ""
    returned: Any
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(printed), redirect_stderr(nowhere):
        try:
            returned = function(*arguments)
        except BaseException as error:
            returned, trace = _to_send(error), traceback.format_exc()
    there.send((returned, printed.getvalue(), trace))


def _end_with(first: Any) -> None:
    first.join()
    os._exit(1)


def _to_send(error: BaseException) -> BaseException:
    """The error, or what it says where it cannot be sent as it is."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
