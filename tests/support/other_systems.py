"""A process in which Python has only what it has on Windows: `python -c "from support.other_systems import …"`.

What others have imported by then keeps what it found; what this package imports or calls afterwards finds it missing.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "crypt", "spwd", "nis", "posix")
OF_OS = (
    *("fork", "forkpty", "getuid", "geteuid", "getgid", "getpgid", "getpgrp", "setsid", "killpg", "nice", "uname"),
    *("sched_getaffinity", "sched_setaffinity", "getloadavg", "chown", "lchown", "fchmod", "fchown", "mkfifo", "mknod"),
    *("O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_SYNC", "O_DSYNC", "O_CLOEXEC", "WNOHANG", "wait", "waitid"),
    *("statvfs", "fstatvfs", "pread", "pwrite", "posix_fadvise", "posix_fallocate", "fdatasync", "sync", "sendfile"),
    *("getgroups", "setuid", "setgid", "initgroups", "ttyname", "ctermid", "confstr", "openpty", "copy_file_range"),
)
OF_SIGNAL = (
    *("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGCHLD", "SIGTSTP", "SIGCONT"),
    *("alarm", "setitimer", "getitimer", "pause", "sigwait", "pthread_kill", "pthread_sigmask", "siginterrupt"),
)
HEAVY = (
    *("accelerate", "datasets", "filelock", "jsonargparse", "peft", "psutil", "torch", "transformers"),
    *("diffusers", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"),
)
LOCKED: list[int] = []  # what was asked of msvcrt


def take_away() -> None:
    """Import what is heavy, then take away what Windows lacks; what syncs and locks acts as it does there."""
    for name in HEAVY:
        import_module(name)  # these find what they need first: their own builds are of this system
    assert not any(name.startswith("difftuning_control") for name in sys.modules)
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in OF_OS:
        if hasattr(os, name) and not name.startswith("O_"):  # these filelock's build for this system goes on to read
            delattr(os, name)
    for name in OF_SIGNAL:
        if hasattr(signal, name):
            delattr(signal, name)
    windows: Any = ModuleType("msvcrt")
    windows.LK_LOCK, windows.LK_UNLCK = 1, 0
    windows.locking = lambda handle, how, size: LOCKED.append(how)
    sys.modules["msvcrt"] = windows
    _sync_as_there()


def _sync_as_there() -> None:
    """No folder can be opened, and only what is open for writing can be synced."""
    plain_open, plain_sync = os.open, os.fsync
    for_reading: set[int] = set()

    def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        handle = plain_open(path, flags, *args, **kwargs)
        for_reading.discard(handle)
        if not flags & (os.O_RDWR | os.O_WRONLY):
            for_reading.add(handle)
        return handle

    def synced(handle: int) -> None:
        if handle in for_reading and stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(9, "Bad file descriptor")
        plain_sync(handle)

    os.open, os.fsync = opened, synced  # type: ignore[assignment]
    import difftuning_control.system.durable as durable  # after all of this is away

    durable.sys = SimpleNamespace(platform="win32")  # type: ignore[attr-defined]
