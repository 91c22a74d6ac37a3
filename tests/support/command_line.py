"""Flags of a training of the tiny model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def settings(model: Path, data: Path, root: Path, **changes: object) -> dict[str, object]:
    """Flags without their dashes that train the tiny model for two steps, all caches below `root`."""
    return {
        "model.id": model,
        "data.path": data,
        "data.cache": root / "cache",
        "data.holdout": 0.25,
        "bank.size": 6,
        "bank.steps": 2,
        "training.max_steps": 2,
        "training.batch_size": 5,
        "training.validation_size": 2,
        "training.sample_every": 0,
        "output": root / "run",
        **changes,
    }


def flags(values: dict[str, object]) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


@contextmanager
def files_for_all() -> Iterator[None]:
    """What is written meanwhile is for all to read, whatever the umask was."""
    before = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(before)
