"""TODO."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import Evaluation
from difftuning_control.runs.gates import judge

FOLDER = "gates"  # in the run's own: the evaluation that its gates were judged by


def judge_run(run: dict[str, Any], recipe: Recipe, output: Path) -> dict[str, Any]:
    """What `run.json` holds under `gates`, of a finished run in its folder; pictures are drawn where they must be.

    Raises:
        UserError: if its pictures, its bank or its base are no longer there.
    """
    side: dict[str, Any] = {"losses": run["losses"]}
    gates = recipe.gates
    if gates.draws:
        import torch

        from difftuning_control.evaluation.compare import evaluate

        gc.collect()  # the evaluation loads models of its own
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        source = run["bank"]["folder"] if run["bank"].get("pictures") else None
        request = Evaluation(
            [str(output)], source=source, features=gates.features, pictures=gates.pictures, seeds=gates.seeds,
            steps=gates.steps, guidance_scale=gates.guidance_scale, output=str(output / FOLDER),
        )  # fmt: skip
        side |= evaluate(request)["sides"][0]
    return judge(gates, side)
