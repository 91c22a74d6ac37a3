"""The judging of a finished run by its recipe's gates, on an evaluation of its own where pictures must be drawn."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from difftuning_control.errors import UserError
from difftuning_control.families.hub import free_memory
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import Evaluation
from difftuning_control.runs.audit import Session, read_audit
from difftuning_control.runs.finished import check_outputs
from difftuning_control.runs.gate_results import GateResults
from difftuning_control.runs.gates import judge
from difftuning_control.runs.identity import write_recipe
from difftuning_control.runs.manifest import write_record
from difftuning_control.runs.record import RECORD, RunRecord
from difftuning_control.system.digests import digest_of_file
from difftuning_control.verbs.evaluate import evaluate

FOLDER = "gates"  # in the run's own: the evaluation that its gates were judged by


def judge_run(run: RunRecord, recipe: Recipe, output: Path) -> GateResults:
    """The `gates` of the record of a finished run in its folder; pictures are drawn where they must be.

    Raises:
        UserError: if its pictures, its bank or its base are no longer there.
    """
    side: dict[str, Any] = {}
    gates = recipe.gates
    if gates.draws:
        free_memory()  # the evaluation loads models of its own
        source = run.bank.folder if run.bank is not None and run.bank.pictures else None
        request = Evaluation(
            [str(output)],
            source=source,
            features=gates.features,
            pictures=gates.pictures,
            seeds=gates.seeds,
            steps=gates.steps,
            guidance_scale=gates.guidance_scale,
            output=str(output / FOLDER),
        )
        side = evaluate(request)["sides"][0]
    return judge(gates, side, run.losses)


def judge_and_vouch(run: RunRecord, written: Recipe, recipe: Recipe, output: Path, session: Session) -> None:
    """Judge a finished run by the recipe's gates, if that was not done, and have the audit vouch for its record.

    Args:
        written: the recipe as it is recorded.
        recipe: the same with paths as they are found from here.

    Raises:
        UserError: if the run is not what its audit vouches for.
    """
    judged = run.gates
    if recipe.gates.limits and (judged is None or judged.asked != dataclasses.asdict(recipe.gates)):
        if not session.number:
            if read_audit(output).has_another(output):
                raise UserError(
                    f"{output}/{RECORD} has changed since the run, and only a run that is as it was is judged; see "
                    f"difftune verify {output}."
                )
            check_outputs(run, output)
            session.begin()
        run.gates = judge_run(run, recipe, output)
        run.recipe_values["gates"] = dataclasses.asdict(written.gates)
        write_recipe(output, written)
        write_record(run, written, output)
    if run.gates is not None:
        session.said = run.gates.failed or None
    if not session.number and read_audit(output).is_ended:
        return
    if not session.number:  # the power went between the record and the line that vouches for it
        session.begin()
    session.artefacts = {RECORD: digest_of_file(output / RECORD), **run.outputs}
