"""The commands that a page starts: one training after the other, stopped, found again by another page."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from difftuning_control.errors import UserError
from difftuning_control.verbs.ui.jobs import Job, Jobs
from difftuning_control.verbs.ui.places import STATE, Places

SLEEPS = "import time; print('began', flush=True); time.sleep(60)"


class Sleeping(Jobs):
    """Jobs whose processes sleep, so that no model is loaded here."""

    def _start(self, job: Job) -> None:
        real = subprocess.Popen
        try:
            subprocess.Popen = lambda words, **more: real([sys.executable, "-c", SLEEPS], **more)  # type: ignore
            super()._start(job)
        finally:
            subprocess.Popen = real  # type: ignore


@pytest.fixture
def jobs(tmp_path):
    found = Sleeping(Places.of(tmp_path))
    yield found
    for job in found._read():
        if job.state in ("running", "waiting"):
            found.stop(job.name)


def until(what, seconds: float = 20.0):
    end = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def states(jobs: Jobs) -> list[str]:
    return [job.state for job in jobs.all()][::-1]


def test_who_only_looks_writes_nothing(jobs, tmp_path):
    assert jobs.all() == []
    assert [*tmp_path.iterdir()] == []


def test_trainings_wait_for_one_another_and_others_do_not(jobs, tmp_path):
    for arguments in (["train"], ["resume"], ["export"]):
        jobs.add(arguments, tmp_path / arguments[0])
    assert states(jobs) == ["running", "waiting", "running"]
    jobs.stop(jobs.all()[-1].name)
    assert until(lambda: states(jobs) == ["stopped", "running", "running"])


def test_what_waits_is_taken_out_and_what_ended_is_not_stopped_again(jobs, tmp_path):
    jobs.add(["train"], tmp_path / "a")
    waiting = jobs.add(["train"], tmp_path / "b")
    jobs.stop(waiting.name)
    assert states(jobs) == ["running", "stopped"]
    with pytest.raises(UserError, match="has ended already"):
        jobs.stop(waiting.name)


def test_two_pages_do_not_start_two_commands_on_one_folder(jobs, tmp_path):
    jobs.add(["train"], tmp_path / "a")
    with pytest.raises(UserError, match="a is running already"):
        Sleeping(jobs.places).add(["train"], tmp_path / "a")


def test_another_page_finds_what_runs_and_stops_it(jobs, tmp_path):
    job = jobs.add(["train"], tmp_path / "a")
    other = Sleeping(jobs.places)
    assert states(other) == ["running"]
    other.stop(job.name)
    assert until(lambda: states(jobs) == ["stopped"])
    assert states(other) == ["stopped"]


def test_a_clock_that_is_set_while_a_training_runs_does_not_end_it(jobs, tmp_path):
    """By which the times move at which processes began."""
    job = jobs.add(["train"], tmp_path / "a")
    jobs._write(replace(job, born=job.born + 3600))
    assert states(jobs) == ["running"]
    jobs.stop(job.name)
    assert until(lambda: states(jobs) == ["stopped"])


def test_a_number_that_another_process_has_now_is_not_stopped(jobs, tmp_path):
    job = jobs.add(["train"], tmp_path / "a")
    jobs._write(replace(job, pid=os.getpid(), born=1.0))
    jobs._children.pop(job.name).terminate()  # as where an earlier page had started it
    assert states(jobs) == ["stopped"]
    jobs._write(replace(job, pid=os.getpid(), born=1.0))
    jobs.stop(job.name)  # does not end this process
    assert states(jobs) == ["stopped"]


STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True)); "
STUBBORN += "print('began', flush=True); time.sleep(60)"


def test_a_second_stop_sends_nothing_since_it_would_end_a_training_without_a_checkpoint(jobs, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "SLEEPS", STUBBORN)
    job = jobs.add(["train"], tmp_path / "a")
    assert until(lambda: jobs.log(job) == "began")
    jobs.stop(job.name)
    assert until(lambda: jobs.log(job) == "began\nasked")
    assert jobs.stop(job.name).is_asked_to_end
    time.sleep(0.2)
    assert (jobs.log(job), states(jobs)) == ("began\nasked", ["running"])
    jobs._children[job.name].kill()
    assert until(lambda: states(jobs) == ["failed"])


def test_what_was_killed_after_its_page_is_stopped(jobs, tmp_path):
    job = jobs.add(["export"], tmp_path / "a")
    jobs._children[job.name].kill()
    jobs._children[job.name].wait()
    assert states(Sleeping(jobs.places)) == ["stopped"]


def test_the_log_is_what_was_printed_without_secrets(jobs, tmp_path, monkeypatch):
    job = jobs.add(["train"], tmp_path / "a")
    assert until(lambda: jobs.log(job) == "began")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x1" * 12)
    with (tmp_path / STATE / "jobs" / f"{job.name}.log").open("a") as log:
        log.write("one\rtwo\n" + os.environ["HF_TOKEN"])
    assert jobs.log(job) == "began\ntwo\n(secret)"


def test_an_argument_that_looks_like_a_secret_reaches_the_command_and_is_not_shown(jobs, tmp_path):
    cache = "--data.cache=sk-watercolour-2024"
    jobs.add(["train"], tmp_path / "first")
    waits = jobs.add(["train", cache, "--model.id=a b"], tmp_path / "sk-watercolour-2024")
    assert Sleeping(jobs.places).all()[0].arguments == ["train", cache, "--model.id=a b"]
    assert waits.output == str(tmp_path / "sk-watercolour-2024")
    assert waits.command == "difftune train --data.cache=(secret) '--model.id=a b'"
    if os.name == "posix":
        assert {path.stat().st_mode & 0o777 for path in (jobs.places.state / "jobs").glob("*.json")} == {0o600}


def test_a_place_that_a_command_will_write_is_not_free(jobs, tmp_path):
    (tmp_path / "mine").mkdir()
    jobs.add(["train"], tmp_path / "other")
    waits = jobs.add(["train"], tmp_path / "mine-2")
    assert jobs.free_place(tmp_path, "mine") == tmp_path / "mine-3"
    jobs.stop(waits.name)
    assert jobs.free_place(tmp_path, "mine") == tmp_path / "mine-2"


def test_a_real_command_ends_and_a_wrong_one_fails_as_another_page_sees_too(tmp_path):
    jobs, other = Jobs(Places.of(tmp_path)), Jobs(Places.of(tmp_path))
    added = [jobs.add(["recipes", name], tmp_path / name) for name in ("emoji_lora", "nothing_of_this_name")]
    assert all(child.wait(100) is not None for child in jobs._children.values())
    assert states(other) == ["done", "failed"]
    for job in added:
        jobs._write(replace(job, state="running"))
    assert until(lambda: states(jobs) == ["done", "failed"])
    assert "there is no recipe" in jobs.log(jobs.all()[0])
    assert "method" in jobs.log(jobs.all()[1])
