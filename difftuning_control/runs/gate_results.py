"""What came of judging a run by its gates, as its record and an `evaluation.json` hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from difftuning_control.system.sections import Section, dict_of


@dataclass(kw_only=True)
class GateResult(Section):
    """One limit and the figure that was measured.

    Args:
        value: None where it was not measured.
        limit: that it was held against.
        at: whether the limit is the most or the least that passes.
        passed: by the figure as it was measured.
        clear: whether the figure is apart from its limit by more than noise: that of the seeds, or of the rows behind a
            loss; None where it was measured once, so that the noise is not known, and in earlier records.
    """

    value: float | None = None
    limit: float = 0.0
    at: str = "most"
    passed: bool = False
    clear: bool | None = None

    @property
    def shown(self) -> str:
        """The value in words."""
        return "unknown" if self.value is None else format(self.value, ".4g")

    @property
    def is_within_noise(self) -> bool:
        return self.clear is False


@dataclass(kw_only=True)
class GateResults(Section):
    """A run judged by its gates.

    Args:
        passed: all of them.
        figures: each limit by its gate.
        asked: the gates of the recipe that it was judged by.
    """

    READERS: ClassVar = {"figures": dict_of(GateResult)}

    passed: bool = False
    figures: dict[str, GateResult] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)

    @property
    def lines(self) -> dict[str, str]:
        """Each gate in words: `kid is 0.21, at most 0.1 asked`."""
        return {
            name: f"{name} is {gate.shown}, at {gate.at} {gate.limit:g} asked"
            f"{' (within the noise)' if gate.is_within_noise else ''}"
            for name, gate in self.figures.items()
        }

    @property
    def failed(self) -> str:
        """The gates that the run fails, in words; empty where it passes."""
        return ", ".join(line for name, line in self.lines.items() if not self.figures[name].passed)


def gates_of(side: Mapping[str, Any]) -> GateResults | None:
    """How a side of an `evaluation.json` was judged; None where it was not."""
    return GateResults.from_dict(side["gates"]) if "gates" in side else None
