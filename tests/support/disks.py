"""Disks as machines sometimes have them: small, and read-only. Where they cannot be had here, the test is skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _mount(*words: str) -> bool:
    done = subprocess.run(["mount", *words], capture_output=True) if sys.platform == "linux" else None
    return done is not None and done.returncode == 0


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """While open, `folder` is a disk of so many bytes, rounded up to pages."""
    folder.mkdir(parents=True, exist_ok=True)
    if not _mount("-t", "tmpfs", "-o", f"size={size}", "none", str(folder)):
        pytest.skip("a small disk needs the right to mount one")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def enlarge(folder: Path, size: int) -> None:
    """Give a small disk another size; what it holds stays."""
    assert _mount("-o", f"remount,size={size}", str(folder))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """While open, nothing in `folder` or below can be written, by root neither."""
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        if not _mount("--bind", str(folder), str(folder)):
            pytest.skip("what binds root too needs the right to mount")
        try:
            assert _mount("-o", "remount,bind,ro", str(folder))
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*")) if path.is_dir()}
    for path in modes:
        path.chmod(0o555)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
