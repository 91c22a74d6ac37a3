"""Values against annotations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from difftuning_control.system.annotations import check_fields, fits


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, int, True),
        (1, float, True),
        (1.5, int, False),
        (True, int, False),
        (True, bool, True),
        ("x", str, True),
        (None, str | None, True),
        (5, str | None, False),
        (None, None, True),
        ([1, 2.5], list[float], True),
        ([1, "x"], list[float], False),
        ("xy", list[str], False),
        ((1, 2), list[int], True),
        ({"a": [1]}, dict[str, list[int]], True),
        ({"a": ["x"]}, dict[str, list[int]], False),
        ({1: [1]}, dict[str, list[int]], False),
        ({"a": object()}, dict[str, Any], True),
        ("lora", Literal["lora", "full"], True),
        ("dance", Literal["lora", "full"], False),
    ],
)
def test_a_value_is_or_is_not_what_its_annotation_says(value, annotation, expected):
    assert fits(value, annotation) is expected


@dataclass
class Inner:
    scale: float = 1.0


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    names: list[str] = field(default_factory=list)


def test_fields_are_checked_down_into_sections():
    check_fields(Outer(Inner(2), ["a"]))
    with pytest.raises(TypeError, match=r"inner\.scale is 'x'"):
        check_fields(Outer(Inner("x")))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"names is \[1\]"):
        check_fields(Outer(names=[1]))  # type: ignore[list-item]
