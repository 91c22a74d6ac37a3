"""The label space of a run of a model with classes: which number each class has, as the run's record keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from difftuning_control.system.sections import Section

RANDOM, FIRST = "random", "first"  # how new classes begin; records of earlier versions do not say, and are random


@dataclass(kw_only=True)
class LabelSpace(Section):
    """Which number each class has.

    Args:
        label_space: own (the model's) or new (the data's).
        classes: numbers by name.
        named: whether the pipeline knows these names.
        null_class: the number of no class.
        label_start: how new classes began: random, or as the model's first ones.
    """

    SOMETIMES: ClassVar = ("label_start",)

    label_space: str = "own"
    classes: dict[str, int] = field(default_factory=dict)
    named: bool = False
    null_class: int | None = None
    label_start: str = RANDOM

    @property
    def is_new(self) -> bool:
        return self.label_space == "new"
