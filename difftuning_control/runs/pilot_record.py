"""The records of a pilot: `pilot.json`, what came of it, and `pilot-settings.json`, what it was asked for so far."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from difftuning_control.evaluation.pilot_figures import PilotBudget, PilotPictures
from difftuning_control.runs.record_sections import PhaseCosts, read_phases
from difftuning_control.system.durable import write_json
from difftuning_control.system.sections import Section

SETTINGS, RESULT = "pilot-settings.json", "pilot.json"


@dataclass(kw_only=True)
class PilotCost(Section):
    """What a pilot cost.

    Args:
        seconds: of all its sessions; None where a record does not say.
        training_seconds: of the longest runs.
        runs: how many were trained.
        device: that they were trained on, in words.
        phases: what each phase took, of the runs and beside them; None in earlier records.
    """

    SOMETIMES: ClassVar = ("phases",)
    READERS: ClassVar = {"phases": read_phases}

    phases: PhaseCosts | None = None
    seconds: float | None = None
    training_seconds: float | None = None
    runs: int | None = None
    device: str = ""


@dataclass(kw_only=True)
class PilotRecord(Section):
    """What a pilot compared and what came of it. Figures are those that the judge gives, by name.

    Args:
        status: complete, once it is written.
        command: repeats the pilot.
        created: the minute in which it was finished.
        model: the base, as the recipe names it.
        data: path, pictures, resolution, held_out and buckets.
        settings: what all sides have in common, as the report lists it.
        primary: the figure that is compared.
        cost: time and runs.
        versions: of this package and of those that decide the result.
        recipe_values: the recipe of all sides.
        base: figures of the pretrained model, and its `runs` by seed.
        sides: of each its tuning and bank, its search, its `runs` by seed and length, and their summary.
        analysis: what `difftune analyze` measures; None where it was not.
        pictures: prompts, and rows of files in the pilot's folder.
        outside: the same for prompts outside the new domain; None where none were asked.
        budget: of the side with a forgetting budget; None without one.
        files: the SHA-256 of each of the pilot's own files; None in earlier records.
        records: the SHA-256 of each run's record; None in earlier records.
    """

    SOMETIMES: ClassVar = ("files", "records", "outside")
    READERS: ClassVar = {
        "cost": PilotCost.from_dict,
        "pictures": PilotPictures.from_dict,
        "outside": PilotPictures.from_dict,
        "budget": PilotBudget.from_dict,
    }
    KEYS: ClassVar = {"recipe_values": "recipe"}

    status: str = ""
    command: str | None = None
    created: str | None = None
    model: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    primary: str = "kid"
    cost: PilotCost = field(default_factory=PilotCost)
    versions: dict[str, str] | None = None
    recipe_values: dict[str, Any] | None = None
    base: dict[str, Any] = field(default_factory=dict)
    sides: list[dict[str, Any]] = field(default_factory=list)
    analysis: dict[str, Any] | None = None
    pictures: PilotPictures | None = None
    outside: PilotPictures | None = None
    budget: PilotBudget | None = None
    files: dict[str, str] | None = None
    records: dict[str, str] | None = None

    @property
    def output(self) -> str:
        """The folder that the pilot was written into.

        Raises:
            TypeError or KeyError: if the record does not say.
        """
        return str((self.recipe_values or {})["output"])

    def write(self, output: Path) -> None:
        """Write `pilot.json` in the pilot's folder, whole or not at all."""
        write_json(output / RESULT, self.to_dict())


def read_pilot(output: Path) -> PilotRecord | None:
    """The record in a pilot's folder; None where there is none that can be read."""
    try:
        record = PilotRecord.from_dict(json.loads((output / RESULT).read_text(encoding="utf-8")))
        return record if record.output else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@dataclass(kw_only=True)
class PilotSettings(Section):
    """What a pilot was asked for, what it began with, and how long it has taken.

    Args:
        identity: a digest of the settings that its figures depend on.
        inputs: fingerprints of data, held-out pictures, bank and base; None before they were read.
        seconds: of all sessions so far.
        phases: of what was done beside the runs so far.
    """

    SOMETIMES: ClassVar = ("inputs", "seconds", "phases")
    READERS: ClassVar = {"phases": read_phases}

    identity: str = ""
    inputs: list[str] | None = None
    seconds: float = 0.0
    phases: PhaseCosts | None = None

    def write(self, output: Path) -> None:
        """Write `pilot-settings.json` in the pilot's folder, whole or not at all."""
        write_json(output / SETTINGS, self.to_dict())


def read_settings(output: Path) -> PilotSettings:
    """The settings in a pilot's folder; new ones where there are none."""
    path = output / SETTINGS
    return PilotSettings.from_dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else PilotSettings()
