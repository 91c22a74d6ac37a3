"""`difftune train`: a run from its recipe to its record, in the order prepare, measure, train, describe."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator

from difftuning_control.adapters.tuning import result_of
from difftuning_control.data.buckets import bucket_line
from difftuning_control.data.prepare import cache_folder, silent
from difftuning_control.errors import NonFiniteLossError, UserError
from difftuning_control.families.fitting import fitted
from difftuning_control.families.hub import free_memory
from difftuning_control.families.loading import load_base
from difftuning_control.families.tunable import CLASSES_FILE
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.audit import Session
from difftuning_control.runs.folder import OutputFolder, refuse_places
from difftuning_control.runs.identity import write_recipe
from difftuning_control.runs.manifest import sources_of, write_inputs, write_record
from difftuning_control.runs.record import COMPLETE, FAILED, RunRecord, read_run
from difftuning_control.runs.record_sections import Timings
from difftuning_control.system.digests import digest_of_file
from difftuning_control.system.durable import discard, sweep, write_json
from difftuning_control.system.processes import check_shared, ending_together
from difftuning_control.system.terminal import activity
from difftuning_control.training.begin import reopen
from difftuning_control.training.checkpoint import checkpoints
from difftuning_control.training.description import describe_run
from difftuning_control.training.loop import TrainingLoop
from difftuning_control.training.phases import BEFORE, Phases
from difftuning_control.training.preparation import MeasuredObjective, PreparedRun, measure_objective, prepare_run
from difftuning_control.training.result import TrainingResult
from difftuning_control.training.setup import check_bank_rows, check_frozen, describe_budget, make_accelerator
from difftuning_control.verbs.gating import judge_and_vouch

if TYPE_CHECKING:
    from difftuning_control.families.family import Family


def train(
    recipe: Recipe,
    overwrite: bool = False,
    tell: Callable[[str], object] = lambda line: None,
    placed: Recipe | None = None,
) -> TrainingResult:
    """Run a recipe; returns its record, history and folder. A finished run that is resumed is returned as it is, unless
    its length was changed.

    Args:
        recipe: what to train, and where to.
        overwrite: replace an earlier run in the recipe's output folder.
        tell: is given, on the main process, lines of what the run begins with.
        placed: the recipe with paths as they are found from here, where it was written elsewhere; what is recorded is
            `recipe`.

    Raises:
        UserError: for a mistake in recipe, data or output folder; nothing is written then.
        NonFiniteLossError: if the loss becomes NaN or infinite.
    """
    if not recipe.data.path:
        raise UserError("the recipe names no pictures; give data.path (embedded/icons to try it).")
    if not recipe.training.resume or read_run(Path(recipe.output)) is None:
        recipe.data.captioning.refuse_secrets()
    recipe = fitted(recipe, tell)
    written = replace(recipe, training=replace(recipe.training, resume=False))  # which is no part of what is repeated
    recipe = placed or recipe
    refuse_places(recipe, overwrite)
    accelerator = make_accelerator(recipe)
    output, folder = Path(recipe.output), None
    try:
        with ending_together(accelerator), Session(output) as session, ExitStack() as kept:
            check_bank_rows(recipe, accelerator.num_processes)
            if accelerator.is_main_process:
                folder = OutputFolder(output, recipe.training.resume, overwrite)
                if recipe.training.resume and read_run(output) is None:
                    tell(f"note: there is no run in {output} to go on with; one begins")
            check_shared(accelerator, output, "output")
            check_shared(accelerator, cache_folder(recipe.data), "data.cache")
            if accelerator.device.type != "cpu":
                free_memory()  # of an earlier run's model in this process
            phases = Phases()
            with phases("load"), activity("loading", folder is not None, recipe.model.id):
                family = load_base(recipe).to(accelerator.device)
            with phases.counting(family.denoiser):
                record, written, recipe = _train(
                    written, recipe, family, accelerator, phases, output, folder, session, tell, kept
                )
            if folder is not None:
                if recipe.gates.draws:
                    _make_room(recipe, family, accelerator, kept)
                judge_and_vouch(record, written, recipe, output, session)
            accelerator.wait_for_everyone()
            return TrainingResult(record, output)
    finally:
        accelerator.end_training()
        if folder is not None:
            folder.release()


def _make_room(recipe: Recipe, family: Family, accelerator: Accelerator, kept: ExitStack) -> None:
    """Take the model that was trained off its device, as the gates load models of their own."""
    kept.close()
    accelerator.free_memory()
    if not recipe.training.shard:  # of whose weights each process has a part
        family.to("cpu")


def _train(
    written: Recipe,
    recipe: Recipe,
    family: Family,
    accelerator: Accelerator,
    phases: Phases,
    output: Path,
    folder: OutputFolder | None,
    session: Session,
    tell: Callable[[str], object],
    kept: ExitStack,
) -> tuple[RunRecord, Recipe, Recipe]:
    """The record of the run once it is complete, and both recipes with the model's resolution; `folder` is the main
    process's, and `kept` keeps open what draws a growing bank."""
    said = tell if folder is not None else silent  # once, by the main process
    prepared = prepare_run(written, recipe, family, accelerator, phases, said, kept)
    recipe, going = prepared.recipe, prepared.going
    if going.finished is not None:
        if folder is not None:
            _forget_checkpoints(output)  # killed at its very end, a run has not done so
        return going.finished, prepared.written, prepared.recipe
    for line in _notes(prepared):
        said(line)
    with phases("analysis"):
        measured = measure_objective(prepared, output, accelerator.num_processes)
    loop = _loop(prepared, measured, accelerator, phases)
    if going.reopened is not None:
        reopen(output, going.reopened, loop.state, folder is not None)
        accelerator.wait_for_everyone()
    run = describe_run(prepared, accelerator)
    run.schedule = measured.schedule
    if folder is not None:
        _begin(run, prepared, output, folder, session)

    def settle() -> None:
        loop.identity = run.identity = prepared.settle(accelerator.num_processes)
        if folder is not None:
            run.write(output)

    try:
        run.losses, run.steps_per_second = loop.run(said, settle)
    except NonFiniteLossError as error:
        if folder is not None:
            replace(run, status=FAILED, error=str(error)).write(output)
        loop.report.write(loop.done, loop.end, error=str(error))
        accelerator.wait_for_everyone()  # all stop here; the first to end would end the main process while it writes
        raise
    _add_figures(run, prepared, measured, loop)
    for line in run.data.notes or ():
        said(line)
    run.phases = phases.costs()  # of all sessions
    preparation = sum(run.phases[name].seconds for name in BEFORE if name in run.phases)
    together = sum(cost.seconds for cost in run.phases.values())
    run.timings = Timings(preparation=preparation, training=together - preparation)
    run.status = COMPLETE
    if folder is not None:
        run.outputs = _hash_outputs(output, output / result_of(recipe))
        write_record(run, prepared.written, output)
        _forget_checkpoints(output)  # only now is the result on disk and recorded
    return run, prepared.written, prepared.recipe


def _loop(prepared: PreparedRun, measured: MeasuredObjective, accelerator: Accelerator, phases: Phases) -> TrainingLoop:
    """The steps of the run; the pretrained model is measured here, before anything is attached to it."""
    return TrainingLoop(
        prepared.recipe,
        prepared.family,
        measured.objective,
        prepared.inputs,
        accelerator,
        prepared.going.identity,
        measured.budget,
        prepared.start,
        prepared.going.earlier,
        phases,
    )


def _begin(run: RunRecord, prepared: PreparedRun, output: Path, folder: OutputFolder, session: Session) -> None:
    """Make the folder the run's own, with its record, its inputs and its recipe."""
    recipe, inputs = prepared.recipe, prepared.inputs
    run.sources = sources_of(recipe)
    folder.sweep() if recipe.training.resume else folder.clear()
    run.write(output)  # first of all: by it the folder is known as a run's
    run.inputs = write_inputs(output, inputs.data, inputs.all_held_out)
    run.write(output)
    write_recipe(output, prepared.written)
    session.begin(digest_of_file(output / "recipe.yaml"), " ".join(prepared.going.said) or None)
    if run.schedule is not None:
        write_json(output / "schedule.json", run.schedule.to_dict())


def _notes(prepared: PreparedRun) -> list[str]:
    """What is said before the first step of how the run goes on, and of what it trains with."""
    schedule, bucketing = prepared.recipe.tuning.schedule, prepared.inputs.bucketing
    code = [f"note: the schedule {schedule.path} is code, and was run"] if schedule.kind == "function" else []
    buckets = [bucket_line(bucketing)] if bucketing is not None else []
    return [*code, *(f"note: {line}" for line in prepared.going.said), *buckets]


def _add_figures(run: RunRecord, prepared: PreparedRun, measured: MeasuredObjective, loop: TrainingLoop) -> None:
    """What was measured on the way, beside the losses."""
    run.steps = loop.end
    if measured.budget is not None:
        run.budget = describe_budget(measured.budget, run.losses)
    if prepared.inputs.stream is not None:
        run.data.notes = prepared.inputs.stream.notes()
    if loop.curve is not None:
        run.fidelity = loop.curve.describe()
    if run.method == "controlnet":
        run.frozen = check_frozen(prepared.family, prepared.fingerprints)


def _forget_checkpoints(output: Path) -> None:
    for checkpoint in checkpoints(output):
        discard(checkpoint)
    sweep(output)


def _hash_outputs(output: Path, result: Path) -> dict[str, str]:
    files = [result, output / CLASSES_FILE, *sorted(result.rglob("*"))]
    return {p.relative_to(output).as_posix(): digest_of_file(p) for p in files if p.is_file()}
