"""The form of a training: the first fields, all other keys of a recipe by section, and the command that they make."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difftuning_control.errors import UserError
from difftuning_control.recipe.adapter_kinds import KINDS
from difftuning_control.recipe.masking import ALPHA
from difftuning_control.recipe.reading import keys_of, read_recipe, section_of
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.places import KEYS, local_place
from difftuning_control.runs.record import read_run
from difftuning_control.system.durable import is_empty
from difftuning_control.system.shipped import examples
from difftuning_control.system.text import file_stem
from difftuning_control.verbs.choices import DEFAULTS, flat
from difftuning_control.verbs.commands import COMMANDS, only
from difftuning_control.verbs.help import argument_texts
from difftuning_control.verbs.parse import parse
from difftuning_control.verbs.ui.folders import why_refused
from difftuning_control.verbs.ui.jobs import Job, Jobs
from difftuning_control.verbs.ui.places import EMBEDDED, Places

FIRST = {  # of the first fields those that are one key of a recipe
    "model": "model.id",
    "pictures": "data.path",
    "trigger": "data.trigger",
    "rank": "adapter.rank",
    "steps": "training.max_steps",
    "batch": "training.batch_size",
    "rate": "training.learning_rate",
    "side": "data.resolution",
}
METHODS = (*KINDS, "full", "controlnet")
NO_PRESET = "embedded model"
UNUSED = ("training.resume", "output", "method", "adapter.kind", "training.sample_prompts")  # fields of other names
WRITTEN = ("data.cache", "bank.path")  # keys that name what a training writes
# keys that name pictures which a training reads
PICTURES = ("data.path", "data.validation_path", "data.masks", "control.path", "control.validation_path")


@dataclass(frozen=True)
class Field:
    """A key of the recipe that is not among the first.

    Args:
        choices: what it can be; None of what is typed.
        default: as it is shown where nothing is given.
    """

    key: str
    about: str
    choices: list[str] | None
    default: str


# --- what can be chosen ---------------------------------------------------------------------------------------------


def presets() -> dict[str, Path | None]:
    """The recipes of the package by name, and one for the embedded model that needs none."""
    named = {e.name: e.path for e in examples() if e.path.suffix == ".yaml" and "/" not in e.name}
    trains = {n: p for n, p in named.items() if n.endswith(("_lora", "_controlnet", "_dora", "_tlora", "_full"))}
    return {NO_PRESET: None, **trains}


def preset_labels() -> list[tuple[str, str]]:
    """What a list shows for each preset, and its name."""
    about = {e.name: e.about.rstrip(".") for e in examples()}
    return [(f"{name}: {about[name]}" if name in about else f"{name}, to try it", name) for name in presets()]


def preset_values(name: str) -> dict[str, str]:
    """The first fields as a preset has them, by field; pictures, trigger and name are the user's.

    Raises:
        UserError: if there is none of this name.
    """
    if name not in presets():
        raise UserError(f"there is no preset {name!r}; choose one of the list.")
    path = presets()[name]
    values = {} if path is None else flat(read_recipe(str(path), keys_of(COMMANDS["train"])))
    found = {field: _text(values.get(key)) for field, key in FIRST.items() if field not in ("pictures", "trigger")}
    found["model"] = found["model"] or "embedded"
    method = values.get("method", "lora")
    return found | {"trains": values.get("adapter.kind", "lora") if method == "lora" else method}


def sections() -> dict[str, list[Field]]:
    """All other keys by their section, in the recipe's order."""
    found: dict[str, list[Field]] = {}
    for key, hint in keys_of(Recipe).items():
        if section_of(hint) is None and key not in (*FIRST.values(), *UNUSED):
            found.setdefault(key.partition(".")[0], []).append(_field(key, hint))
    return found


def _field(key: str, hint: Any) -> Field:
    *path, name = key.split(".")
    owner: type = Recipe
    for part in path:
        owner = section_of(typing.get_type_hints(owner)[part]) or owner
    default = DEFAULTS.get(key)
    return Field(
        key, argument_texts(owner).get(name, ""), _choices(hint), "" if default in (None, []) else _text(default)
    )


def _choices(hint: Any) -> list[str] | None:
    parts = [p for p in typing.get_args(hint) if p is not type(None)] if typing.get_origin(hint) is not list else []
    if hint is bool:
        return ["true", "false"]
    if typing.get_origin(hint) is typing.Literal:
        return [str(value) for value in typing.get_args(hint)]
    literal = [p for p in parts if typing.get_origin(p) is typing.Literal]
    return [str(value) for value in typing.get_args(literal[0])] if literal and len(parts) == 1 else None


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)


# --- the command ----------------------------------------------------------------------------------------------------


def free_name(places: Places, wanted: str = "mine") -> str:
    """The wanted name of a run, or one like it, that is not there yet and that no waiting or running job has."""
    jobs, runs = Jobs(places), places.folder / "runs"
    free = jobs.free_place(runs, wanted).name
    return free if free == wanted else jobs.free_place(runs, file_stem(wanted)).name


def go_on_words(job: Job, up_to: str) -> list[str]:
    """The command that goes on with a training: its own once more where it ended before its run began.

    Args:
        up_to: the step to end at; that of the training when empty.
    """
    if job.verb == "train" and read_run(job.output) is None:
        longer = [f"--{FIRST['steps']}={up_to.strip()}"] if up_to.strip() else []
        kept = [word for word in job.arguments if not (longer and word.startswith(f"--{FIRST['steps']}="))]
        return [*kept, *longer]
    return ["resume", job.output, *([f"--steps={up_to.strip()}"] if up_to.strip() else [])]


def recipe_of_words(words: Sequence[str]) -> Recipe:
    """The recipe that a command trains."""
    return only(Recipe, parse(list(words))[1])


def train_words(
    places: Places, preset: str, fields: Mapping[str, str], others: Mapping[str, str]
) -> tuple[list[str], Path]:
    """The command that trains, and the run's folder; the command is read once here, as it will be read then.

    Args:
        fields: the first by name: those of `FIRST`, trains, prompts (one a line), name.
        others: further keys with what was typed; empty ones are left to the recipe.

    Raises:
        UserError: for whatever `difftune train` would refuse before it loads anything.
    """
    if preset not in presets():
        raise UserError(f"there is no preset {preset!r}; choose one of the list.")
    given = {key: fields.get(field, "").strip() for field, key in FIRST.items()}
    given |= {key: text.strip() for key, text in others.items()}
    given = {key: text for key, text in given.items() if text}
    if not given.get("data.path"):
        raise UserError("no pictures are named; choose a folder of pictures, or embedded/icons to try it.")
    _keep_inside(places, given)
    _from_the_folder(places, given)
    output = _output(places, fields.get("name", ""))
    words = [f"--{key}={text}" for key, text in {**_method(fields.get("trains", "lora")), **given}.items()]
    prompts = [line.strip() for line in fields.get("prompts", "").splitlines() if line.strip()]
    if prompts:
        words.append(f"--training.sample_prompts={json.dumps(prompts, ensure_ascii=False)}")
    path = presets()[preset]
    words = ["train", *([f"--config={path}"] if path is not None else []), *words, f"--output={output}"]
    refuse_code(recipe_of_words(words))
    return words, output


def _method(trains: str) -> dict[str, str]:
    if trains not in METHODS:
        raise UserError(f"what trains is {trains!r}; expected one of {', '.join(METHODS)}.")
    return {"method": "lora", "adapter.kind": trains} if trains in KINDS else {"method": trains}


def _keep_inside(places: Places, given: dict[str, str]) -> None:
    """Refuse what the page may not read or write."""
    for key in PICTURES:
        if given.get(key) and given[key] not in EMBEDDED and (key, given[key]) != ("data.masks", ALPHA):
            folder = places.readable(given[key])
            if not folder.is_dir():
                raise UserError(f"{given[key]} is no folder; choose a folder of pictures.")
            if (why := why_refused(places, given[key])) is not None:
                raise UserError(why)
            given[key] = str(folder)
    for key in WRITTEN:
        if given.get(key):
            given[key] = str(places.writable(given[key]))


def _from_the_folder(places: Places, given: dict[str, str]) -> None:
    """Make absolute what is local: the command runs in the page's folder, and this process anywhere."""
    for role, key in KEYS.items():
        text = given.get(key)
        is_function = role == "schedule" and ":" in (text or "")  # which lies nowhere
        if text and not is_function and (place := local_place(role, text, places.folder)) is not None:
            given[key] = place


def refuse_code(recipe: Recipe) -> None:
    """Refuse what runs code of somebody's own, be it typed or of another run's recipe.

    Raises:
        UserError: saying where it is named.
    """
    schedule = recipe.tuning.schedule
    named = {
        "tuning.schedule.path": schedule.path if schedule.kind == "function" else None,
        "control.annotator": recipe.control.annotator if ":" in recipe.control.annotator else None,
    }
    if (key := next((k for k, name in named.items() if name is not None), None)) is not None:
        raise UserError(f"{key} is code that runs ({named[key]}); start such a training on the command line.")


def _output(places: Places, name: str) -> Path:
    name = name.strip() or free_name(places)
    if name in (".", "..") or "/" in name or "\\" in name:
        raise UserError(f"the run's name is {name}; expected a name without slashes, it is written below runs.")
    output = places.writable(places.folder / "runs" / name)
    if output.exists() and not is_empty(output):
        raise UserError(f"there is a run {name} already; give another name, such as {free_name(places, name)}.")
    return output


def embedded_words(places: Places) -> tuple[list[str], Path]:
    """The command of one click: the embedded model on the emoji that come with it."""
    fields = {"pictures": "embedded/flat", "steps": "60", "name": free_name(places, "first"), "model": "embedded"}
    others = {"training.sample_every": "20", "training.validate_every": "20"}
    others |= {"data.limit": "24", "training.save_at": "[20, 40]"}
    return train_words(places, NO_PRESET, fields | {"batch": "12"}, others)
