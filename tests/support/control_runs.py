"""Finished runs of a ControlNet as the trainer writes them, with fidelity curves of every shape."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

from difftuning_control.evaluation.condition_figures import MAIN
from difftuning_control.evaluation.convergence import find_convergence
from difftuning_control.evaluation.report.control import write_control_report
from difftuning_control.recipe.inputs import ControlConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.record import RunRecord

U = [0.1, 0.3, 0.5, 0.7, 0.9]


def ramp(start: float, end: float, low: float = 0.31, high: float = 0.72, count: int = 21, noise: float = 0.006):
    """A noisy curve over 0 to 500 steps that goes from low to high between two of them."""
    rng, last = random.Random(0), 500
    for i in range(count):
        step = last * i // (count - 1)
        share = min(max((step - start) / (end - start), 0), 1)
        yield step, low + (high - low) * share + (rng.gauss(0, noise) if i else 0)


def curve_of(points, kind: str = "edges", without: float = 0.31, others: tuple[str, ...] = ("ssim",)) -> dict[str, Any]:
    """As `FidelityCurve.describe` gives it."""
    steps, values = (list(column) for column in zip(*points))
    main, higher = MAIN[kind]
    found = find_convergence(steps, values, higher)
    figures = {main: values} | {name: [0.5 + v / 9 for v in values] for name in others}
    return {
        "kind": kind,
        "main": main,
        "higher_is_better": higher,
        "without": {main: without} | dict.fromkeys(others, 0.52),
        "steps": steps,
        "figures": figures,
        "convergence": None if found is None else found.to_dict(),
    }


CURVES = {
    "unmeasured": None,
    "short": curve_of(ramp(100, 200, count=4)),
    "none": curve_of(ramp(600, 700)),
    "worse": curve_of(ramp(150, 250, low=0.1, high=0.28)),
    "rising": curve_of(ramp(100, 500)),
    "slight": curve_of(ramp(150, 175, high=0.36)),
    "already": curve_of(ramp(600, 700, low=0.7)),
    "gradual": curve_of(ramp(100, 350)),
    "sudden": curve_of(ramp(150, 175)),
}


def control_run(code: str = "sudden", output: str = "runs/edges") -> dict[str, Any]:
    """A finished run, as the trainer writes it."""
    recipe = Recipe(method="controlnet", output=output, control=ControlConfig(params={"low_threshold": 100}))
    recipe.data.path, recipe.training.max_steps = "photos", 500
    losses = [0.36, 0.2, 0.11, 0.046, 0.0104]
    bands = {
        role: {"base": {"u": U, "loss": losses}, "tuned": {"u": U, "loss": [v * (0.9 + 0.1 * i) for v in losses]}}
        for i, role in enumerate(("target", "bank"))
    }
    return {
        "status": "complete",
        "recipe": recipe.to_dict(),
        "steps": 500,
        "seed": 0,
        "device": "cpu (x86_64, 2 threads)",
        "data": {"pictures": 584, "held_out": 32, "skipped": {"bad.png": "is not a picture"}, "resolution": 64},
        "control": {
            "spec": {
                "annotator": "canny",
                "params": {"low_threshold": 100, "high_threshold": 200},
                "weights": None,
                "resolution": 64,
                "value_range": [0.0, 1.0],
                "channel_order": "rgb",
                "resize": "lanczos",
                "crop": "centre",
            },
            "blank": [f"blank-{i:02d}.png" for i in range(27)],
        },
        "fidelity": copy.deepcopy(CURVES[code]),
        "losses": bands,
        "steps_per_second": 1.9228,
        "frozen": {"denoiser_before": "22c6da55331a4c92", "denoiser_after": "22c6da55331a4c92"},
        "timings": {"preparation": 7.45, "training": 611.2},
        "versions": {"python": "3.12.3", "difftuning-control": "0.2.0", "torch": "2.13.0"},
    }


def control_page(run: dict[str, Any], folder: Path, language: str = "en") -> Path:
    """The report of a run by what its `run.json` holds."""
    return write_control_report(RunRecord.from_dict(run), folder, language)
