"""`difftune export`: a finished run as a directory, or a file, that other programs open without the run.

    diffusers, copied        a whole pipeline directory, a LoRA beside its modules or merged into them
    diffusers, referenced    the LoRA or the ControlNet alone, and which base it belongs to
    kohya, comfyui           one LoRA file under the names of those tools

All of it is written into a temporary folder beside the target, which takes the target's place at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftuning_control.errors import UserError
from difftuning_control.families.hub import quiet_loading
from difftuning_control.pipelines.strength import psi_of_run
from difftuning_control.recipe.adapter_kinds import KINDS
from difftuning_control.recipe.requests import ExportRequest
from difftuning_control.runs.card import base_name
from difftuning_control.runs.finished import check_outputs, data_of_runs, finished_run
from difftuning_control.runs.folder import check_folder, refuse_among_data
from difftuning_control.runs.gates import check_passed
from difftuning_control.runs.identity import versions
from difftuning_control.runs.kept import place_of_run
from difftuning_control.system.durable import PARTIAL, alone, place, write_json, write_text
from difftuning_control.system.tensors import named_errors
from difftuning_control.verbs.export.card import Parts, despite_gates, evaluation_lines, export_card
from difftuning_control.verbs.export.files import write_parts

if TYPE_CHECKING:
    from difftuning_control.recipe.recipe import Recipe
    from difftuning_control.runs.record import RunRecord

MARKER = "export.json"


def export(
    request: ExportRequest, overwrite: bool = False, written: Callable[[Path], object] = lambda folder: None
) -> Path:
    """Write a finished run to `request.to`, and upload it where `request.push` says so; returns the folder.

    Args:
        written: told of the folder once it is there, before anything is uploaded.

    Raises:
        UserError: if the run is not finished or has changed since, its base is another one here, the request does not
            fit it, or the folder holds something; nothing is written then. Also if the upload fails.
    """
    record = finished_run(request.run, request.moved)
    recipe = record.recipe
    _check_method(request, recipe.method)
    _check_adapter(request, recipe)
    check_outputs(record, request.run)
    if not request.despite_gates:
        check_passed(record, request.run)
    _check_place(request, record, overwrite)
    if request.push is not None:
        _check_hub()
    figures = [] if request.evaluation is None else evaluation_lines(request.evaluation, request.run, record)
    target = Path(request.to)
    with _taking_the_place_of(target) as folder, named_errors(target), quiet_loading():
        parts = write_parts(request, record, recipe, folder)
        write_text(folder / "README.md", export_card(request, recipe, record, parts, figures))
        _write_marker(request, record, recipe, parts, folder)
    written(target)
    if request.push is not None:
        _push(target, request.push)
    return target


# --- what is refused ------------------------------------------------------------------------------------------------


def _check_method(request: ExportRequest, method: str) -> None:
    what = f"the run {request.run} has the method {method}"
    if method != "lora" and request.format != "diffusers":
        raise UserError(f"{what}; --format {request.format} is for LoRAs only.")
    if method != "lora" and request.adapter == "fused":
        raise UserError(f"{what} and no adapter; leave out --adapter fused.")
    if method == "full" and request.base == "referenced":
        raise UserError(f"{what}, whose result is a whole pipeline; leave out --base referenced.")
    if method != "full" and request.source_unet != "none":
        raise UserError(
            f"{what}, beside which the base's denoiser is still there; leave out --source_unet {request.source_unet}."
        )


def _check_adapter(request: ExportRequest, recipe: Recipe) -> None:
    """Refuse what another program would run otherwise than it was trained, or what no weights could hold."""
    if recipe.method != "lora":
        return
    kind, what = recipe.adapter.kind, f"the adapter of the run {request.run} is a {recipe.adapter.kind}"
    if request.format != "diffusers" and kind != "lora":
        raise UserError(f"{what}, which {request.format}'s LoRA files do not hold here; export it for diffusers.")
    if request.adapter == "fused" and (why := KINDS[kind].unfusable) is not None:
        raise UserError(f"{what}, which {why} and cannot be fused; leave out --adapter fused.")


def _check_place(request: ExportRequest, record: RunRecord, overwrite: bool) -> None:
    """Refuse a folder whose replacement would cost something: the run, its base, or what is not of an export."""
    target = Path(request.to).resolve()
    for what, path in (("the run", place_of_run(request.run)[0]), ("the base", record.base_path)):
        other = Path(path).resolve()
        if other.is_dir() and (target == other or target in other.parents or other in target.parents):
            raise UserError(f"the export {request.to} and {what} {path} lie in one another; choose another folder.")
    refuse_among_data(request.to, data_of_runs(request.run, moved=request.moved), "--to")
    check_folder(request.to, MARKER, overwrite, "--to")
    if not (target / MARKER).exists():
        return
    try:
        ours = set(json.loads((target / MARKER).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{request.to}/{MARKER} is not of difftune export; choose another folder.") from None
    strange = [name for name in _files(target) if name not in ours]
    if strange:
        raise UserError(
            f"{request.to} also holds {strange[0]}, which is not of the export; move it, or choose another folder."
        )


def _check_hub() -> None:
    from huggingface_hub import constants, get_token  # saves it where nothing is uploaded

    if constants.HF_HUB_OFFLINE:
        raise UserError("--push needs the network, and HF_HUB_OFFLINE is set; unset it, or leave out --push.")
    if get_token() is None:
        raise UserError("--push needs a login on the Hub; run `hf auth login`, or leave out --push.")


# --- what is written ------------------------------------------------------------------------------------------------


@contextmanager
def _taking_the_place_of(target: Path) -> Iterator[Path]:
    """A new folder beside the target, which is renamed to it when all went well."""
    final = target.resolve()
    made = [folder for folder in final.parents if not folder.exists()]
    room = final.with_name(f".{final.name}{PARTIAL}")
    new, old = room / "new", room / "old"
    try:
        with alone(final):
            try:
                _restore(old, final)  # of an export that was killed
                shutil.rmtree(room, ignore_errors=True)
                new.mkdir(parents=True)
                yield new
                if final.exists():
                    os.replace(final, old)
                place(new, final)
            finally:
                _restore(old, final)
                shutil.rmtree(room, ignore_errors=True)
    finally:
        for folder in made:  # those above it that stayed empty
            with suppress(OSError):
                folder.rmdir()


def _restore(old: Path, final: Path) -> None:
    if old.exists() and not final.exists():
        os.replace(old, final)


def _write_marker(request: ExportRequest, record: RunRecord, recipe: Recipe, parts: Parts, folder: Path) -> None:
    """`export.json`: what this is, which base it belongs to, the ψ it was tuned by, and which files it consists of."""
    is_named = request.format == "diffusers" and request.base == "referenced"
    settings = ("format", "base", "adapter", "pipeline", "source_unet", "dtype")
    write_json(
        folder / MARKER,
        {
            "method": recipe.method,
            "run": {"identity": record.identity, "steps": record.steps},
            "base": {
                "id": recipe.model.id if is_named else base_name(recipe.model.id),
                "variant": recipe.model.variant,
                "fingerprints": record.fingerprints.base,
            },
            "settings": {name: getattr(request, name) for name in settings},
            "gates": {k: v for k, v in record.gates.to_dict().items() if k != "asked"} if record.gates else None,
            "despite_gates": despite_gates(request, record),
            "pipeline": parts.stock,
            "schedule": _schedule(request.run),
            "versions": versions(),
            "files": sorted([*_files(folder), MARKER]),
        },
    )


def _schedule(run: str) -> dict[str, Any] | None:
    """The ψ and ξ of a run as values; None where they were measured and their file has gone since."""
    try:
        return psi_of_run(run).to_dict()
    except UserError:
        return None


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


def _push(folder: Path, repo: str) -> None:
    """Upload an export; what huggingface_hub finds as token it sends itself."""
    from huggingface_hub import create_repo, upload_folder  # saves it where nothing is uploaded

    try:
        create_repo(repo, private=True, exist_ok=True)  # making it public is a decision of its own
        upload_folder(repo_id=repo, folder_path=folder, commit_message="Exported with difftuning-control")
    except Exception as error:  # the network's and the Hub's errors are of many classes
        reason = textwrap.shorten(str(error), 200, placeholder=" …").rstrip(". ") or type(error).__name__
        raise UserError(
            f"{folder} is written, but could not be uploaded to {repo} ({reason}); run the same command with "
            "--overwrite once that is mended."
        ) from None
