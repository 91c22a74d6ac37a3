"""The shortest `difftune train` or `difftune pilot` of a recipe, for the next steps that a report names."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from difftuning_control.evaluation.report.page import flatten
from difftuning_control.recipe.recipe import FITTED, Recipe

UNWANTED = (
    "output",
    "data.cache",
    "training.resume",
    "training.seed",
    "training.save_at",
)  # in a command to go on with


def train_command(recipe: Mapping[str, Any]) -> str:
    """The shortest `difftune train` of a recipe: model, data, and what differs from the defaults."""
    return " ".join(["difftune train", *_flags(recipe), "--output runs/final"])


def pilot_command(recipe: Mapping[str, Any], sides: Sequence[str]) -> str:
    """The shortest `difftune pilot` of a recipe that compares these sides."""
    compared = f"--pilot.sides {shlex.quote(json.dumps(list(sides)))}"
    return " ".join(["difftune pilot", *_flags(recipe), compared, "--output runs/pilot"])


def _flags(recipe: Mapping[str, Any]) -> list[str]:
    defaults = dict(flatten(Recipe().to_dict()))
    always = ["model.id", "data.path", "training.learning_rate", "training.max_steps", "tuning.schedule.kind"]
    if recipe["model"]["id"] != defaults["model.id"] or recipe["data"].get("trigger"):  # which have others of their own
        always += [key for key in FITTED if key not in always]
    flags = []
    for key, value in flatten({k: recipe[k] for k in recipe if k in {f.name for f in dataclasses.fields(Recipe)}}):
        known = key in defaults and key not in UNWANTED and (value is not None or defaults[key] is not None)
        if known and (key in always or value != defaults[key]):
            text = value if isinstance(value, str) else json.dumps(value)
            flags.append((always.index(key) if key in always else len(always), f"--{key} {shlex.quote(text)}"))
    flags.sort(key=lambda f: f[0])
    return [flag for _, flag in flags]
