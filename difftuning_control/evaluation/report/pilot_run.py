"""What a report tells of a pilot, by name."""

from __future__ import annotations

from typing import Any, Protocol

from difftuning_control.evaluation.comparison import Compared
from difftuning_control.evaluation.pilot_figures import PilotBudget, PilotPictures


class PilotRun(Compared, Protocol):
    """What the report tells of a pilot: its record, which a lower room keeps."""

    status: str
    command: str | None
    created: str | None
    model: str
    data: dict[str, Any]
    settings: dict[str, Any]
    cost: Any
    versions: dict[str, str] | None
    recipe_values: dict[str, Any] | None
    analysis: dict[str, Any] | None
    pictures: PilotPictures | None
    outside: PilotPictures | None
    budget: PilotBudget | None
