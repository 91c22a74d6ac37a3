"""Files and folders that are whole or not there, whatever ends the process: written beside, synced, renamed.

Every temporary name is `.<name>.….partial`, so that what a killed process left is known and swept away.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock

from difftuning_control.system.secrets import without_secrets

fcntl: Any = import_module("fcntl") if find_spec("fcntl") is not None else None  # not of Windows
PARTIAL = ".partial"
AUDIT = "audit.jsonl"  # tells of earlier commands, also of those that were refused or ended


def hidden(path: Path, ending: str) -> Path:
    """The hidden name with this ending beside a path, also beside `.`, which has no name of its own."""
    path = Path(os.path.abspath(path))
    return path.with_name(f".{path.name}{ending}")


def free_folder(folder: Path, is_taken: Callable[[Path], bool]) -> Path:
    """The folder itself, or the first of `folder-2`, `folder-3`, … that is not taken."""
    if not is_taken(folder):
        return folder
    folder = Path(os.path.abspath(folder))  # "." and ".." have no name
    return next(f for n in count(2) if not is_taken(f := folder.with_name(f"{folder.name}-{n}")))


@contextmanager
def beside(path: Path, private: bool = False) -> Iterator[Path]:
    """A temporary name in the folder of `path`, which takes its place when all went well; else nothing stays.

    Args:
        private: of a file that its owner alone may read, from its first byte on.

    Raises:
        OSError: with the name of `path`, if there is no space or no permission.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")  # containers share process numbers
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if private:
            temporary.touch(mode=0o600)
        yield temporary
        place(temporary, path, private)
    except OSError as error:
        if error.filename is None or str(temporary) in str(error.filename):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def place(temporary: Path, path: Path, private: bool = False) -> None:
    """Rename a file or a folder that is whole to a name that is free or of a file, once its bytes are on the disk.

    Args:
        private: leave the permissions as they are, and do not open it to whom the user lets read new files.
    """
    files = [p for p in temporary.rglob("*") if p.is_file()] if temporary.is_dir() else [temporary]
    opened = 0 if private else 0o666 & ~_umask()
    for file in files:
        if not file.is_symlink() and (mode := stat.S_IMODE(file.stat().st_mode)) | opened != mode:
            with suppress(PermissionError):  # FAT has no permissions
                os.chmod(file, mode | opened)  # safetensors writes for the owner alone
        sync(file)
    for folder in {file.parent for file in files if temporary.is_dir()}:
        sync_folder(folder)
    os.replace(temporary, path)
    sync_folder(path.parent)


def _umask() -> int:
    """What the user wants taken from the permissions of new files, which can only be asked for by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def discard(folder: Path) -> None:
    """Delete a folder that must never be met half deleted: it loses its name first.

    What cannot be deleted yet, such as a file that another program has open on a network disk, is left to `sweep`.
    """
    gone = hidden(folder, f".gone{PARTIAL}")
    shutil.rmtree(gone, ignore_errors=True)
    if gone.exists():  # what could not be deleted before
        gone = hidden(folder, f".gone{PARTIAL}{secrets.token_hex(4)}")
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def is_leftover(path: Path) -> bool:
    """Is this a temporary file or folder of ours, or a lock?"""
    return path.name.startswith(".") and (PARTIAL in path.name or path.name.endswith(".lock"))


def is_empty(folder: Path) -> bool:
    """Holds a folder nothing, or only what a killed process left and an audit?"""
    return all(p.name == AUDIT or is_leftover(p) for p in folder.iterdir())


def sweep(folder: Path, name: str = "*") -> None:
    """Delete the temporaries of killed processes for these names, as far as they can be deleted; only for who is alone
    in writing them."""
    for path in folder.glob(f".{name}{PARTIAL}*"):
        with suppress(OSError):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """While open, no other job on this machine makes `path`; the lock goes when the process does."""
    lock = FileLock(hidden(path, ".lock"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock:
        try:
            yield
        finally:
            free(lock)


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock whose file this user may only read; so it seems where that cannot be told."""
    if fcntl is None:
        return True
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except OSError:
        return True


def free(lock: FileLock) -> None:
    """Remove a lock's file while the lock is held: who waits for it sees that and takes a new one."""
    with suppress(OSError):
        Path(lock.lock_file).unlink(missing_ok=True)


def sync(file: Path) -> None:
    """Have a file's bytes on the disk."""
    handle = os.open(file, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)  # Windows syncs for who may write
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last; not every system can."""
    with suppress(OSError):
        sync(folder)


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name beside the target, then rename. Secrets are left out; what is no Unicode is escaped."""
    with beside(path) as temporary:
        temporary.write_text(without_secrets(text), encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n")
