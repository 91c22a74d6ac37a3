"""What a command takes from a run's folder: `difftune resume RUN` all of it, `difftune train --from RUN` a recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from difftuning_control.errors import UserError
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.kept import place_of_run
from difftuning_control.runs.places import KEYS, RUN, absolute, located, need_places, placed, value_of
from difftuning_control.runs.record import RECORD, read_run
from difftuning_control.system.home import at_home

FILE = "recipe.yaml"
NEEDED = (
    "model",
    "data",
    "validation",
    "masks",
    "bank",
    "control",
    "control_validation",
    "controlnet",
    "schedule",
    "begin",
)


def recipe_to_resume(run: str) -> str:
    """The recipe file of a run to go on with.

    Raises:
        UserError: if there is no run.
    """
    run = at_home(run)
    folder = Path(run)
    if not folder.exists():
        raise UserError(f"there is no folder {run} to resume; if the run was moved, name its new place.")
    if read_run(folder) is None or not (folder / FILE).is_file():
        raise UserError(
            f"{run} holds no run that began (no readable {RECORD} and {FILE}), so there is nothing to resume; name the "
            "output folder of difftune train."
        )
    return str(folder / FILE)


def recipe_to_begin(place: str) -> tuple[str, dict[str, Any]] | None:
    """The recipe file of a run that another begins from, and what its recipe says otherwise here; None of a LoRA file.

    Paths that do not lead to the run's inputs from here are given as absolute ones.
    """
    folder = place_of_run(Path(place).expanduser())[0]
    record = read_run(folder)
    if record is None or not (folder / FILE).is_file():
        return None
    today = located(record, folder).recipe_values
    changes: dict[str, Any] = {"output": Recipe().output, "training.resume": False}
    for key in KEYS.values():
        written, now = value_of(record.recipe_values, key), value_of(today, key)
        if written is not None and written != now and (now is None or absolute(written) != now):
            changes[key] = now
    return str(folder / FILE), changes


def recipes_of_resumption(command: Recipe, run: str) -> tuple[Recipe, Recipe]:
    """The recipe to record for a run that goes on, and the same with paths as they are found from here.

    Args:
        command: the run's recipe with what was changed over it.

    Raises:
        UserError: if an input is no longer where it was.
    """
    run = at_home(run)
    record = read_run(Path(run))
    if record is None:
        raise UserError(f"{run} holds no run (no readable {RECORD}), so there is nothing to resume.")
    before = record.places.get(RUN, absolute(command.output))
    written = replace(
        command,
        output=command.output if before == absolute(run) else run,
        training=replace(command.training, resume=True),
    )
    here = placed(written, record, run)
    options = {role: f"--{KEYS[role]}" for role in NEEDED}
    need_places(replace(record, recipe_values=here.to_dict()), run, NEEDED, options)
    return written, here
