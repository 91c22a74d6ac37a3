"""What a finished run left: its record, and its tuned model beside the pretrained one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from difftuning_control.adapters.attached import unload_adapter
from difftuning_control.adapters.files import LORA_FILE
from difftuning_control.adapters.loading import load_adapter
from difftuning_control.data.control_spec import ControlSpec
from difftuning_control.errors import UserError
from difftuning_control.families.hub import free_memory
from difftuning_control.families.loading import load_controlnet, load_family
from difftuning_control.runs.folder import data_places
from difftuning_control.runs.kept import place_of_run, record_at, step_folder
from difftuning_control.runs.places import absolute, located
from difftuning_control.runs.record import RECORD, RunRecord, need_run
from difftuning_control.system.digests import digest_of_file
from difftuning_control.system.text import harmless

if TYPE_CHECKING:
    from difftuning_control.families.family import Family
    from difftuning_control.recipe.requests import Moved


def finished_run(run: str | Path, moved: Moved | None = None) -> RunRecord:
    """The record of a finished run, or of a run as it was at a step that it kept, with paths as they are today.

    Args:
        run: its folder, or `RUN/step-000010`.
        moved: new places of its inputs.

    Raises:
        UserError: if there is no run, or it is not finished.
    """
    folder, step = place_of_run(run)
    try:
        record = need_run(folder)
    except (OSError, ValueError) as error:
        if not folder.exists():
            raise UserError(
                f"there is no folder {run} (looked for at {absolute(run)}); if the run was moved, give its new place "
                "as --run, or to evaluate as --runs."
            ) from None
        said = "" if isinstance(error, OSError) else f": {harmless(str(error))}"
        raise UserError(
            f"{run} holds no run (no readable {RECORD}{said}); give the output folder of difftune train."
        ) from None
    if step is not None:
        return record_at(located(record, folder, moved), folder, step)
    if not record.is_complete:
        raise UserError(f"the run {run} is {record.status}, not complete; go on with difftune resume {run}.")
    return located(record, folder, moved)


def weights_of(run: str | Path, name: str) -> Path:
    """Where the `pipeline` or the `controlnet` of a run lies; those of a kept step are its folder itself."""
    return Path(run) / name if place_of_run(run)[1] is None else Path(run)


def data_of_runs(*runs: str, moved: Moved | None = None) -> list[str]:
    """The folders of pictures that these finished runs were tuned and validated on.

    Raises:
        UserError: if one of them is no finished run.
    """
    return [place for run in runs for place in data_places(finished_run(run, moved).recipe)]


def check_base(family: Family, record: RunRecord, run: str | Path) -> None:
    """Refuse a run that was tuned from another base.

    Raises:
        UserError: naming what differs.
    """
    if not record.may_have_dtype(family.dtype):
        raise UserError(
            f"the run {run} was tuned with its base in {record.dtype}, which is loaded in {family.dtype} here; "
            "judge runs of different precisions apart."
        )
    base = record.fingerprints.base
    differing = [name for name, digest in family.fingerprints.items() if base.get(name) != digest]
    if differing:
        raise UserError(
            f"the run {run} was tuned from another base (its {', '.join(differing)} differ from "
            f"{record.recipe.model.id} as it is here); give the base that it was tuned from."
        )


def check_outputs(record: RunRecord, run: str | Path) -> None:
    """Refuse a run whose result is not what it left.

    Raises:
        UserError: naming the first file that is missing or differs.
    """
    for name, digest in record.outputs.items():
        path = Path(run) / name
        if name in (record.discarded or ()):
            raise UserError(
                f"{path} was judged by a pilot, which keeps whole models of its first seed only; give such a run."
            )
        if not path.is_file() or digest_of_file(path) != digest:
            what = "has changed" if path.is_file() else "is missing"
            raise UserError(f"{path} {what} since the run; train it anew, or give another run.")


@contextmanager
def tuned_model(family: Family, run: str | Path, record: RunRecord, step: int | None = None) -> Iterator[Family]:
    """The tuned model: the given base with the run's adapter on for the while, or the run's own pipeline.

    Args:
        family: the base, without an adapter.
        run: its folder, or `RUN/step-000010`.
        step: the weights that `training.save_at` kept after so many steps; the final ones when None.

    Raises:
        UserError: if these weights were not kept.
    """
    run, named = place_of_run(run)
    step = named if step is None else step
    folder = run if step is None else run / step_folder(step)
    if not folder.is_dir():
        raise UserError(f"the run {run} kept no weights after {step} steps; name a step of its training.save_at.")
    method = record.method
    if method == "controlnet":
        place = str(folder / "controlnet" if step is None else folder)
        family.controlnet = load_controlnet(family, place, family.dtype)
        ControlSpec.load(place).check_range(family.condition_range)
        try:
            yield family
        finally:
            family.controlnet = None
        return
    if method == "full":
        place = str(folder / "pipeline" if step is None else folder)
        tuned = load_family(place, family.dtype, offload=family.offload).to(family.device)
        tuned.encodes_in_step = family.encodes_in_step
        try:
            yield tuned
        finally:  # the caller still has its name
            tuned.to("cpu")
            free_memory()
        return
    load_adapter(family.pipe, folder)
    family.mend_adapter(folder / LORA_FILE)
    try:
        yield family
    finally:
        unload_adapter(family.pipe)
