"""`audit.jsonl`: who did what in a folder, when, by which command, and what came of it; each line chained to the last.

A line is one JSON object. `previous` is the hash of the line before it (64 zeros in the first), and `hash`, the last
key, the SHA-256 of the line as it would be without that key. So an edited, removed or exchanged line shows. What a
chain alone cannot show is that its end is missing, or that all of it was written anew: keep the last hash elsewhere.

Lines are appended under a lock, in one write, and synced to disk. What a power cut leaves of a line is told from an
edited one by the next line, which names the fragment's hash as `torn`.
"""

from __future__ import annotations

import errno
import getpass
import hashlib
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from difftuning_control.errors import UserError
from difftuning_control.runs.record import RECORD
from difftuning_control.system.digests import digest_of_file
from difftuning_control.system.durable import AUDIT, fcntl, sync_folder
from difftuning_control.system.secrets import HIDDEN, SECRET_NAME, without_secrets
from difftuning_control.system.version import VERSION

FILE = AUDIT
FIRST = "0" * 64
WHO = "DIFFTUNE_AUDIT_WHO"  # environment variable: who is named, or nobody where it is empty
COMMAND: ContextVar[list[str] | None] = ContextVar("command", default=None)  # the words of the command that runs
HASH = re.compile(rb', "hash": "([0-9a-f]{64})"\}$')
OPTION = re.compile(rf"(?i)--{SECRET_NAME}")


@dataclass(frozen=True)
class Chain:
    """What an audit file holds.

    Args:
        entries: the whole lines, in order.
        hashes: of these.
        faults: what is wrong with the chain, in words; none where it is whole.
        torn: how many lines a power cut left unfinished.
    """

    entries: list[dict[str, Any]] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    torn: int = 0

    @property
    def head(self) -> str | None:
        """The hash of the last line."""
        return self.hashes[-1] if self.hashes else None

    @property
    def is_ended(self) -> bool:
        """Whether the last session that began came to its end and vouched for the run's record."""
        begun = [e["session"] for e in self.entries if e["outcome"] == "begun"]
        ended = {e["session"] for e in self.entries if e["outcome"] == "done" and RECORD in e["artefacts"]}
        return not begun or begun[-1] in ended

    def has_another(self, run: Path) -> bool:
        """Whether the last session came to its end and vouched for another record than lies there now."""
        return self.is_ended and self.last_hash_of(RECORD) not in (None, digest_of_file(run / RECORD))

    def last_hash_of(self, artefact: str) -> str | None:
        """What the last line that names an artefact says of it."""
        return next((e["artefacts"][artefact] for e in reversed(self.entries) if artefact in e["artefacts"]), None)


class Session:
    """A command that works in a folder for long: a line when it begins, and one with how it ended.

    Nothing is written until `begin`: what is refused before it has changed nothing. What `artefacts` (names and
    hashes) and `said` hold at the end goes into the last line.
    """

    def __init__(self, folder: Path):
        self.folder, self.number = folder, ""
        self.artefacts: dict[str, str] = {}
        self.said: str | None = None

    def begin(self, recipe: str | None = None, said: str | None = None) -> None:
        """Write the line of the beginning.

        Args:
            recipe: the SHA-256 of the recipe.
            said: what a resumed run changes.
        """
        self.number, self.recipe = secrets.token_hex(4), recipe
        append(self.folder, "begun", said=said, recipe=recipe, session=self.number)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self.number:
            return
        outcome, said = how_it_ended(error)
        try:
            append(
                self.folder,
                outcome,
                said=said or self.said,
                recipe=self.recipe,
                session=self.number,
                artefacts=self.artefacts,
            )
        except OSError:
            if error is None:  # else the first error is the one to tell
                raise


@contextmanager
def noted(*folders: str | Path) -> Iterator[dict[str, str]]:
    """One line in each folder once the block is through, with the artefacts that it put into the dict.

    A refusal (UserError) before there are artefacts has changed nothing and leaves no line. Where a folder cannot be
    written, which need not be the command's own, that is said and nothing else happens.
    """
    artefacts: dict[str, str] = {}
    try:
        yield artefacts
    except BaseException as error:
        if artefacts or not isinstance(error, UserError):
            _note(folders, artefacts, error)
        raise
    _note(folders, artefacts, None)


def _note(folders: Sequence[str | Path], artefacts: dict[str, str], error: BaseException | None) -> None:
    outcome, said = how_it_ended(error)
    for folder in map(Path, folders):
        if error is not None and not folder.is_dir():  # it failed before there was anything
            continue
        try:
            append(folder, outcome, said=said, artefacts=artefacts)
        except OSError as reason:
            print(
                f"note: {folder / FILE} cannot be written ({reason.strerror}); this command is not in it",
                file=sys.stderr,
            )


def how_it_ended(error: BaseException | None) -> tuple[str, str | None]:
    """The outcome of a command by what it raised, and the sentence that goes with it."""
    if error is None:
        return "done", None
    if isinstance(error, Exception):
        return "failed", without_secrets(" ".join(str(error).split()) or type(error).__name__)
    return "interrupted", None


# --- writing --------------------------------------------------------------------------------------------------------


def append(
    folder: Path,
    outcome: str,
    *,
    said: str | None = None,
    recipe: str | None = None,
    session: str | None = None,
    artefacts: dict[str, str] | None = None,
) -> str:
    """Append a line to the folder's audit file and return its hash.

    Args:
        outcome: begun, done, failed or interrupted.
        said: the sentence of a failure.
        recipe: the SHA-256 of the recipe.
        session: which two lines belong together.
        artefacts: names and the SHA-256 of what was made.
    """
    path = folder / FILE
    is_new = not path.exists()
    with path.open("ab+") as file, _locked(file):
        file.seek(0)
        content = file.read()
        *lines, rest = content.split(b"\n")
        whole = bool(rest) and _is_whole(rest)  # only the end of the line is missing
        lines += [rest] if whole else []
        entry: dict[str, Any] = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "who": who(),
            "command": command(),
            "version": VERSION,
            "outcome": outcome,
            "said": said,
            "recipe": recipe,
            "session": session,
            "artefacts": artefacts or {},
            "previous": _last_hash(lines),
        }
        if rest and not whole:
            entry["torn"] = hashlib.sha256(rest).hexdigest()
        text = json.dumps(entry)
        digest = hashlib.sha256(text.encode()).hexdigest()
        line = f'{text[:-1]}, "hash": "{digest}"}}\n'
        file.write((b"\n" if rest else b"") + line.encode())
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync_folder(folder)
    return digest


def _last_hash(lines: list[bytes]) -> str:
    """The hash that the next line follows; fragments are passed over."""
    for line in reversed(lines):
        if (match := HASH.search(line)) is not None:
            return match[1].decode()
    return FIRST


@contextmanager
def _locked(file: BinaryIO) -> Iterator[None]:
    """While open, no other process appends to this file."""
    if fcntl is None:
        msvcrt: Any = import_module("msvcrt")  # Windows has this instead
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
        try:
            yield
        finally:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
    else:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # goes with the file
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # a file system that has no locks
                raise
        yield


def clear_but_audit(folder: Path) -> None:
    """Remove everything in a folder but its audit file, which tells of the replacement."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name != FILE:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def who() -> str | None:
    """user@host, or what the environment variable DIFFTUNE_AUDIT_WHO says; None where that is empty."""
    given = os.environ.get(WHO)
    if given is not None:
        return given or None
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # no such user in a container
        user = str(os.getuid()) if hasattr(os, "getuid") else "unknown"
    return f"{user}@{platform.node()}"


def command() -> str:
    """The command line that runs, without secrets."""
    words = COMMAND.get()
    words = [Path(sys.argv[0]).name, *sys.argv[1:]] if words is None else words
    return shlex.join(redacted_words(words))


def redacted_words(words: Sequence[str]) -> list[str]:
    """Words of a command line without secrets, the one after `--….token` among them."""
    after = [False, *(OPTION.fullmatch(word) is not None for word in words[:-1])]
    return [HIDDEN if hide else without_secrets(word) for word, hide in zip(words, after)]


# --- reading --------------------------------------------------------------------------------------------------------


def read_audit(folder: Path) -> Chain:
    """The folder's audit file, each line checked against its own hash and against the line before."""
    try:
        content = (folder / FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return Chain(faults=[f"there is no {FILE}"])
    *lines, rest = content.split(b"\n")
    chain, last = Chain(torn=int(bool(rest))), FIRST
    torn = int(bool(rest))
    for number, line in enumerate(lines, start=1):
        entry = _entry(line)
        if entry is None:
            following = _entry(lines[number]) if number < len(lines) else None
            if following is not None and following.get("torn") == hashlib.sha256(line).hexdigest():
                torn += 1
                continue
            chain.faults.append(f"line {number} was edited")
            claimed = HASH.search(line)
            last = claimed[1].decode() if claimed is not None else last
            continue
        if entry["previous"] != last:
            chain.faults.append(f"line {number} does not follow the line before: one was edited, removed or added")
        last = entry["hash"]
        chain.entries.append(entry)
        chain.hashes.append(last)
    return Chain(chain.entries, chain.hashes, chain.faults, torn)


def _entry(line: bytes) -> dict[str, Any] | None:
    """A line whose hash is right."""
    if not _is_whole(line):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if {"previous", "artefacts", "outcome"} <= entry.keys() else None


def _is_whole(line: bytes) -> bool:
    match = HASH.search(line)
    return match is not None and hashlib.sha256(line[: match.start()] + b"}").hexdigest() == match[1].decode()
