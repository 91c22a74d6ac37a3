"""A run from its recipe to its record: prepare → encode → tune (see `loop`) → save → describe."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from difftuning_control.adapters.tuning import result_of
from difftuning_control.data.buckets import bucket_line
from difftuning_control.data.labels import describe_classes
from difftuning_control.data.prepare import cache_folder, resolution_of
from difftuning_control.errors import NonFiniteLossError, UserError
from difftuning_control.families.loading import load_base
from difftuning_control.families.tunable import CLASSES_FILE
from difftuning_control.objective.schedules import schedule_from_dict, with_flat_retention
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import Evaluation
from difftuning_control.runs.audit import Session, read_audit
from difftuning_control.runs.folder import OutputFolder
from difftuning_control.runs.gates import failed, judge
from difftuning_control.runs.manifest import local_places, sources_of, write_inputs, write_record
from difftuning_control.runs.record import (
    describe_device,
    read_run,
    recipe_identity,
    rows_of_step,
    versions,
    write_recipe,
)
from difftuning_control.system.digests import digest_of_file
from difftuning_control.system.durable import discard, sweep, write_json
from difftuning_control.system.processes import check_shared, ending_together
from difftuning_control.training.checkpoint import checkpoints
from difftuning_control.training.inputs import TrainingInputs, prepare_inputs
from difftuning_control.training.loop import TrainingLoop
from difftuning_control.training.setup import (
    _attach_controlnet,
    _auto_schedule,
    _budget,
    _check_bank_rows,
    _check_frozen,
    _describe_budget,
    build_objective,
    make_accelerator,
)

if TYPE_CHECKING:
    from difftuning_control.families.family import Family

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

        from difftuning_control.verbs.evaluate import evaluate

        gc.collect()  # the evaluation loads models of its own
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        source = run["bank"]["folder"] if run["bank"].get("pictures") else None
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
        side |= evaluate(request)["sides"][0]
    return judge(gates, side)


TABLE = ("kind", "u", "psi", "xi")


def train(recipe: Recipe, overwrite: bool = False, tell: Callable[[str], object] = lambda line: None) -> dict[str, Any]:
    """Run a recipe and return what `run.json` holds. A finished run that is resumed is returned as it is.

    Args:
        tell: is given, on the main process, lines of what the run begins with.

    Raises:
        UserError: for a mistake in recipe, data or output folder; nothing is written then.
        NonFiniteLossError: if the loss becomes NaN or infinite.
    """
    accelerator = make_accelerator(recipe)
    output, folder = Path(recipe.output), None
    try:
        with ending_together(accelerator), Session(output) as session:
            _check_bank_rows(recipe, accelerator.num_processes)
            if accelerator.is_main_process:
                folder = OutputFolder(output, recipe.training.resume, overwrite)
            check_shared(accelerator, output, "output")
            check_shared(accelerator, cache_folder(recipe.data), "data.cache")
            run = _train(recipe, accelerator, output, folder, session, tell)
            if folder is not None:
                _judge(run, recipe, output, session)
            accelerator.wait_for_everyone()
            return run
    finally:
        accelerator.end_training()
        if folder is not None:
            folder.release()


def _train(
    recipe: Recipe,
    accelerator: Accelerator,
    output: Path,
    folder: OutputFolder | None,
    session: Session,
    tell: Callable[[str], object],
) -> dict[str, Any]:
    started = time.time()
    family = load_base(recipe).to(accelerator.device)
    fingerprints: dict[str, Any] = {"base": dict(family.fingerprints)}
    family.encodes_in_step = recipe.adapter.text_encoder
    objective = build_objective(recipe, family.training_process(resolution_of(family, recipe.data)))
    conditioner = _attach_controlnet(recipe, family, fingerprints) if recipe.method == "controlnet" else None
    inputs = prepare_inputs(recipe, family, objective, accelerator, conditioner)
    fingerprints |= {"data": inputs.data.fingerprint, "held_out": inputs.held_out.fingerprint}
    if recipe.training.stop_when is not None and inputs.control is not None and inputs.control.probe is not None:
        fingerprints["probe"] = inputs.control.probe.fingerprint
    fingerprints["bank"] = inputs.bank.fingerprint if inputs.bank is not None else None
    identity = recipe_identity(recipe, fingerprints, accelerator.num_processes)
    if recipe.training.resume and (finished := _finished(output, identity, recipe, accelerator)) is not None:
        if folder is not None:
            _forget_checkpoints(output)  # killed at its very end, a run has not done so
        return finished
    if folder is not None and inputs.bucketing is not None:
        tell(bucket_line(inputs.bucketing))
    measured = None
    if recipe.tuning.schedule.kind == "auto":
        measured = _auto_schedule(recipe, family, inputs, output, accelerator.num_processes)
    if measured is not None:
        objective = replace(objective, schedule=schedule_from_dict({k: measured[k] for k in TABLE}))
    budget = None
    if recipe.tuning.forgetting_budget is not None:
        budget = _budget(recipe, family, inputs)
        objective = replace(objective, schedule=with_flat_retention(objective.schedule, objective.process.u))
    loop = TrainingLoop(recipe, family, objective, inputs, accelerator, identity, budget)

    run = _describe(recipe, family, inputs, fingerprints, identity, accelerator)
    run["schedule"] = measured
    if folder is not None:
        folder.sweep() if recipe.training.resume else folder.clear()
        run["sources"] = sources_of(recipe)
        write_json(output / "run.json", run)  # first of all: by it the folder is known as a run's
        run["inputs"] = write_inputs(output, inputs.data, inputs.all_held_out)
        write_json(output / "run.json", run)
        write_recipe(output, recipe)
        session.begin(digest_of_file(output / "recipe.yaml"))
        if measured is not None:
            write_json(output / "schedule.json", measured)
    prepared = time.time()
    try:
        run["losses"], run["steps_per_second"] = loop.run()
    except NonFiniteLossError as error:
        if folder is not None:
            write_json(output / "run.json", run | {"status": "failed", "error": str(error)})
        raise
    if budget is not None:
        run["budget"] = _describe_budget(budget, run["losses"])
    run["steps"] = loop.end
    if loop.curve is not None:
        run["fidelity"] = loop.curve.describe()
    if recipe.method == "controlnet":
        run["frozen"] = _check_frozen(family, fingerprints)
    run["timings"] = {"preparation": prepared - started, "training": time.time() - prepared}
    run["status"] = "complete"
    if folder is not None:
        run["outputs"] = _hash_outputs(output, output / result_of(recipe))
        write_record(run, recipe, output)
        _forget_checkpoints(output)  # only now is the result on disk and recorded
    return run


def _judge(run: dict[str, Any], recipe: Recipe, output: Path, session: Session) -> None:
    """Judge a finished run by the recipe's gates, if that was not done, and have the audit vouch for its record."""
    judged = run.get("gates")
    if recipe.gates.limits and (judged is None or judged["asked"] != dataclasses.asdict(recipe.gates)):
        if not session.number:
            session.begin()
        run["gates"] = judge_run(run, recipe, output)
        run["recipe"]["gates"] = dataclasses.asdict(recipe.gates)
        write_recipe(output, recipe)
        write_record(run, recipe, output)
    if "gates" in run:
        session.said = failed(run["gates"]) or None
    if not session.number and read_audit(output).is_ended:
        return
    if not session.number:  # the power went between the record and the line that vouches for it
        session.begin()
    session.artefacts = {"run.json": digest_of_file(output / "run.json"), **run["outputs"]}


def _finished(output: Path, identity: str, recipe: Recipe, accelerator: Accelerator) -> dict[str, Any] | None:
    run = read_run(output)
    if run is None:
        return None
    before, now = run.get("rows_per_step"), rows_of_step(recipe, accelerator.num_processes)
    if before not in (None, now):
        raise UserError(
            f"the run in {output} had {before} rows to a step, and here they are {now} on {accelerator.num_processes} "
            "processes; choose training.batch_size and training.gradient_accumulation_steps so that they are the same."
        )
    if run["identity"] != identity:
        raise UserError(
            f"the run in {output} had another recipe, base or data; resume with the same, or start "
            "afresh with --overwrite."
        )
    return run if run["status"] == "complete" else None


def _forget_checkpoints(output: Path) -> None:
    for checkpoint in checkpoints(output):
        discard(checkpoint)
    sweep(output)


def _describe(
    recipe: Recipe,
    family: Family,
    inputs: TrainingInputs,
    fingerprints: dict[str, Any],
    identity: str,
    accelerator: Accelerator,
) -> dict[str, Any]:
    bank = inputs.bank
    return {
        "status": "running",
        "identity": identity,
        "recipe": recipe.to_dict(),
        "family": family.name,
        "base_path": str(family.pipe.config._name_or_path),
        "fingerprints": fingerprints,
        "dtype": str(family.dtype),
        "loads_lora": hasattr(family.pipe, "load_lora_weights"),
        "data": {
            "pictures": len(inputs.data) if inputs.stream is None else "streamed",
            "held_out": len(inputs.held_out),
            "skipped": inputs.data.skipped | inputs.held_out.skipped,
            "ignored_files": inputs.data.ignored_files,
            "resolution": inputs.resolution,
            "buckets": inputs.bucketing,
            "local": local_places(recipe.data.path, recipe.data.validation_path),
        },
        "bank": None
        if bank is None
        else {
            "items": len(bank),
            "folder": str(bank.folder or bank.manifest["source"]),
            "pictures": bank.folder is None,
        },
        "classes": describe_classes(family, recipe, inputs.data),
        "control": None
        if inputs.control is None
        else {
            "classes": [family.controlnet_class.__name__, family.control_pipeline_class.__name__],
            "argument": family.control_argument,
            "spec": dataclasses.asdict(inputs.control.conditioner.spec),
            "blank": inputs.control.blank,
        },
        "prompts": inputs.sample_prompts,
        "versions": versions(),
        "device": describe_device(accelerator.device),
        "processes": accelerator.num_processes,
        "rows_per_step": rows_of_step(recipe, accelerator.num_processes),
        "seed": recipe.training.seed,
    }


def _hash_outputs(output: Path, result: Path) -> dict[str, str]:
    files = [result, output / CLASSES_FILE, *sorted(result.rglob("*"))]
    return {str(p.relative_to(output)): digest_of_file(p) for p in files if p.is_file()}
