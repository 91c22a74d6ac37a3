"""Runs of recipes: trained once, interrupted, resumed, and what they recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.record import RunRecord
from difftuning_control.verbs.train import train

PLAIN = {"tuning": {"retention_ratio": 0.0, "retention_weight": 0.0}}


def trained_once(make):
    """Gives for settings the recipe of an undisturbed run of them, made by `make` and trained once."""

    done = {}

    def run(settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in done:
            recipe = make(f"finished-{len(done)}", **settings)
            train(recipe)
            done[key] = recipe
        return done[key]

    return run


def rows(recipe: Recipe) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()]


def record(recipe: Recipe) -> dict[str, Any]:
    return json.loads((Path(recipe.output) / "run.json").read_text())


def run_record(recipe: Recipe) -> RunRecord:
    """The same, as the package reads it."""
    return RunRecord.from_dict(record(recipe))


def resumed(recipe: Recipe, **settings: Any) -> Recipe:
    return replace(recipe, training=replace(recipe.training, resume=True, **settings))


@contextmanager
def recomputed() -> Iterator[set[str]]:
    """Gives the classes of modules that run within a backward pass: what gradient checkpointing computes again."""
    found: set[str] = set()

    def note(module: Module, _: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            found.add(type(module).__name__)

    hook = register_module_forward_pre_hook(note)
    try:
        yield found
    finally:
        hook.remove()


@contextmanager
def steps_taken(interrupt: int | None = None) -> Iterator[list[int]]:
    """Gives the list of the optimizer's steps; raises KeyboardInterrupt inside the one of that number."""
    taken: list[int] = []

    def count(*_: Any) -> None:
        taken.append(1)
        if len(taken) == interrupt:
            raise KeyboardInterrupt

    hook = register_optimizer_step_post_hook(count)
    try:
        yield taken
    finally:
        hook.remove()


def interrupted_after(steps: int) -> AbstractContextManager[list[int]]:
    """Raises KeyboardInterrupt inside the optimizer step of that number; gives the list of the steps taken."""
    return steps_taken(steps)
