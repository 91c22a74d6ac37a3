"""A ControlNet's fidelity over its training steps as `fidelity.json` and a run's record hold it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

from difftuning_control.system.annotations import fits
from difftuning_control.system.sections import Section


@dataclass(kw_only=True)
class Convergence(Section):
    """A rise of fidelity (a fall where lower is better), in training steps and in the curve's own units.

    Args:
        start, end: measured steps between which it happens; two neighbours where it is as sharp as can be seen, and
            `end` is the last step where the curve is still rising.
        step: their midpoint, by which half of the rise is done: the step of sudden convergence.
        before, after: the levels.
        sudden: the rise takes at most a quarter of the steps measured.
    """

    start: float = 0.0
    end: float = 0.0
    step: float = 0.0
    before: float = 0.0
    after: float = 0.0
    sudden: bool = False


def _measured(values: dict[str, list[float | None]]) -> dict[str, list[float]]:
    """Figures by name; null, which other tools write of what is not a number, is one."""
    figures = {name: [math.nan if value is None else value for value in row] for name, row in values.items()}
    if not fits(figures, dict[str, list[float]]):
        raise TypeError("the figures of the fidelity are no lists of numbers")
    return figures


@dataclass(kw_only=True)
class FidelityRecord(Section):
    """The figures of every measurement, and the rise that can be told from noise.

    Args:
        kind: what is compared, a key of `condition_figures.MAIN`.
        main: the figure that counts.
        higher_is_better: of the main figure.
        without: the figures of the model without control.
        steps: after which it was measured.
        figures: of each figure its values, one a step.
        convergence: None where the curve does not rise beyond noise.
    """

    READERS: ClassVar = {"convergence": Convergence.from_dict, "figures": _measured}

    kind: str = ""
    main: str = ""
    higher_is_better: bool = True
    without: dict[str, float] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)
    convergence: Convergence | None = None

    @property
    def values(self) -> list[float]:
        """The main figure, one a step; empty where it was not measured."""
        return self.figures.get(self.main, [])

    def row(self, index: int) -> dict[str, float]:
        """All figures of one measurement."""
        return {name: values[index] for name, values in self.figures.items()}

    def until(self, step: int) -> FidelityRecord:
        """The curve as it was after a step."""
        count = sum(at <= step for at in self.steps)
        figures = {name: values[:count] for name, values in self.figures.items()}
        return replace(self, steps=self.steps[:count], figures=figures, convergence=None)
