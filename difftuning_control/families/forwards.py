"""The name under which a denoiser's forward is told its timesteps."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

NAMES = ("timestep", "t")


def timestep_name(denoiser: Any) -> str:
    return _name(type(denoiser))


@cache
def _name(kind: Any) -> str:
    parameters = inspect.signature(kind.forward).parameters
    return next(name for name in NAMES if name in parameters)


def timestep_place(denoiser: Any) -> int:
    """Its place among the arguments of a call."""
    return list(inspect.signature(type(denoiser).forward).parameters).index(timestep_name(denoiser)) - 1
