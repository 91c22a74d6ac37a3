"""What a recipe leaves open, filled in as it fits the model, the method and the device."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch

from difftuning_control.families.fit import EMBEDDED, Fit
from difftuning_control.families.hub import best_device
from difftuning_control.families.loading import family_class
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.system.terminal import activity


def fitted(recipe: Recipe, tell: Callable[[str], object] = lambda line: None) -> Recipe:
    """The recipe with what its text leaves open (`Recipe.left_open`) as it fits the model; what it names stays.

    Args:
        tell: is given a line that names what was filled in, once of several processes.

    Raises:
        UserError: if the model is not to be had, or of no supported family.
    """
    if not recipe.left_open:
        return recipe
    fits = _values(recipe, _fit_of(recipe.model.id))
    sections: dict[str, dict[str, Any]] = {"training": {}, "tuning": {}}
    for key, value in fits.items():
        section, name = key.split(".")
        sections[section][name] = value
    done = dataclasses.replace(
        recipe,
        training=dataclasses.replace(recipe.training, **sections["training"]),
        tuning=dataclasses.replace(recipe.tuning, **sections["tuning"]),
    )
    if fits and os.environ.get("RANK", "0") == "0":
        said = ", ".join(f"{key.partition('.')[2]} {_shown(value)}" for key, value in fits.items())
        tell(f"not given, and so as it fits {recipe.model.id} with method {recipe.method}: {said}")
    return done


def _fit_of(model: str) -> Fit:
    if model == "embedded":
        return EMBEDDED
    with activity("looking up", os.environ.get("RANK", "0") == "0", model):
        return family_class(model).fit


def _values(recipe: Recipe, fit: Fit) -> dict[str, Any]:
    """What fits, by dotted key, of what the recipe leaves open."""
    method = recipe.method
    rate = f"{method}_lora" if method == "controlnet" and recipe.adapter.on == "controlnet" else method
    fits: dict[str, Any] = {
        "training.learning_rate": (Fit().learning_rate | fit.learning_rate)[rate],
        "training.max_steps": (Fit().max_steps | fit.max_steps)[method],
        "training.batch_size": fit.batch_size,
        "training.mixed_precision": "no" if fit is EMBEDDED else _precision(),
    }
    open_values = {key: value for key, value in fits.items() if key in recipe.left_open}
    ratio = _bank_share(recipe, open_values.get("training.batch_size", recipe.training.batch_size))
    if "tuning.retention_ratio" in recipe.left_open and ratio is not None:
        open_values["tuning.retention_ratio"] = ratio
    return open_values


def _precision() -> str:
    """bf16 where the device computes in it."""
    device = best_device()
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def _bank_share(recipe: Recipe, batch: int) -> float | None:
    """One row of a step for retention where its share of a small step is less than that; None where it is not."""
    rows = batch * recipe.training.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
    ratio = recipe.tuning.retention_ratio
    if ratio == 0 or int(rows * ratio) >= 1 or rows < 2:
        return None
    return 1 / rows


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
