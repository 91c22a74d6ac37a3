"""Where the inputs of a run lie: absolute places, recorded beside what the user wrote, and found again from anywhere.

The record keeps under `recipe` what was written, so that `recipe.yaml` can be taken elsewhere, and under `places` the
absolute place of everything local. A run that was moved together with its inputs finds them where they now lie from it.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftuning_control.errors import UserError
from difftuning_control.recipe.masking import ALPHA
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.kept import place_of_run
from difftuning_control.runs.record import RunRecord

if TYPE_CHECKING:
    from difftuning_control.recipe.requests import Moved

RUN = "run"
KEYS = {
    "model": "model.id",
    "data": "data.path",
    "validation": "data.validation_path",
    "masks": "data.masks",
    "bank": "bank.path",
    "prompts": "bank.prompts",
    "control": "control.path",
    "control_validation": "control.validation_path",
    "controlnet": "control.init",
    "annotator": "control.weights",
    "schedule": "tuning.schedule.path",
    "begin": "training.begin_from",
    "features": "gates.features",
    "cache": "data.cache",
}
ALWAYS_LOCAL = ("bank", "schedule", "begin", "cache")  # others may be names of the Hub or of this package
WORDS = {
    "masks": (ALPHA,),
    "prompts": ("captions", "empty", "classes", "both"),
    "features": ("lite0", "dinov2", "clip", "inception"),
}
SOURCES = {"base": "model", "controlnet": "controlnet", "schedule": "schedule", "begin": "begin"}  # in a record
NAMES = {
    "model": "the base",
    "data": "the data",
    "validation": "the held-out pictures",
    "masks": "the masks",
    "bank": "the knowledge bank",
    "control": "the conditions",
    "control_validation": "the held-out conditions",
    "controlnet": "the first ControlNet",
    "schedule": "the measured schedule",
    "begin": "what training began from,",
}


def value_of(values: dict[str, Any], key: str) -> Any:
    """The value at a dotted key of nested dictionaries."""
    for part in key.split("."):
        values = values.get(part, {})
    return values if values != {} else None


def set_value(values: dict[str, Any], key: str, value: Any) -> None:
    """Change the value at a dotted key in place."""
    *sections, name = key.split(".")
    for part in sections:
        values = values[part]
    values[name] = value


def absolute(path: str | Path) -> str:
    """Absolute and without `..`; links stay links, which may be what an input is found by."""
    return os.path.abspath(Path(path).expanduser())


def places_of(recipe: Recipe, bank: str | None = None) -> dict[str, str]:
    """The absolute place of the output, as `run`, and of everything local that a recipe names, by `KEYS`.

    Args:
        recipe: with paths as they are found from the current folder.
        bank: folder of the bank, where the recipe leaves it to the cache.
    """
    values, places = recipe.to_dict(), {RUN: absolute(recipe.output)}
    for role, key in KEYS.items():
        value = value_of(values, key)
        if role == "schedule" and recipe.tuning.schedule.file is None:  # a function lies nowhere
            continue
        if isinstance(value, str) and (place := local_place(role, value)) is not None:
            places[role] = place
    if bank is not None:
        places["bank"] = absolute(bank)
    return places


def local_place(role: str, value: str, folder: Path = Path()) -> str | None:
    """The absolute place of a value of one of `KEYS`; None of a word, and of a name of the Hub or of this package.

    Args:
        folder: where relative paths begin.
    """
    if value in WORDS.get(role, ()):
        return None
    try:
        place = folder / Path(value).expanduser()
        is_local = value != "embedded" and not value.startswith("embedded/") and place.exists()
    except (OSError, RuntimeError):  # a name that is too long, or of an unknown user
        place, is_local = folder / value, False
    return absolute(place) if is_local or role in ALWAYS_LOCAL else None


def places_now(record: RunRecord, run: str | Path, moved: Moved | None = None) -> dict[str, str]:
    """Where what a run recorded lies today, by `KEYS`; whether it is there is not asked.

    Args:
        moved: new places that the user names.
    """
    here, places = absolute(place_of_run(run)[0]), {}
    before = record.places.get(RUN, here)
    for role, place in record.places.items():
        if role in KEYS:  # others are the run itself, and roles of newer versions
            written = value_of(record.recipe_values, KEYS[role])
            places[role] = _place_now(place, before, here, written if isinstance(written, str) else None)
    named = {} if moved is None else {name: place for name, place in vars(moved).items() if place is not None}
    return places | {name: absolute(place) for name, place in named.items()}


def _place_now(place: str, before: str, here: str, written: str | None) -> str:
    """The same place as seen from a run that was moved, or as it was written, where it is there and no longer here."""
    if here != before:
        try:
            beside = os.path.normpath(os.path.join(here, os.path.relpath(place, before)))
        except ValueError:  # on another drive
            beside = place
        if os.path.exists(beside):
            return beside
    if not os.path.exists(place) and written is not None and os.path.exists(absolute(written)):
        return absolute(written)
    return place


def located(record: RunRecord, run: str | Path, moved: Moved | None = None) -> RunRecord:
    """A record whose paths are those of today; one of an earlier version, which recorded none, as it was written."""
    now = places_now(record, run, moved)
    if not now:
        return record
    today = copy.deepcopy(record)
    for role, place in now.items():
        if value_of(record.recipe_values, KEYS[role]) not in (None, *WORDS.get(role, ())):
            set_value(today.recipe_values, KEYS[role], place)
    places = {value_of(record.recipe_values, KEYS[role]): now.get(role) for role in ("data", "validation")}
    today.data.local = [places.get(p) or p for p in record.data.local]
    if today.bank is not None and "bank" in now:
        today.bank.folder = now["bank"]
    today.base_path = now.get("model", record.base_path)
    for name, source in (today.sources or {}).items():
        source.id = now.get(SOURCES.get(name, name), source.id)
    cache = now.get("cache")
    if cache is not None and not os.path.exists(cache) and not os.path.exists(os.path.dirname(cache)):
        set_value(today.recipe_values, KEYS["cache"], None)  # of another machine; the user's own serves as well
    return today


def placed(recipe: Recipe, record: RunRecord, run: str | Path) -> Recipe:
    """A recipe with the paths that a run's record has in common with it as they are today, and the run's output.

    What differs from the record was named since, and is meant from the current folder.
    """
    before, now, values = record.recipe_values, located(record, run).recipe_values, recipe.to_dict()
    for key in KEYS.values():
        if value_of(values, key) is not None and value_of(values, key) == value_of(before, key):
            set_value(values, key, value_of(now, key))
    values["output"] = str(run)
    return Recipe.from_record(values)


def need_places(
    record: RunRecord, run: str | Path, roles: tuple[str, ...], option: dict[str, str] | None = None
) -> None:
    """Refuse a run of which an input is no longer where it was.

    Args:
        record: as `located` gives it.
        roles: which inputs are needed.
        option: the option that names a new place, by role; `--moved.<role>` when None.

    Raises:
        UserError: naming the first that is gone, and the option for its new place.
    """
    for role in roles:
        place = value_of(record.recipe_values, KEYS[role])
        if role in record.places and place is not None and not os.path.exists(place):
            named = f"--moved.{role}" if option is None else option[role]
            raise UserError(
                f"{NAMES[role]} of the run {run} is no longer at {place}; if it was moved, give its new place: "
                f"{named} PLACE."
            )
