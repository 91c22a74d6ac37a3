"""The result of a training: its record, the figures of its steps, and the folder that holds all it left."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from difftuning_control.runs.history import read_history
from difftuning_control.runs.record import RunRecord


@dataclass(frozen=True)
class TrainingResult:
    """What `train` returns.

    Args:
        record: what `run.json` says.
        output: the run's folder.
    """

    record: RunRecord
    output: Path

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, figures by step: `pandas.DataFrame(result.history)` makes a table of them."""
        return read_history(self.output)
