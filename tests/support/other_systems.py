"""A process in which Python has only what it has on Windows: `python -c "from support.other_systems import …"`.

What others have imported by then keeps what it found; what this package imports or calls afterwards finds it missing.
"""

from __future__ import annotations

import os
import shutil
import signal
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
    fcntl = import_module("fcntl")  # to see how a file is open
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in OF_OS:
        if hasattr(os, name) and not name.startswith("O_"):  # these filelock's build for this system goes on to read
            delattr(os, name)
    shutil._USE_CP_SENDFILE = False  # what it found when it was imported
    for name in OF_SIGNAL:
        if hasattr(signal, name):
            delattr(signal, name)
    windows: Any = ModuleType("msvcrt")
    windows.LK_LOCK, windows.LK_UNLCK = 1, 0
    windows.locking = lambda handle, how, size: LOCKED.append(how)
    sys.modules["msvcrt"] = windows
    _sync_as_there(fcntl)


def _sync_as_there(fcntl: Any) -> None:
    """No folder can be opened, and only what is open for writing can be synced."""
    plain_open, plain_sync = os.open, os.fsync

    def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return plain_open(path, flags, *args, **kwargs)

    def synced(handle: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        plain_sync(handle)

    os.open, os.fsync = opened, synced  # type: ignore[assignment]
    shutil._use_fd_functions = False  # type: ignore[attr-defined]  # it opens no folders there to remove them
    import difftuning_control.system.durable as durable  # after all of this is away

    durable.sys = SimpleNamespace(platform="win32")  # type: ignore[attr-defined]
