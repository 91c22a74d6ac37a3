"""What a recipe leaves open, filled in as it fits the model, the method and the device."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch

from difftuning_control.families.few_steps import FewSteps
from difftuning_control.families.fit import EMBEDDED, Fit
from difftuning_control.families.hub import best_device
from difftuning_control.families.loading import family_class, few_steps_of
from difftuning_control.objective.rows import rows_of_share
from difftuning_control.recipe.recipe import OF_TRIGGER, Recipe
from difftuning_control.recipe.training import ScheduleConfig
from difftuning_control.system.terminal import activity

TOO_MANY = 2  # times the steps of a distilled model, where more bring it nothing


def fitted(recipe: Recipe, tell: Callable[[str], object] = lambda line: None) -> Recipe:
    """The recipe with what its text leaves open (`Recipe.left_open`) as it fits the model; what it names stays.

    Args:
        tell: is given, once of several processes, a line that names what was filled in, one on how a model draws that
            was distilled to few steps, and one on what is named and does not suit that.

    Raises:
        UserError: if the model is not to be had, or of no supported family.
    """
    if not recipe.left_open:
        return recipe
    fit, few = _fit_of(recipe.model.id)
    fits, drawn = _values(recipe, fit), _draws(recipe, few)
    done = _with(recipe, fits | {key: value for key, value in drawn.items() if key in recipe.left_open})
    if os.environ.get("RANK", "0") != "0":
        return done
    if fits:
        said = ", ".join(
            f"{key.removeprefix('training.').removeprefix('tuning.')} {_shown(value)}" for key, value in fits.items()
        )
        tell(f"not given, and so as it fits {recipe.model.id} with method {recipe.method}: {said}")
    for line in _on_few_steps(recipe, few, drawn) if few is not None else ():
        tell(line)
    return done


def _with(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """The recipe with values by dotted key, and nothing left open."""
    recipe = dataclasses.replace(recipe)
    for key, value in values.items():
        section, name = key.split(".", 1)
        part = getattr(recipe, section)
        inner, _, leaf = name.rpartition(".")
        if inner:
            value, name = dataclasses.replace(getattr(part, inner), **{leaf: value}), inner
        recipe = dataclasses.replace(recipe, **{section: dataclasses.replace(part, **{name: value})})
    return recipe


def _draws(recipe: Recipe, few: FewSteps | None) -> dict[str, Any]:
    """The steps and scales, by dotted key, of all that a run of this recipe draws with a model of few steps."""
    if few is None:
        return {}
    sections = {
        "bank.": True,
        "training.sample_": True,
        "control.fidelity.": recipe.method == "controlnet",
        "gates.": recipe.gates.draws,
    }
    drawn = {name: is_drawn for name, is_drawn in sections.items() if is_drawn}
    return {f"{name}{k}": getattr(few, k) for name in drawn for k in ("steps", "guidance_scale")}


def _on_few_steps(recipe: Recipe, few: FewSteps, drawn: dict[str, Any]) -> list[str]:
    """What to say of a model that was distilled."""
    lines, model = [], recipe.model.id
    said = [f"{key} {_shown(value)}" for key, value in drawn.items() if key in recipe.left_open]
    if said:
        lines.append(f"{model} draws in {few}, and so, where it is not given: {', '.join(said)}")
    named = {key: _at(recipe, key) for key in drawn if key not in recipe.left_open}
    odd = [
        f"{key} is {_shown(value)}"
        for key, value in named.items()
        if value > (TOO_MANY * few.steps if key.endswith("steps") else few.guidance_scale)
    ]
    odd += [f"bank.solver is {recipe.bank.solver}"] if recipe.bank.solver != "own" else []
    if odd:
        lines.append(
            f"note: {model} draws in {few}, and {', '.join(odd)}; leave out what is not meant so, and it fits the model"
        )
    return lines


def _at(recipe: Recipe, key: str) -> Any:
    """The recipe's value of a dotted key."""
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _fit_of(model: str) -> tuple[Fit, FewSteps | None]:
    """What fits the model's family, and how it draws if it was distilled."""
    if model == "embedded":
        return EMBEDDED, None
    with activity("looking up", os.environ.get("RANK", "0") == "0", model):
        return family_class(model).fit, few_steps_of(model)


def _values(recipe: Recipe, fit: Fit) -> dict[str, Any]:
    """What fits, by dotted key, of what the recipe leaves open."""
    method = recipe.method
    rate = f"{method}_lora" if method == "controlnet" and recipe.adapter.on == "controlnet" else method
    fits: dict[str, Any] = {
        "training.learning_rate": (Fit().learning_rate | fit.learning_rate)[rate],
        "training.max_steps": (Fit().max_steps | fit.max_steps)[method],
        "training.batch_size": fit.batch_size,
        "training.mixed_precision": "no" if fit is EMBEDDED else usual_precision(),
    }
    if _computes_again(recipe, fit):
        fits["training.gradient_checkpointing"] = True
    open_values = {key: value for key, value in fits.items() if key in recipe.left_open}
    if "tuning.schedule.kind" in recipe.left_open and recipe.tuning.schedule == (usual := ScheduleConfig()):
        own = fit.schedule.get(method, usual)
        changed = [f.name for f in dataclasses.fields(own) if getattr(own, f.name) != getattr(usual, f.name)]
        open_values |= {f"tuning.schedule.{name}": getattr(own, name) for name in changed}
    open_values |= _of_trigger(recipe)
    ratio = _bank_share(recipe, open_values.get("training.batch_size", recipe.training.batch_size))
    if "tuning.retention_ratio" in recipe.left_open and ratio is not None:
        open_values["tuning.retention_ratio"] = ratio
    return open_values


def _of_trigger(recipe: Recipe) -> dict[str, Any]:
    """What a LoRA with a trigger retains, where its recipe names nothing of it: general prompts under these.

    What is learnt has words of its own, so other prompts need not give way to it (docs/results.md).
    """
    tuning = recipe.tuning
    if recipe.data.trigger is None or recipe.method != "lora" or recipe.bank.path is not None:
        return {}
    named = {*OF_TRIGGER, "tuning.schedule.kind"} - {*recipe.left_open}
    if (
        named
        or tuning.schedule != ScheduleConfig()
        or tuning.retention == "teacher"
        or tuning.forgetting_budget is not None
        or tuning.retention_ratio == 0
    ):
        return {}
    return dict(zip(OF_TRIGGER, ("general", "own", 0.3)))


def _computes_again(recipe: Recipe, fit: Fit) -> bool:
    """Whether activations are computed again in the backward pass; of weights in float8 the backward pass would keep
    each layer's copy in full."""
    on_gpu = best_device().type == "cuda"
    return recipe.model.quantization == "float8" or (on_gpu and recipe.method in fit.gradient_checkpointing)


def usual_precision() -> str:
    """bf16 where the device computes in it."""
    device = best_device()
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def _bank_share(recipe: Recipe, batch: int) -> float | None:
    """One row of a step for retention where its share of a small step is less than that; None where it is not."""
    rows = batch * recipe.training.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
    ratio = recipe.tuning.retention_ratio
    if ratio == 0 or rows_of_share(rows, ratio) >= 1 or rows < 2:
        return None
    return 1 / rows


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
