"""The settings file of a pilot's folder: what the pilot was asked for, what it began with, how long it has taken."""

from __future__ import annotations

import time
from pathlib import Path

from difftuning_control.data.study_inputs import Materials
from difftuning_control.errors import UserError
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import PilotConfig
from difftuning_control.runs.identity import deciding_settings, without_places
from difftuning_control.runs.pilot_record import read_settings
from difftuning_control.system.digests import digest_of
from difftuning_control.training.phases import Phases


def pilot_identity(recipe: Recipe, config: PilotConfig) -> str:
    """A digest of the settings that the figures of a run depend on: not of what only watches, nor of where model, data
    and bank lie, whose content `check_inputs` compares. So a pilot that is moved goes on.

    Further sides and seeds, a longer search, a mixture of the ways of guidance and prompts outside the new domain add
    runs or figures and change none; the first seed is that of every search.
    """
    added = ("widen", "sides", "seeds", "outside", "unconditional_strength")
    asked = {name: value for name, value in vars(config).items() if name not in added}
    return digest_of([without_places(deciding_settings(recipe)), asked | {"seed": config.seeds[0]}])


def check_inputs(output: Path, inputs: Materials, base_fingerprint: str) -> None:
    """Refuse to go on with other data, another bank or another base than those that the pilot began with.

    Raises:
        UserError: if one of them has changed.
    """
    data, held_out, bank = inputs.data.fingerprint, inputs.held_out.fingerprint, inputs.bank.fingerprint
    refuse_changed_inputs(output, data, held_out, bank, base_fingerprint)
    settings = read_settings(output)
    settings.inputs = [data, held_out, bank, base_fingerprint]
    settings.write(output)


def refuse_changed_inputs(
    output: Path, data: str, held_out: str, bank: str | None = None, base: str | None = None
) -> None:
    """What `check_inputs` refuses, by the fingerprints; of a bank or a base that is not there yet, it is None.

    Raises:
        UserError: if one of them has changed.
    """
    began_with = read_settings(output).inputs
    if began_with is None:
        return
    given = {"data": data, "held-out pictures": held_out, "bank": bank, "base": base}
    changed = [f"the {name}" for (name, now), was in zip(given.items(), began_with) if now not in (None, was)]
    if changed:
        raise UserError(
            f"{' and '.join(changed)} changed since the pilot in {output} began; start afresh with --overwrite, or "
            "choose another --output."
        )


class Clock:
    """The time that a pilot has taken, over all its sessions, and by phase what it does beside its runs.

    Args:
        output: the pilot's folder, whose settings keep both.
    """

    def __init__(self, output: Path):
        self.output, self.since, self.phases = output, time.time(), Phases()

    def go_on(self) -> None:
        """Count what earlier sessions in the folder took."""
        self.phases.add(read_settings(self.output).phases or {})

    def spent(self) -> float:
        """Seconds of this and of all earlier sessions; what has passed since the last call is written down."""
        settings, now = read_settings(self.output), time.time()
        settings.seconds += now - self.since
        settings.phases = self.phases.costs()
        self.since = now
        settings.write(self.output)
        return settings.seconds
