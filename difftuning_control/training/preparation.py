"""A run before its first step: the model, the inputs, the objective, and the identity that a resume must share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator

from difftuning_control.adapters.tuning import check_adapter
from difftuning_control.data.prepare import resolution_of, silent
from difftuning_control.objective.budget import ForgettingBudget
from difftuning_control.objective.difftuning import DiffTuningObjective
from difftuning_control.objective.schedules import with_flat_retention
from difftuning_control.recipe.measured_schedule import MeasuredSchedule
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.changes import Resumption, continued, refuse_changed, resumption
from difftuning_control.runs.identity import recipe_identity
from difftuning_control.runs.record import read_run
from difftuning_control.runs.record_sections import Fingerprints
from difftuning_control.runs.start import Start, check_start, start_of
from difftuning_control.training.begin import check_beginning
from difftuning_control.training.checkpoint import checkpoints
from difftuning_control.training.compiling import check_compiler
from difftuning_control.training.inputs import TrainingInputs, prepare_inputs
from difftuning_control.training.phases import Phases
from difftuning_control.training.setup import attach_controlnet, auto_schedule, build_objective, measured_budget

if TYPE_CHECKING:
    from difftuning_control.families.family import Family


@dataclass(frozen=True)
class PreparedRun:
    """What a run trains with.

    Args:
        written: the recipe as it is recorded.
        recipe: the same with paths as they are found from here.
        fingerprints: of the base, the data, the bank and whatever else decides the weights.
        start: the weights that training begins from, where these are another run's.
        going: how the run goes on, or that it begins; its identity is a digest of all these.
    """

    written: Recipe
    recipe: Recipe
    family: Family
    objective: DiffTuningObjective
    inputs: TrainingInputs
    fingerprints: Fingerprints
    start: Start | None
    going: Resumption

    def settle(self, processes: int) -> str:
        """The identity of the run once its bank is whole, whose fingerprint is noted."""
        assert self.inputs.bank is not None
        self.fingerprints.bank = self.inputs.bank.fingerprint
        return continued(_identity(self.written, self.recipe, self.fingerprints, processes), self.going.changes)


@dataclass(frozen=True)
class MeasuredObjective:
    """The objective with what is measured on the pretrained weights: the schedule where the recipe says `auto`, and the
    budget where it names one."""

    objective: DiffTuningObjective
    schedule: MeasuredSchedule | None
    budget: ForgettingBudget | None


def prepare_run(
    written: Recipe,
    recipe: Recipe,
    family: Family,
    accelerator: Accelerator,
    phases: Phases,
    tell: Callable[[str], object] = silent,
    kept: ExitStack | None = None,
) -> PreparedRun:
    """Read and encode what a run trains on.

    Args:
        family: the model as it is loaded.
        tell: is given lines on what was left out of the data.
        kept: keeps open what draws the bank while training begins; the identity is settled once it is whole, see
            `PreparedRun.settle`. Drawn before when None.

    Raises:
        UserError: for a mistake in recipe or data, or where a run that is resumed was changed as it may not be.
    """
    family.check_autoencoder()
    side = _resolution(recipe, family)
    written, recipe = (replace(r, data=replace(r.data, resolution=side)) for r in (written, recipe))
    if recipe.training.resume:
        refuse_changed(Path(recipe.output), _decisive(written, recipe), accelerator.num_processes)
    fingerprints = Fingerprints(base=dict(family.fingerprints))
    objective = build_objective(recipe, family.training_process(resolution_of(family, recipe.data)))
    conditioner = attach_controlnet(recipe, family, fingerprints) if recipe.method == "controlnet" else None
    if recipe.method == "lora" or recipe.adapter.on == "controlnet":
        check_adapter(family, recipe.adapter)
    if recipe.training.compile is not None:
        check_compiler(recipe.training.compile, accelerator.device)
    start = _start(recipe, family, fingerprints)
    family.encodes_in_step = recipe.adapter.text_encoder
    inputs = prepare_inputs(recipe, family, objective, accelerator, conditioner, tell, phases, kept)
    fingerprints.data, fingerprints.held_out = inputs.data.fingerprint, inputs.held_out.fingerprint
    if recipe.training.stop_when is not None and inputs.control is not None and inputs.control.probe is not None:
        fingerprints.probe = inputs.control.probe.fingerprint
    fingerprints.bank = inputs.bank.fingerprint if inputs.bank is not None and inputs.bank.is_whole else None
    going = _resumption(written, recipe, accelerator.num_processes, fingerprints)
    if going.reopened is not None:
        start = Start(Path(recipe.output), going.reopened)
    return PreparedRun(written, recipe, family, objective, inputs, fingerprints, start, going)


def _resolution(recipe: Recipe, family: Family) -> int | None:
    """The recipe's or the model's own; of a run that goes on what its record has, which in earlier ones may be None."""
    if recipe.data.resolution is not None:
        return recipe.data.resolution
    before = read_run(Path(recipe.output)) if recipe.training.resume else None
    return family.native_resolution if before is None else before.recipe.data.resolution


def _start(recipe: Recipe, family: Family, fingerprints: Fingerprints) -> Start | None:
    """The weights to begin from, which are among what decides the run."""
    if recipe.training.begin_from is None:
        return None
    start = start_of(recipe.training.begin_from)
    check_start(start, recipe, family)
    if recipe.method == "lora":
        check_beginning(start, family, recipe.adapter)
    fingerprints.begin = start.fingerprint
    return start


def _resumption(written: Recipe, recipe: Recipe, processes: int, fingerprints: Fingerprints) -> Resumption:
    """How the run goes on, or that it begins."""
    identity = _identity(written, recipe, fingerprints, processes)
    if not recipe.training.resume:
        return Resumption(identity)
    output = Path(recipe.output)
    complete = checkpoints(output)
    newest = int(complete[0].name.split("-")[1]) if complete else None
    return resumption(output, _decisive(written, recipe), fingerprints, identity, processes, newest)


def _decisive(written: Recipe, recipe: Recipe) -> Recipe:
    """What decides the weights: bank.prompts as it is written, since the bank says what they are."""
    return replace(recipe, bank=replace(recipe.bank, prompts=written.bank.prompts))


def _identity(written: Recipe, recipe: Recipe, fingerprints: Fingerprints, processes: int) -> str:
    return recipe_identity(_decisive(written, recipe), fingerprints, processes)


def measure_objective(run: PreparedRun, output: Path, processes: int) -> MeasuredObjective:
    """Measure schedule and budget on the pretrained weights, where the recipe asks for them.

    Args:
        output: the run's folder, from which a resumed run reads its schedule back.
    """
    recipe, objective = run.recipe, run.objective
    schedule = budget = None
    if recipe.tuning.schedule.kind == "auto":
        schedule = auto_schedule(recipe, run.family, run.inputs, output, processes)
        objective = replace(objective, schedule=schedule.build())
    if recipe.tuning.forgetting_budget is not None:
        budget = measured_budget(recipe, run.family, run.inputs)
        objective = replace(objective, schedule=with_flat_retention(objective.schedule, objective.process.u))
    return MeasuredObjective(objective, schedule, budget)
