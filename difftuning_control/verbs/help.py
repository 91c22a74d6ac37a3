"""The page of help of each verb: what people use of it, in groups; `--help-all` has every option."""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
import typing
from typing import Any

from difftuning_control.recipe.reading import keys_of, section_of
from difftuning_control.recipe.recipe import BY_MODEL, Recipe
from difftuning_control.verbs.spelling import SHORT, WORD

HELP, HELP_ALL = {"-h", "--help"}, "--help-all"
WIDTH, COLUMN = 100, 32
USAGE = {
    "train": "PICTURES [--model ID] [options], or --config RECIPE.yaml [options]",
    "resume": "RUN [options]",
    "bank": "PICTURES [--model ID] [options]",
    "sample": 'RUN "a prompt" ["another" …] [options]',
    "evaluate": "--runs '[RUN, RUN, …]' [options]",
    "export": "RUN --to DIR [options]",
    "analyze": "(--run RUN | --data PICTURES [--model ID]) [options]",
    "pilot": "PICTURES [--model ID] [options]",
    "verify": "RUN [options]",
    "runs": "DIR [options]",
    "ui": "[FOLDER] [--port N] [--host H]",
    "completion": "bash|zsh|fish",
}
_MODEL = ("model.id", "model.variant", "model.quantization", "model.offload")
_BANK = ("bank.size", "bank.prompts", "bank.path", "bank.batch_size")
_TUNING = ("tuning.schedule.kind", "tuning.schedule.tau", "tuning.retention_ratio", "tuning.retention_weight")
_LOOP = ("training.max_steps", "training.batch_size", "training.learning_rate", "training.mixed_precision")
PAGES: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "Pictures and model": ("data.path", *_MODEL[:1], "data.resolution", "data.trigger"),
        "What trains": ("method", "adapter.kind", "adapter.rank"),
        "Training": (*_LOOP, "training.gradient_checkpointing", "training.begin_from"),
        "Against forgetting": (*_TUNING, *_BANK[:2]),
        "While it trains": (
            "training.sample_every",
            "training.sample_prompts",
            "training.trackers",
        ),
        "Where to": ("output", "overwrite"),
    },
    "resume": {
        "What is resumed": ("run",),
        "What may change": (*_LOOP[:1], *_LOOP[2:3], "training.lr_scheduler", "training.sample_every"),
        "Inputs that were moved": ("model.id", "data.path", "bank.path"),
    },
    "bank": {
        "Pictures and model": ("data.path", *_MODEL, "data.resolution", "training.mixed_precision"),
        "The bank": (*_BANK, "bank.guidance_scale", "bank.steps", "bank.solver", "bank.seed"),
    },
    "sample": {
        "What is drawn": ("run", "prompts", "model.id", "compare", "kept"),
        "How": ("steps", "guidance_scale", "domain_guidance_scale", "resolution", "seed"),
        "With a ControlNet": ("control", "control_ready"),
        "Where to": ("output", "overwrite"),
    },
    "evaluate": {
        "What is judged": ("runs", "data", "source", "outside"),
        "How": ("features", "pictures", "seeds", "steps", "guidance_scale", "domain_guidance_scale", "batch_size"),
        "Where to": ("output", "overwrite"),
    },
    "export": {
        "What": ("run", "format", "base", "adapter", "pipeline", "dtype", "evaluation", "despite_gates"),
        "Where to": ("to", "push", "overwrite"),
    },
    "analyze": {
        "What is measured": ("run", "data.path", "model.id", *_BANK[:1], "analysis.rows", "analysis.staged"),
        "Where to": ("output", "language", "overwrite"),
    },
    "pilot": {
        "Pictures and model": ("data.path", *_MODEL[:2], "data.resolution", *_BANK[:1]),
        "What is compared": ("pilot.sides", "pilot.seeds", "pilot.learning_rates", "pilot.lengths", "pilot.pictures"),
        "Training": (*_LOOP, "adapter.kind", "adapter.rank"),
        "Where to": ("output", "language", "overwrite"),
    },
}


def help_page(verb: str, command: type) -> str | None:
    """What people use of a verb, in groups, with types and defaults; None of a verb whose whole help is as short."""
    if verb not in PAGES:
        return None
    types, short = keys_of(command), {key: name for name, key in SHORT.get(verb, {}).items()}
    about = " ".join((command.__doc__ or "").strip().partition("\n\n")[0].split())
    lines = [f"usage: difftune {verb} {USAGE[verb]}", "", *textwrap.wrap(about, WIDTH)]
    for title, keys in PAGES[verb].items():
        lines += ["", f"{title}:"]
        for key in keys:
            lines += _option(verb, key, command, types[key], short.get(key))
    of_recipe = "Every option is a key of a recipe too. " if issubclass(command, Recipe) else ""
    lines += ["", f"{of_recipe}All options: difftune {verb} {HELP_ALL}"]
    return "\n".join(lines)


def _option(verb: str, key: str, command: type, hint: Any, short: str | None) -> list[str]:
    section, entry = _entry(command, key)
    text = _with_unit(argument_texts(section).get(entry.name, ""))
    shown = "as fits the model" if key in BY_MODEL else _shown(_default(entry))
    default = f" ({shown})" if shown and not (key == "data.path" or verb == "resume") else ""
    long = f" [{key}]" if short and "." in key else ""
    names = f"--{short or key}"
    if WORD.get(verb) == key or (verb == "sample" and key == "run"):
        names = "PICTURES" if key == "data.path" else "RUN"
    elif verb == "sample" and key == "prompts":
        names = '"…" "…"'
    elif key == "model.id":
        names = "--model ID"
    unit = {int: " N", float: " X", str: " TEXT"}.get(_plain(hint), "")
    head = f"  {names}{unit if names.startswith('--') and ' ' not in names else ''}"
    body = textwrap.wrap(text + default + long, WIDTH - COLUMN, break_on_hyphens=False) or [""]
    gap = [head] if len(head) >= COLUMN - 1 else []
    rows = [f"{'' if gap or i else head:<{COLUMN}}{line}" for i, line in enumerate(body)]
    return [*gap, *rows]


def _plain(hint: Any) -> Any:
    """The type of a value where one is given."""
    parts = [p for p in typing.get_args(hint) if p is not type(None)]
    return parts[0] if len(parts) == 1 and typing.get_origin(hint) is not list else hint


def _entry(command: type, key: str) -> tuple[type, dataclasses.Field[Any]]:
    """The dataclass that has a dotted key, and the field there."""
    *sections, name = key.split(".")
    for section in sections:
        command = section_of(typing.get_type_hints(command)[section]) or command
    return command, next(f for f in dataclasses.fields(command) if f.name == name)


def _default(entry: dataclasses.Field[Any]) -> Any:
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return None if entry.default is dataclasses.MISSING else entry.default


def _shown(value: Any) -> str:
    """A default in words; nothing where none is told of by its own text."""
    if value is None or value is False or value in ("", []):
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def argument_texts(section: type) -> dict[str, str]:
    """What the docstrings of a dataclass and of those that it extends say of each field."""
    texts: dict[str, str] = {}
    for part in reversed(section.__mro__):
        block = (part.__doc__ or "").partition("Args:\n")[2]
        for name, text in re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", block, re.M):
            texts[name] = " ".join(text.split())
    return texts


def _with_unit(text: str) -> str:
    """The first clause of an entry, and the unit that it has in brackets behind it, `[pixels, ≥ 8]`."""
    clause, brackets = _clause(text), re.search(r"\[([^\]]*)\]$", text)
    unit = brackets[1].partition(",")[0] if brackets is not None else ""
    is_unit = unit and not re.search(r"[≥>≤<\d]", unit) and unit.split()[-1] not in clause and unit != "share"
    return f"{clause}, in {unit}" if is_unit else clause


def _clause(text: str) -> str:
    """The first sentence of a text, without what follows a semicolon outside of brackets, and without its range."""
    depth, text = 0, re.sub(r"\s*\[[^\]]*\]$", "", text)
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if not depth and (c == ";" or (c == "." and text[i + 1 : i + 2] in ("", " "))):
            return text[:i]
    return text
