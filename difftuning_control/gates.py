"""TODO."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftuning_control.data.examples import ImageData
from difftuning_control.errors import UserError
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import Evaluation
from difftuning_control.runs.gates import judge

if TYPE_CHECKING:
    from difftuning_control.evaluation.features import Features

FOLDER = "gates"  # in the run's own: the evaluation that its gates were judged by


def check_gates(recipe: Recipe, data: ImageData, held_out: ImageData) -> None:
    """Refuse before training what could not be judged after it.

    Raises:
        UserError: if too few pictures are held out, some of them are tuned on too, or the features are not at hand.
    """
    gates = recipe.gates
    if not gates.draws:
        return
    from difftuning_control.evaluation.features import load_features
    from difftuning_control.evaluation.figures import check_held_out

    check_held_out(held_out)
    shared = {e.digest for e in data.examples} & {e.digest for e in held_out.examples}
    if shared:
        raise UserError(
            f"{len(shared)} of the {len(held_out)} held-out pictures are tuned on too, and gates are judged on others; "
            "take the copies out, or leave the gates out."
        )
    _: Features = load_features(gates.features)


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
