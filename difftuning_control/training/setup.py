"""The set-up of a training run: accelerate's engine, the objective, measured schedule, budget and ControlNet."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list, set_seed

from difftuning_control.data.bank import retained_prompts
from difftuning_control.data.control_spec import Conditioner
from difftuning_control.data.latents import Part, part_of
from difftuning_control.data.prepare import cache_folder, encoded, resolution_of
from difftuning_control.errors import UserError
from difftuning_control.evaluation.band_losses import LossChanges
from difftuning_control.evaluation.forgetting import affordable_rows, measure_schedule, row_validator
from difftuning_control.families.loading import load_controlnet
from difftuning_control.objective.budget import ForgettingBudget, spread_budget
from difftuning_control.objective.difftuning import DiffTuningObjective
from difftuning_control.objective.noise import NoiseProcess
from difftuning_control.objective.rows import rows_of_share
from difftuning_control.recipe.measured_schedule import MeasuredSchedule
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.identity import rows_of_step
from difftuning_control.runs.record_sections import BudgetRecord, Fingerprints, Frozen
from difftuning_control.system.tensors import digest_of_module
from difftuning_control.training.control_inputs import build_spec
from difftuning_control.training.inputs import TrainingInputs

if TYPE_CHECKING:
    from difftuning_control.families.family import Family

BUDGET_ROWS, BUDGET_POINTS = 64, 40  # bank items and points of u at which the base's loss is measured


def check_bank_rows(recipe: Recipe, processes: int) -> None:
    """Refuse a step that is too small for its share of bank rows."""
    rows, ratio = rows_of_step(recipe, processes), recipe.tuning.retention_ratio
    if ratio > 0 and rows_of_share(rows, ratio) == 0:
        kind = "the bank" if recipe.uses_bank else "retention"
        raise UserError(
            f"training.batch_size {recipe.training.batch_size} makes {rows} rows a step, and tuning.retention_ratio "
            f"{ratio} leaves no row for {kind}; raise one of them."
        )


def attach_controlnet(recipe: Recipe, family: Family, fingerprints: Fingerprints) -> Conditioner:
    """Give the family the ControlNet that the recipe starts from; returns what makes its conditions."""
    if recipe.control.init is None:
        family.controlnet = family.new_controlnet(recipe.training.seed)
    else:
        family.controlnet = load_controlnet(family, recipe.control.init)
    spec = build_spec(recipe, family, resolution_of(family, recipe.data))
    conditioner = Conditioner(spec, family.device)
    fingerprints.control = conditioner.fingerprint
    fingerprints.controlnet = digest_of_module(family.controlnet)
    return conditioner


def check_frozen(family: Family, fingerprints: Fingerprints) -> Frozen:
    """The denoiser's fingerprint before and after, which must be one: only the ControlNet may have changed."""
    before, after = fingerprints.base["denoiser"], digest_of_module(family.denoiser)
    if before != after:
        raise RuntimeError(f"the frozen denoiser changed while its ControlNet was trained ({before} to {after}).")
    return Frozen(denoiser_before=before, denoiser_after=after)


def make_accelerator(recipe: Recipe) -> Accelerator:
    """accelerate's engine, with the trackers that the recipe names.

    Raises:
        UserError: if a tracker is not installed or the precision is not to be had on this machine.
    """
    for tracker in recipe.training.trackers:
        if find_spec(tracker) is None:
            raise UserError(
                f"training.trackers names {tracker}, which is not installed; run "
                f"pip install 'difftuning-control[{tracker}]' or leave it out."
            )
    if recipe.training.optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise UserError(
            "training.optimizer is adamw8bit, which needs bitsandbytes; run pip install "
            "'difftuning-control[quantised]', or use adamw."
        )
    precision = recipe.training.mixed_precision
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("training.mixed_precision is fp16, which needs a GPU; use bf16 or no on a CPU.")
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=recipe.training.gradient_accumulation_steps,
        log_with=list(recipe.training.trackers) or None,
        project_dir=str(Path(recipe.output) / "logs"),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(days=7)),  # the others wait while one draws pictures
            DistributedDataParallelKwargs(
                broadcast_buffers=False
            ),  # they stay, and forwards may be of different numbers
        ],
    )
    set_seed(recipe.training.seed)
    return accelerator


def build_objective(recipe: Recipe, process: NoiseProcess) -> DiffTuningObjective:
    """The recipe's objective on a model's forward process.

    Raises:
        UserError: if the settings do not fit together.
    """
    tuning = recipe.tuning
    try:
        return DiffTuningObjective(
            process,
            tuning.schedule.build(len(process)),
            tuning.estimator,
            tuning.retention_weight,
            tuning.retention_ratio,
            tuning.min_snr_gamma,
            tuning.stratified,
            tuning.variance,
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"tuning: {error}") from None


def auto_schedule(
    recipe: Recipe, family: Family, inputs: TrainingInputs, output: Path, processes: int
) -> MeasuredSchedule:
    """The schedule of `schedule.json`: measured on the pretrained weights, or read back where a run is resumed."""
    kept = output / "schedule.json"
    if recipe.training.resume and kept.exists():
        return MeasuredSchedule.from_dict(json.loads(kept.read_text(encoding="utf-8")))
    assert inputs.bank is not None
    targets, batch = inputs.targets, rows_of_step(recipe, processes)
    count = len(targets) if inputs.buckets is None else len(inputs.data)
    rows = affordable_rows(recipe.training.max_steps, batch, min(count, len(inputs.bank)))
    if inputs.buckets is not None:  # pictures of all buckets in squares, as the bank is
        chosen, cache = inputs.data.sample(rows), cache_folder(recipe.data)
        target = encoded(family, chosen, inputs.resolution, cache, lambda count: None)
    else:
        known = (part[:, 0] if part is not None else None for part in (targets.sizes, targets.loss_weights))
        target = Part(targets.moments.first_views(family.scale_latents), targets.captions, *known)
    measured = measure_schedule(family, target, inputs.bank, inputs.embeddings, rows, recipe.training.seed)
    agreed: MeasuredSchedule = broadcast_object_list([measured])[0]  # processes may differ by rounding, schedules not
    return agreed


def measured_budget(recipe: Recipe, family: Family, inputs: TrainingInputs) -> ForgettingBudget:
    """The budget, with the pretrained model's loss on the retention rows as they will be trained on."""
    assert recipe.tuning.forgetting_budget is not None
    bank, targets, kind = inputs.bank, inputs.targets, recipe.tuning.retention_prompts
    if recipe.uses_bank:
        assert bank is not None
        part = part_of(bank, bank.retained_prompts(kind))
    else:
        sizes = targets.sizes[:, 0] if targets.sizes is not None else None
        prompts = retained_prompts(kind, targets.retained_captions)
        part = Part(targets.moments.first_views(family.scale_latents), prompts, sizes)
    rows = row_validator(family, part, inputs.embeddings, BUDGET_ROWS, 1, BUDGET_POINTS, recipe.training.seed)
    rows = replace(rows, objective=replace(rows.objective, variance=recipe.tuning.variance))  # as it is trained
    base = broadcast_object_list([rows.measure(family.model)])[0]
    allowed = spread_budget(recipe.tuning.forgetting_budget)
    return ForgettingBudget(allowed, base.centres, base.losses, recipe.tuning.retention_weight)


def describe_budget(budget: ForgettingBudget, losses: LossChanges) -> BudgetRecord:
    """Band by band on bank samples that were held out: what was allowed, what the loss rose by, was it kept.

    Without a bank the rise is that on the rows of the last steps.
    """
    if "bank" in losses:
        rise, u = losses["bank"].rises, losses["bank"].base.centres
    else:
        rise, count = np.nan_to_num(budget.rise).tolist(), len(budget.allowed)
        u = [(band + 0.5) / count for band in range(count)]
    return BudgetRecord(
        u=u,
        allowed=budget.allowed.tolist(),
        rise=rise,
        kept=[r <= a for r, a in zip(rise, budget.allowed.tolist())],
        multipliers=budget.multipliers.tolist(),
    )
