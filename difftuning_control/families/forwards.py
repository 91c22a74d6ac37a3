"""The name under which a denoiser's forward is told its timesteps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

NAMES = ("timestep", "t")


def timestep_name(denoiser: Any) -> str:
    return _name(type(denoiser).forward)


@cache
def _name(forward: Callable[..., Any]) -> str:
    parameters = inspect.signature(forward).parameters
    return next(name for name in NAMES if name in parameters)


def timestep_place(denoiser: Any) -> int:
    """Its place among the arguments of a call."""
    return list(inspect.signature(type(denoiser).forward).parameters).index(timestep_name(denoiser)) - 1
