"""The log of a run's figures: a line a step in `metrics.jsonl`, and the trackers that the recipe names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.history import METRICS
from difftuning_control.system.durable import sync, write_text
from difftuning_control.system.secrets import without_secrets
from difftuning_control.system.terminal import say
from difftuning_control.training.checkpoint import TrainingState


class MetricsLog:
    """Figures by step, which the main process writes; `state.logged` counts the lines."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, state: TrainingState):
        self.recipe, self.accelerator, self.state = recipe, accelerator, state
        self.path = Path(recipe.output) / METRICS

    def begin(self) -> None:
        """Start the trackers, and cut off what was logged after the checkpoint that the run goes on from."""
        if self.accelerator.is_main_process and (self.path.exists() or self.state.logged):
            text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
            lines = text.splitlines(keepends=True)[: self.state.logged]
            if len(lines) < self.state.logged:
                say(f"note: {self.path} lacks {self.state.logged - len(lines)} of {self.state.logged} lines of before")
            self.state.logged = len(lines)
            write_text(self.path, "".join(lines))
        if self.recipe.training.trackers:
            self.accelerator.init_trackers(
                "difftuning-control", {"recipe": without_secrets(json.dumps(self.recipe.to_dict()))}
            )

    def write(self, step: int, values: dict[str, float]) -> None:
        """The figures after `step` steps."""
        if not values or not self.accelerator.is_main_process:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.state.logged += 1
        if self.recipe.training.trackers:
            self.accelerator.log(values, step=step)

    def show(self, step: int, grid: Path) -> None:
        """A sample grid after `step` steps, which trackers have too; the main process calls it."""
        if self.recipe.training.trackers:
            with Image.open(grid) as picture:
                pixels = np.asarray(picture.convert("RGB"))[None]
            for tracker in self.accelerator.trackers:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": pixels}, step=step, **layout)

    def sync(self) -> None:
        """Have the disk hold every line so far, before a checkpoint counts them."""
        sync(self.path)
