"""Values as their annotations say they are: the check of what was read from a file that anybody may have edited."""

from __future__ import annotations

import reprlib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

hints_of: Callable[[Any], dict[str, Any]] = cache(get_type_hints)  # compiling them takes longer than to read a record


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is what an annotation says. An int is a float too, but a bool is no number."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return value in inner
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, (list, tuple)) and all(fits(each, inner[0]) for each in value)
    if annotation in (int, float):
        return isinstance(value, (int, annotation)) and not isinstance(value, bool)
    return isinstance(value, type(None) if annotation is None else annotation)


def check_fields(values: Any, prefix: str = "") -> None:
    """Refuse a dataclass in which a field, or one of a dataclass in it, is not what its annotation says.

    Raises:
        TypeError: naming the first.
    """
    hints = hints_of(type(values))
    for of in fields(values):
        value = getattr(values, of.name)
        if is_dataclass(value):
            check_fields(value, f"{prefix}{of.name}.")
        elif not fits(value, hints[of.name]):
            raise TypeError(f"{prefix}{of.name} is {reprlib.repr(value)}")
