"""Choices that bring their own fields: a kind that is chosen over a recipe leaves out what belonged to the recipe's.

--tuning.schedule.kind constant     over a recipe with tau
--adapter.kind ia3                  over one with a rank
--control.annotator hed             over one with the params of canny
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from difftuning_control.recipe.adapter_kinds import KINDS
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.training import SCHEDULE_OPTIONS

Values = Mapping[str, Any]  # by dotted key


def flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key; what is a dictionary in the recipe itself stays whole."""
    flattened: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key != "control.params":
            flattened |= flat(value, f"{key}.")
        else:
            flattened[key] = value
    return flattened


def _defaults(section: type, prefix: str = "") -> dict[str, Any]:
    """Of a dataclass and its sections by dotted key; none is made, since a schedule's checks import torch."""
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(section):
        make: Any = entry.default_factory
        if dataclasses.is_dataclass(make):
            values |= _defaults(make, f"{prefix}{entry.name}.")  # type: ignore[arg-type]
        else:
            values[f"{prefix}{entry.name}"] = entry.default if make is dataclasses.MISSING else make()
    return values


DEFAULTS = _defaults(Recipe)


def _of_schedule(values: Values) -> set[str]:
    options = {name for names in SCHEDULE_OPTIONS.values() for name in names}
    takes = SCHEDULE_OPTIONS.get(values["tuning.schedule.kind"], tuple(options))
    kept = set(takes) - {"psi"}  # all of a constant schedule's ψ, but what takes the place of u^τ in a power's
    return {f"tuning.schedule.{name}" for name in options - kept}


def _of_adapter(values: Values) -> set[str]:
    kind = values["adapter.kind"]
    options = {name for facts in KINDS.values() for name in facts.options}
    strange = options.difference(KINDS[kind].options if kind in KINDS else options)
    if kind == "tlora" and values.get("adapter.init") == "pissa":
        strange.add("init")
    if kind == "lokr" and values.get("adapter.rank") is None:
        strange.add("alpha")
    return {f"adapter.{name}" for name in strange}


def _of_annotator(values: Values) -> set[str]:
    own = {"control.params", "control.weights"}
    supplied = {"control.path", "control.validation_path", "control.column"}
    return own if values["control.annotator"] == "supplied" else own | supplied


def _of_method(values: Values) -> set[str]:
    method, on = values["method"], values.get("adapter.on", "denoiser")
    adapter = {key for key in DEFAULTS if key.startswith("adapter.")}
    if method == "controlnet":
        return {"training.sample_prompts"} | (adapter if on == "denoiser" else set())
    control = {key for key in DEFAULTS if key.startswith("control.")}
    control |= {"training.stop_when", "training.stop_after", "gates.fidelity"}
    return control | (adapter if method == "full" or on == "controlnet" else set())


def _when(key: str, off: Any, *belonging: str) -> Callable[[Values], set[str]]:
    return lambda values: set(belonging) if values[key] == off else set()


CHOICES: dict[str, Callable[[Values], set[str]]] = {
    "method": _of_method,
    "tuning.schedule.kind": _of_schedule,
    "adapter.kind": _of_adapter,
    "adapter.text_encoder": _when("adapter.text_encoder", False, "adapter.text_encoder_learning_rate"),
    "control.annotator": _of_annotator,
    "data.buckets": _when("data.buckets", False, "data.bucket_step", "data.bucket_aspect"),
    "data.masks": _when("data.masks", None, "data.outside_mask"),
    "data.classes": lambda values: set() if values["data.classes"] is None else {"data.default_caption"},
    "training.stop_when": _when("training.stop_when", None, "training.stop_after"),
}


def left_out(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each layer the defaults that keys of earlier layers go back to, since a choice of the layer has no use for
    them.

    Args:
        layers: values by dotted key; each overrides those before it.
    """
    resets_by_layer, known = [], {k: DEFAULTS[k] for k in CHOICES}
    merged: dict[str, Any] = {}
    for layer in layers:
        resets: dict[str, Any] = {}
        for choice, belonging in CHOICES.items():
            if choice in layer and layer[choice] != merged.get(choice, known[choice]):
                strange = belonging(known | merged | layer)
                resets |= {
                    key: DEFAULTS[key]
                    for key in sorted(strange - layer.keys())
                    if key in merged and merged[key] != DEFAULTS[key]
                }
        merged |= layer | resets
        resets_by_layer.append(resets)
    return resets_by_layer


def as_flags(values: dict[str, Any]) -> list[str]:
    """Values as words of a command."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
