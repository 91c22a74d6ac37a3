"""Objects of a JSON file as dataclasses, so that files of earlier and of newer versions are read and written again.

What an earlier version did not write has the field's default, and stays out where the file is written again; what a
newer version added, which is no field here, is kept in its place.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from difftuning_control.system.annotations import fits, hints_of

S = TypeVar("S", bound="Section")
Reader = Callable[[Any], Any]


@dataclass(kw_only=True)
class Section:
    """An object of a JSON file, whose keys are the fields of a subclass; each of these has a default.

    A subclass names the fields that are written only where they differ from their default (`SOMETIMES`), what makes a
    field's value of what the file holds (`READERS`), and the keys that are other than their fields (`KEYS`).

    Args:
        original: what it was read from; None of one that is new.
    """

    SOMETIMES: ClassVar[tuple[str, ...]] = ()
    READERS: ClassVar[Mapping[str, Reader]] = {}
    KEYS: ClassVar[Mapping[str, str]] = {}

    original: dict[str, Any] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_dict(cls: type[S], values: Any) -> S:
        """What a file holds.

        Raises:
            TypeError: if it holds a value of another kind than its field's.
        """
        if not isinstance(values, dict):
            raise TypeError(f"expected an object, found {type(values).__name__}")
        by_key = {cls.KEYS.get(of.name, of.name): of for of in _fields(cls)}
        hints = hints_of(cls)
        read = {of.name: _read(cls, of, values[key], hints[of.name]) for key, of in by_key.items() if key in values}
        return cls(original=values, **read)

    def to_dict(self) -> dict[str, Any]:
        """What a file is to hold: keys in the order in which they were read, then new ones in that of the fields."""
        before = self.original or {}
        values = dict(before)
        for of in _fields(type(self)):
            key, value = self.KEYS.get(of.name, of.name), getattr(self, of.name)
            if key in before or value != _default(of) or (self.original is None and self.is_always_written(of.name)):
                values[key] = _plain(value)
        return values

    def is_always_written(self, name: str) -> bool:
        """Whether a new file has a field even where it holds the default."""
        return name not in self.SOMETIMES


def list_of(section: type[S]) -> Reader:
    """Reads a list of sections."""
    return lambda values: [section.from_dict(value) for value in values]


def dict_of(section: type[S]) -> Reader:
    """Reads sections by name."""
    return lambda values: {name: section.from_dict(value) for name, value in values.items()}


def _fields(section: type[Section]) -> list[Field[Any]]:
    return [of for of in fields(section) if of.name != "original"]


def _default(of: Field[Any]) -> Any:
    return of.default if of.default_factory is MISSING else of.default_factory()


def _read(section: type[Section], of: Field[Any], value: Any, annotation: Any) -> Any:
    read, default = section.READERS.get(of.name), _default(of)
    if read is None and not fits(value, annotation):
        raise TypeError(f"{of.name} is {reprlib.repr(value)}, expected {of.type}")
    if read is not None and isinstance(default, (dict, list)) and not isinstance(value, type(default)):
        raise TypeError(f"{of.name} is {type(value).__name__}, expected {type(default).__name__}")
    return value if read is None or (value is None and default is None) else read(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.to_dict()
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value
