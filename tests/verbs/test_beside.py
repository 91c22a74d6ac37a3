"""A call in a process of its own: its result, what it printed, its error, and its end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from difftuning_control.errors import UserError
from difftuning_control.pipelines.strength import as_strength
from difftuning_control.verbs.beside import beside


@pytest.fixture(autouse=True)
def two_threads():
    """Of torch here, whatever the test process has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_call_beside_gives_what_it_returned_and_printed():
    with beside(torch.get_num_threads, threads=1) as count, beside(print, "red", "blue", threads=1) as said:
        assert torch.get_num_threads() == 1  # of two, the other of the one beside
        assert count() == (1, "")
        assert said() == (None, "red blue\n")
    assert torch.get_num_threads() == 2


@pytest.mark.wide
def test_its_error_is_raised_here_where_it_is_waited_for():
    with beside(as_strength, {"kind": "steep"}, threads=1) as wrong, beside(int, "x", threads=1) as worse:
        with pytest.raises(UserError, match="the schedule's kind is 'steep'; expected one of"):
            wrong()
        with pytest.raises(ValueError, match="invalid literal") as raised:
            worse()
    assert "beside.py" in str(raised.value.__cause__)  # what was called there


@pytest.mark.wide
def test_a_process_that_ends_without_a_word_is_said_and_one_that_nobody_waits_for_is_ended():
    begun = time.monotonic()
    said = pytest.raises(RuntimeError, match="ended with 3 and said nothing")
    with beside(time.sleep, 600, threads=1), beside(os._exit, 3, threads=1) as lost, said:
        lost()
    assert time.monotonic() - begun < 300


@pytest.mark.wide
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows ends processes in another way")
def test_it_ends_where_the_first_process_is_killed():
    script = (
        "import multiprocessing, time\nfrom difftuning_control.verbs.beside import beside\n"
        "with beside(time.sleep, 600, threads=1):\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n    time.sleep(600)\n"
    )
    first = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    other = int(first.stdout.readline())
    time.sleep(1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    deadline = time.monotonic() + 120
    while _runs(other) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _runs(other)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not (status.exists() and "State:\tZ" in status.read_text())  # who ended, and nobody has asked for
