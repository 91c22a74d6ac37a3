"""Kills at chosen moments, cheaply: every command runs in a fork of one process that has imported everything.

A moment is either a time, or the n-th call by which files come and go (open for writing, rename, unlink, rmdir, mkdir,
fsync, the writing of a safetensors file), so that windows of microseconds are met too. Nothing in the package knows
of it: the calls are seen through Python's audit events and two wrapped functions.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difftuning_control.runs.audit import FILE, read_audit
from difftuning_control.system.digests import digest_of_file

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
PHASES = ("bank building", "caching", "annotating", "training", "checkpointing", "exporting")
# of report.html, the same
SPEED = re.compile(r'[\d a-z.]+ on [^<]+ steps per second|<section class="phases">.*?</section>', re.DOTALL)
PARTS = {
    "checkpoint-": "checkpointing",
    "/banks/": "bank building",
    "conditions-": "annotating",
    "control-": "annotating",
    "/cache/": "caching",
}
TIMES = {"timings", "phases", "steps_per_second"}  # of run.json: seconds, which no two runs share


@dataclass(frozen=True)
class Moment:
    """When the child is sent `kind`: at call number `call` of a phase, or after some seconds."""

    kind: signal.Signals
    phase: str = ""
    call: int | None = None
    seconds: float = 0.0


@dataclass
class Outcome:
    """How a child ended: its exit code (−signal if it was killed), what it said, its calls by phase, its seconds, and
    the phase in which it was sent a signal, if it had come to one."""

    code: int
    said: str
    calls: list[str]
    seconds: float
    struck: str = "starting"


class _Calls:
    """Counts the calls that change files below a folder, and sends the signal at the chosen one."""

    def __init__(self, root: Path, verb: str, log: Path, moment: Moment | None):
        self.root, self.verb, self.moment, self.counts = str(root), verb, moment, Counter[str]()
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.busy = False

    def phase(self, path: str) -> str:
        if self.verb in ("bank", "export"):
            return {"bank": "bank building", "export": "exporting"}[self.verb]
        return next((name for part, name in PARTS.items() if part in path), "training")

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or self.busy:
            return
        path = arguments[0]
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax")):
            return
        if isinstance(path, (str, os.PathLike)):
            self.seen(os.fspath(path))

    def seen(self, path: str) -> bool:
        """Note a call; true if it is the chosen one, where it comes back at all."""
        if not path.startswith(self.root) and os.path.isabs(path):
            return False
        phase = self.phase(path)
        self.counts[phase] += 1
        os.write(self.log, f"{phase}\n".encode())
        if self.moment is None or (self.moment.phase, self.moment.call) != (phase, self.counts[phase]):
            return False
        os.kill(os.getpid(), self.moment.kind)
        return True

    def install(self) -> None:
        from difftuning_control.system import tensors as fingerprint

        fsync, save_file = os.fsync, fingerprint.save_file

        def counted_fsync(handle: int) -> None:
            self.seen(os.path.realpath(f"/proc/self/fd/{handle}"))
            fsync(handle)

        def torn_save_file(tensors: Any, path: Path, metadata: Any = None) -> None:
            """Half of the file is on the disk when the signal comes."""
            save_file(tensors, path, metadata)
            whole = Path(path).read_bytes()
            phase = self.phase(str(path))
            if self.moment is not None and (self.moment.phase, self.moment.call) == (phase, self.counts[phase] + 1):
                self.busy = True
                os.truncate(path, len(whole) // 2)
                self.busy = False
            if self.seen(str(path)):
                Path(path).write_bytes(whole)

        os.fsync, fingerprint.save_file = counted_fsync, torn_save_file
        sys.addaudithook(self.hook)


@dataclass(frozen=True)
class Child:
    """A command that runs in a fork of this process."""

    number: int
    begun: float
    log: Path
    said: Path

    def kill_after(self, seconds: float, kind: signal.Signals) -> str:
        """Send a signal after some seconds; gives the phase that it met."""
        time.sleep(seconds)
        os.kill(self.number, kind)  # of a child that has ended, a zombie takes it
        return self.log.read_text().split("\n")[-2] if self.log.exists() and self.log.stat().st_size else "starting"

    def end(self, struck: str = "") -> Outcome:
        """Wait until it has ended."""
        _, status = os.waitpid(self.number, 0)
        seconds = time.monotonic() - self.begun
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        said = self.said.read_text() if self.said.exists() else ""
        return Outcome(os.waitstatus_to_exitcode(status), said, calls, seconds, struck)


def start(arguments: list[str], root: Path, moment: Moment | None = None, name: str = "") -> Child:
    """`difftune` with these arguments in a fork of this process; changes below `root`/work count.

    Args:
        name: tells the files beside `work` of children that run at once apart.
    """
    log, said = root / f"calls{name}.log", root / f"said{name}.log"
    for path in (log, said):
        path.unlink(missing_ok=True)
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_the_command(arguments, root, log, said, moment)
    return Child(child, begun, log, said)


def run(arguments: list[str], root: Path, moment: Moment | None = None) -> Outcome:
    """The same, and how it ended."""
    child = start(arguments, root, moment)
    if moment is None or moment.call is not None:
        return child.end(moment.phase if moment is not None else "")
    return child.end(child.kill_after(moment.seconds, moment.kind))


def _be_the_command(arguments: list[str], root: Path, log: Path, said: Path, moment: Moment | None) -> None:
    code = 70
    try:
        handle = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        from difftuning_control import cli

        _Calls(root / "work", arguments[0], log, moment).install()
        cli.main(arguments)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        (root / "modules.log").write_text("\n".join(sorted(sys.modules)))
        os._exit(code)


def import_what_it_imported(root: Path) -> None:
    """Import here what the last command imported, so that later forks need not."""
    for name in (root / "modules.log").read_text().splitlines():
        if name not in sys.modules and "__main__" not in name:
            with suppress(Exception):
                importlib.import_module(name)


def contents(folder: Path) -> dict[str, Any]:
    """Every file below a folder by name: its bytes, without the seconds that run.json and report.html have.

    Not counted are locks, empty files that the next command removes when it comes by, and `audit.jsonl`, which has a
    line of every command: when it was given, and which began and did not end (see `broken_audits`).
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name == FILE or (path.name.endswith(".lock") and path.stat().st_size == 0):
            continue
        name = path.relative_to(folder).as_posix()
        if path.name == "report.html":
            found[name] = SPEED.sub("", path.read_text())
        elif path.name == "run.json":
            values = {k: v for k, v in json.loads(path.read_text()).items() if k not in TIMES}
            if "report.html" in (hashes := values.get("files", {})):
                hashes["report.html"] = hashes["report.html"] == digest_of_file(path.with_name("report.html"))
            found[name] = values
        else:
            found[name] = path.read_bytes()
    return found


def broken_audits(folder: Path) -> list[str]:
    """What is wrong with the audits below a folder: each chain is whole, and the record it vouches for is there."""
    found = []
    for path in sorted(folder.rglob(FILE)):
        chain, record = read_audit(path.parent), path.with_name("run.json")
        found += [f"{path}: {fault}" for fault in chain.faults]
        if record.exists() and not chain.is_ended:
            found.append(f"{path}: the last run did not end")
        if record.exists() and chain.last_hash_of("run.json") != digest_of_file(record):
            found.append(f"{path}: vouches for another run.json")
    return found


def flags(values: dict[str, object]) -> list[str]:
    return [f"--{key}={value}" for key, value in values.items()]


def commands(model: Path, pictures: Path, work: Path) -> dict[str, list[str]]:
    """A command by scenario, each as a user would give it again after any interruption."""
    common = {
        "model.id": model,
        "data.path": pictures,
        "data.cache": work / "cache",
        "data.holdout": 0.25,
        "bank.size": 70,
        "bank.steps": 1,
        "bank.batch_size": 35,
    }
    training = {
        "training.max_steps": 6,
        "training.batch_size": 5,
        "training.checkpoint_every": 2,
        "training.resume": "true",
        "training.validation_size": 2,
        "training.validate_every": 3,
        "training.sample_every": 0,
        "training.ema_decay": 0.9,
        "output": work / "run",
    }
    fidelity = {"control.fidelity.every": 3, "control.fidelity.size": 2, "control.fidelity.steps": 1}
    return {
        "bank": ["bank", *flags(common | {"bank.path": work / "bank", "bank.size": 140})],
        "train": ["train", *flags(common | training | {"training.save_at": "[3]"})],
        "controlnet": [
            "train",
            *flags(common | training | fidelity | {"method": "controlnet", "control.annotator": "canny"}),
        ],
        "export": ["export", str(work.parent / "finished"), "--to", str(work / "export"), "--overwrite"],
    }


def again(root: Path) -> None:
    shutil.rmtree(root / "work", ignore_errors=True)
    (root / "work").mkdir()
