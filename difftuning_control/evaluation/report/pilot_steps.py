"""What to do after a pilot: the steps that its report names, and the command of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from difftuning_control.evaluation.comparison import PLAIN, improves_to_the_end, is_number
from difftuning_control.evaluation.report.commands import train_command
from difftuning_control.evaluation.report.pilot_run import PilotRun


def next_steps(
    pilot: PilotRun, best: Mapping[str, Any], by_name: Mapping[str, Mapping[str, Any]], has_pictures: bool
) -> list[dict[str, Any]]:
    """What to do after a pilot: a key of the language files, what fills it, and a command or None."""
    steps: list[dict[str, Any]] = []

    def add(code: str, command: str | None = None, **values: Any) -> None:
        steps.append({"code": code, "values": values, "command": command})

    if has_pictures:
        add("next.look")
    code, name = _what_to_train(best, by_name)
    if name in by_name:
        side, lengths = by_name[name], pilot.settings.get("lengths", [])
        add(code, _final_command(pilot, side), side=name, time=_run_seconds(side))
        if improves_to_the_end(side, best["metric"]):
            add("next.longer", side=name, steps=max(lengths, default=side["best_length"]))
    if best["reason"] in ("within_noise", "one_seed", "barred"):
        add("next.seeds", seeds=", ".join(map(str, pilot.settings.get("seeds", []))))
    if best["reason"] in ("no_plain", "alone"):
        add("next.sides")
    add("next.keep", pilot.command)
    return steps


def _what_to_train(best: Mapping[str, Any], by_name: Mapping[str, Any]) -> tuple[str, str]:
    """A key of the language files and a side: the winner, or what the figures speak for without one."""
    if best["code"] != "none":
        return "next.train", best["side"]
    retention = best["retention"]
    level = {c["side"] for c in best["comparisons"] if not (c["clear"] and not c["better"])}
    if retention and retention["clear"] and retention["side"] in level:
        return "next.train_retention", retention["side"]
    return ("next.train_plain", PLAIN) if PLAIN in by_name else ("next.train_best", best["side"])


def _run_seconds(side: Mapping[str, Any]) -> float:
    seconds = [r["seconds"] for r in side["runs"] if r["steps"] == side["best_length"] and is_number(r.get("seconds"))]
    return sum(seconds) / len(seconds) if seconds else math.nan


def _final_command(pilot: PilotRun, side: Mapping[str, Any]) -> str:
    """`difftune train` with the recipe of a side at its best length."""
    recipe = {k: dict(v) if isinstance(v, Mapping) else v for k, v in (pilot.recipe_values or {}).items()}
    recipe["model"] = {**recipe.get("model", {}), "id": pilot.model}
    recipe["data"] = {**recipe.get("data", {}), "path": pilot.data["path"]}
    recipe["method"] = pilot.settings.get("method", "lora")
    recipe["tuning"] = {**recipe.get("tuning", {}), **side["tuning"]}
    recipe["bank"] = {**recipe.get("bank", {}), **side.get("bank", {})}  # absent in pilots of earlier versions
    training = {"learning_rate": side["learning_rate"], "max_steps": side["best_length"]}
    if "batch_size" in pilot.settings:
        training["batch_size"] = pilot.settings["batch_size"]
    recipe["training"] = {**recipe.get("training", {}), **training}
    return train_command(recipe)
