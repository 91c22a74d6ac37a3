"""The record of a run at its start: what went in, on what machine, by which versions."""

from __future__ import annotations

import dataclasses

from accelerate import Accelerator

from difftuning_control.data.labels import label_space_of
from difftuning_control.runs.identity import describe_device, rows_of_step, versions
from difftuning_control.runs.manifest import local_places
from difftuning_control.runs.places import places_of
from difftuning_control.runs.record import RUNNING, RunRecord
from difftuning_control.runs.record_sections import BankRecord, ControlRecord, DataRecord
from difftuning_control.training.preparation import PreparedRun


def describe_run(prepared: PreparedRun, accelerator: Accelerator) -> RunRecord:
    """The record of a run that is about to train."""
    recipe, family, inputs = prepared.recipe, prepared.family, prepared.inputs
    bank = _describe_bank(prepared)
    return RunRecord(
        status=RUNNING,
        identity=prepared.going.identity,
        changes=prepared.going.changes,
        recipe_values=prepared.written.to_dict(),
        places=places_of(recipe, bank.folder if bank is not None else None),
        family=family.name,
        base_path=str(family.pipe.config._name_or_path),
        fingerprints=prepared.fingerprints,
        dtype=str(family.dtype),
        loads_lora=hasattr(family.pipe, "load_lora_weights"),
        few_steps=family.few_step_arguments(),
        data=_describe_data(prepared),
        bank=bank,
        classes=label_space_of(family, recipe, inputs.data),
        control=_describe_control(prepared),
        prompts=inputs.sample_prompts,
        versions=versions(),
        device=describe_device(accelerator.device),
        processes=accelerator.num_processes,
        rows_per_step=rows_of_step(recipe, accelerator.num_processes),
        seed=recipe.training.seed,
    )


def _describe_data(prepared: PreparedRun) -> DataRecord:
    inputs, here, written = prepared.inputs, prepared.recipe.data, prepared.written.data
    places = {written.path: here.path, written.validation_path: here.validation_path}
    return DataRecord(
        pictures=len(inputs.data) if inputs.stream is None else "streamed",
        held_out=len(inputs.held_out),
        skipped=inputs.data.skipped | inputs.held_out.skipped,
        ignored_files=inputs.data.ignored_files,
        resolution=inputs.resolution,
        buckets=inputs.bucketing,
        local=[path for path, place in places.items() if path is not None and local_places(place)],
    )


def _describe_bank(prepared: PreparedRun) -> BankRecord | None:
    bank = prepared.inputs.bank
    if bank is None:
        return None
    return BankRecord(
        items=len(bank),
        size=bank.manifest.get("identity", {}).get("size"),
        folder=str(bank.folder or bank.manifest["source"]),
        pictures=bank.folder is None,
    )


def _describe_control(prepared: PreparedRun) -> ControlRecord | None:
    family, control = prepared.family, prepared.inputs.control
    if control is None:
        return None
    return ControlRecord(
        classes=[family.controlnet_class.__name__, family.control_pipeline_class.__name__],
        argument=family.control_argument,
        spec=dataclasses.asdict(control.conditioner.spec),
        blank=control.blank,
    )
