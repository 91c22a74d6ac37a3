"""The commands that a page starts: `difftune` processes that go on when the page is closed, and a queue of them.

Each has a JSON file and a log in the page's own folder. A command that trains waits while another one trains.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from difftuning_control.errors import UserError
from difftuning_control.system.durable import beside, free_folder
from difftuning_control.system.secrets import without_secrets
from difftuning_control.system.untrusted import from_json, read_text
from difftuning_control.verbs.ui.places import STATE, Places

WAITING, RUNNING, DONE, STOPPED, FAILED = "waiting", "running", "done", "stopped", "failed"
TRAINING = ("train", "resume")
MOST_LOG = 20_000  # bytes of a log's end that are shown
TICK = 1.0  # seconds between looks at what ended
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "PYTHONSAFEPATH": "1"}  # modules in the folder are not ours


@dataclass(frozen=True)
class Job:
    """A command and what became of it.

    Args:
        name: of its files; names sort as the jobs were asked for.
        arguments: of `difftune`.
        output: the folder that it writes, as its arguments name it.
        state: waiting, running, done, stopped or failed.
        pid, born: the process, and the second in which it began, since numbers are used again.
        is_asked_to_end: whether it has been sent SIGTERM; a second one would end it without a checkpoint.
    """

    name: str
    arguments: list[str]
    output: str
    state: str = WAITING
    pid: int | None = None
    born: float = 0.0
    is_asked_to_end: bool = False

    @property
    def verb(self) -> str:
        return self.arguments[0]

    @property
    def command(self) -> str:
        """As it is shown: what a shell would take, without secrets."""
        return without_secrets(shlex.join(["difftune", *self.arguments]))


@dataclass
class Jobs:
    """The commands of one folder; two pages of one folder see the same.

    Args:
        before_training: is called before a training starts, so that it has the memory.
    """

    places: Places
    before_training: Callable[[], object] = lambda: None
    _children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    # --- what is asked of them --------------------------------------------------------------------------------------

    def add(self, arguments: Sequence[str], output: str | Path) -> Job:
        """Put a command at the queue's end; it starts at once where nothing is before it.

        Raises:
            UserError: if another command that has not ended writes the same folder.
        """
        with self._alone():
            for other in self._read():
                if other.output == str(output) and other.state in (WAITING, RUNNING):
                    raise UserError(f"{self.places.name(Path(output))} is {other.state} already; wait for it.")
            job = Job(f"{time.time_ns():020d}-{secrets.token_hex(2)}", list(arguments), str(output))
            self._write(job)
            self._advance()
            return next(j for j in self._read() if j.name == job.name)

    def stop(self, name: str) -> Job:
        """Take a command out of the queue, or send it SIGTERM, once; a training then saves a checkpoint and ends.

        Raises:
            UserError: if there is no such command that has not ended.
        """
        with self._alone():
            job = next((j for j in self._read() if j.name == name), None)
            if job is None or job.state not in (WAITING, RUNNING):
                raise UserError("this command has ended already.")
            if job.state == WAITING:
                job = replace(job, state=STOPPED)
                self._write(job)
            elif not job.is_asked_to_end and (process := self._alive(job)) is not None:
                process.send_signal(signal.SIGTERM)
                job = replace(job, is_asked_to_end=True)
                self._write(job)
            return job

    def all(self) -> list[Job]:
        """The commands, the newest first, once what ended is noted and what waited has been started."""
        if not self._folder.is_dir():  # so that who only looks writes nothing
            return []
        with self._alone():
            self._advance()
            return self._read()[::-1]

    def free_place(self, folder: Path, stem: str) -> Path:
        """A place in a folder that is not there, and that no command which has not ended will write."""
        taken = {job.output for job in self._read() if job.state in (WAITING, RUNNING)}
        return free_folder(folder / stem, lambda place: place.exists() or str(place) in taken)

    def log(self, job: Job) -> str:
        """The end of what a command printed."""
        path = self._folder / f"{job.name}.log"
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - MOST_LOG))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        lines = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]
        return without_secrets("\n".join(lines).strip("\n"))

    def watch(self) -> None:
        """Go on with the queue for as long as this process lives, whether or not anybody looks."""

        def tick() -> None:
            while True:
                time.sleep(TICK)
                with suppress(OSError):  # of a disk that is full; the next look may find room
                    self.all()

        threading.Thread(target=tick, daemon=True).start()

    # --- how they are kept ------------------------------------------------------------------------------------------

    @property
    def _folder(self) -> Path:
        return self.places.state / "jobs"

    def _alone(self) -> Any:
        if not self._folder.is_dir():
            self._folder.mkdir(parents=True, exist_ok=True)
            (self.places.folder / STATE / ".gitignore").write_text("*\n", encoding="utf-8")
        return _Both(self._guard, FileLock(self._folder / ".lock"))

    def _read(self) -> list[Job]:
        found = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                found.append(Job(**from_json(read_text(path))))
            except (OSError, ValueError, TypeError):  # not ours, or of another version
                continue
        return found

    def _write(self, job: Job) -> None:
        # arguments as they are, since what starts is read from here: one may be a secret
        with beside(self._folder / f"{job.name}.json", private=True) as temporary:
            temporary.write_text(json.dumps(asdict(job), indent=2) + "\n", encoding="utf-8")

    def _advance(self) -> None:
        jobs = [self._looked_at(job) for job in self._read()]
        busy = any(j.state == RUNNING and j.verb in TRAINING for j in jobs)
        for job in jobs:
            if job.state == WAITING and not (busy and job.verb in TRAINING):
                self._start(job)
                busy = busy or job.verb in TRAINING

    def _looked_at(self, job: Job) -> Job:
        """A job as it is now."""
        if job.state != RUNNING:
            return job
        if self._alive(job) is not None:
            return job
        child = self._children.get(job.name)
        code = child.poll() if child is not None else None
        self._children.pop(job.name, None)
        code = self._code(job) if code is None else code
        if code is None or code in (130, 143, -signal.SIGTERM, -signal.SIGINT):  # None: killed, or the power went
            job = replace(job, state=STOPPED)
        else:
            job = replace(job, state=FAILED if code else DONE)
        self._write(job)
        return job

    def _alive(self, job: Job) -> subprocess.Popen | psutil.Process | None:
        """The process of a job: this page's own child, or one that an earlier page started."""
        child = self._children.get(job.name)
        if child is not None:  # the times at which others began move with the clock
            return child if child.poll() is None else None
        return _process(job)

    def _code(self, job: Job) -> int | None:
        """The exit code of a process that an earlier page started, where it left one."""
        try:
            return int(self._kept(job).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None

    def _kept(self, job: Job) -> Path:
        return self._folder / f"{job.name}.code"

    def _start(self, job: Job) -> None:
        if job.verb in TRAINING:
            self.before_training()
        kept = str(self._kept(job))
        words = [sys.executable, "-m", "difftuning_control.verbs.ui.keeping_code", kept, *job.arguments]
        with (self._folder / f"{job.name}.log").open("ab") as log:
            child = subprocess.Popen(
                words,
                cwd=self.places.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | ENVIRONMENT,
                start_new_session=True,  # Ctrl-C in the page's terminal is not for it
            )
        self._children[job.name] = child
        born = psutil.Process(child.pid).create_time()
        self._write(replace(job, state=RUNNING, pid=child.pid, born=born))


def _process(job: Job) -> psutil.Process | None:
    """The process of a job, if it lives."""
    try:
        process = psutil.Process(job.pid or 0)
        alive = abs(process.create_time() - job.born) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return None
    return process if alive else None


class _Both:
    """A lock of this process's threads and one of the machine's processes."""

    def __init__(self, guard: threading.Lock, lock: FileLock):
        self.guard, self.lock = guard, lock

    def __enter__(self) -> None:
        self.guard.acquire()
        try:
            self.lock.acquire()
        except BaseException:
            self.guard.release()
            raise

    def __exit__(self, *error: object) -> None:
        self.lock.release()
        self.guard.release()
