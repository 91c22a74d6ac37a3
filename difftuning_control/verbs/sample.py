"""`difftune sample`: pictures of a trained or a pretrained model, with the seeds that make them comparable."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image

from difftuning_control.data.control_spec import Conditioner, ControlSpec, condition_rows
from difftuning_control.data.examples import listed
from difftuning_control.data.images import decode_image
from difftuning_control.data.labels import begin_as
from difftuning_control.errors import UserError
from difftuning_control.evaluation.drawing import sample_pictures, save_grid
from difftuning_control.families.fitting import usual_precision
from difftuning_control.families.hub import best_device
from difftuning_control.families.loading import DTYPES, load_model
from difftuning_control.families.prompts import cut_note
from difftuning_control.pipelines.domain_guidance import check_domain_method, domain_guided
from difftuning_control.recipe.captioning import Captioning
from difftuning_control.recipe.inputs import ModelConfig
from difftuning_control.runs.finished import data_of_runs, finished_run, tuned_model, weights_of
from difftuning_control.runs.folder import refuse_among_data, refuse_unwritable
from difftuning_control.runs.kept import kept_steps, place_of_run
from difftuning_control.runs.places import need_places
from difftuning_control.runs.record import RunRecord
from difftuning_control.system.durable import free_folder, is_empty, write_json
from difftuning_control.system.secrets import without_secrets
from difftuning_control.system.terminal import progress, say
from difftuning_control.system.text import file_stem
from difftuning_control.system.untrusted import BYTES_PER_PIXEL, MAX_PIXELS, read_file

if TYPE_CHECKING:
    from difftuning_control.families.family import Family
    from difftuning_control.recipe.requests import SampleRequest

RESULT, GRID, CONDITION = "samples.json", "grid.png", "condition.png"


@dataclass(frozen=True)
class _Model:
    """What draws: the record of a run, where there is one, its kept steps to compare, and the model by its settings."""

    record: RunRecord | None
    chosen: ModelConfig
    steps_kept: list[int]


def sample_to_folder(request: SampleRequest, overwrite: bool = False) -> Path:
    """Write one PNG a prompt, `samples.json`, and with `compare` a grid, with `kept` one of all steps that the run kept
    too; returns the folder, which is a new numbered one where the named one holds something.

    Of a ControlNet, `condition.png` is what it was shown.

    Raises:
        UserError: if the run is not there or not finished, a ControlNet has no condition or another run has one, or
            the output folder cannot be written.
    """
    run, folder = request.run, Path(request.output)
    if run is not None:
        refuse_among_data(folder, data_of_runs(run, moved=request.moved))
    refuse_unwritable(folder)
    model = _model_of(request)
    photo = _read_picture(request.control) if request.control is not None else None
    family = _load(model)
    settings = _settings(request, family, model.record)
    condition = None
    if photo is not None:
        conditioner = Conditioner(ControlSpec.load(weights_of(run or "", "controlnet")), family.device)
        side = settings["resolution"]
        condition = conditioner.prepare(photo, side, side, request.control_ready)
    rows = _draw(request, family, model, settings, condition)
    if not overwrite:  # now that they are drawn: others may have written there meanwhile
        asked = folder
        folder = free_folder(asked, lambda place: place.exists() and not (place == asked and is_empty(place)))
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    for name, picture in zip(_file_names(request.prompts), rows[list(rows)[-1]]):
        picture.save(folder / name)
    if condition is not None:
        condition.save(folder / CONDITION)
    if request.compare:
        shown = {"condition": [condition] * len(request.prompts)} if condition is not None else {}
        save_grid(folder / GRID, shown | rows, request.prompts)
    write_json(folder / RESULT, _described(request, model, settings))
    return folder


def _file_names(prompts: Sequence[str]) -> list[str]:
    return [f"{i:03d}-{file_stem(without_secrets(prompt))}.png" for i, prompt in enumerate(prompts)]


def _clear(folder: Path) -> None:
    """Remove the pictures that an earlier `samples.json` tells of; other files are left alone."""
    try:
        earlier = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        names = [RESULT, *_file_names(earlier["prompts"])]
        names += [GRID] if earlier.get("compare") else []
        names += [CONDITION] if "control" in earlier else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    for name in names:
        with suppress(OSError):  # what is drawn is not lost for a file that another program holds
            (folder / name).unlink()


def _model_of(request: SampleRequest) -> _Model:
    """What is asked to draw, before anything is loaded."""
    run = request.run
    record = finished_run(run, request.moved) if run is not None else None
    _check_control(run, record, request.control)
    if record is None or run is None:
        return _Model(None, request.model or ModelConfig(), [])
    steps_kept = _steps_to_compare(run, record) if request.kept else []
    need_places(record, run, ("model",))
    if request.domain_guidance_scale is not None:
        check_domain_method(run, record.method)
    return _Model(record, record.recipe.model, steps_kept)


def _load(model: _Model) -> Family:
    """The model, in the precision of the tuning; one of the Hub that was not tuned as a run would have it."""
    if model.record is not None:
        dtype = getattr(torch, model.record.dtype_name)
    else:
        dtype = torch.float32 if model.chosen.id == "embedded" else DTYPES[usual_precision()]
    return load_model(model.chosen, dtype).to(best_device())


def _settings(request: SampleRequest, family: Family, record: RunRecord | None) -> dict[str, Any]:
    """What the base and the tuned model draw with."""
    side = request.resolution or (record.data.resolution if record is not None else family.native_resolution)
    family.check_resolution(side, "resolution")
    steps, scale = family.suited(request).drawn
    return {
        "seed": request.seed,
        "steps": steps,
        "guidance_scale": scale,
        "resolution": side,
    }


def _prompt_notes(family: Family, prompts: list[str], record: RunRecord | None) -> Iterator[str]:
    """What to say of prompts that are too long, or that do not call up what a run learnt."""
    if note := cut_note(family, prompts, "prompts"):
        yield note
    captioning = record.recipe.data.captioning if record is not None else Captioning()
    without = [prompt for prompt in prompts if captioning.is_missing(prompt)]
    if without:
        yield f"note: this run learnt {captioning.trigger!r}, which {listed(map(repr, without))} does not say"


def _draw(
    request: SampleRequest, family: Family, model: _Model, settings: dict[str, Any], condition: Image.Image | None
) -> dict[str, list[Image.Image]]:
    """The pictures by what drew them; those that are asked for are the last."""
    prompts, record, run = request.prompts, model.record, request.run
    if record is not None:
        begin_as(family, record.classes, record.seed)
    family.check_prompts(prompts)  # before anything is drawn
    for line in _prompt_notes(family, prompts, record):
        say(line)
    asked = condition_rows(condition, len(prompts)) if condition is not None else None
    scale = request.domain_guidance_scale
    drawn_at = settings if scale is None else settings | {"guidance_scale": scale}
    rows: dict[str, list[Image.Image]] = {}
    with progress(len(prompts) * (1 + request.compare + len(model.steps_kept)), "sampling") as advance:
        if request.compare or record is None or run is None:
            rows["base"] = sample_pictures(family, prompts, **settings, advance=advance)
        if record is None or run is None:
            return rows
        for step in (*model.steps_kept, None):
            with tuned_model(family, run, record, step) as tuned:
                share = request.unconditional_strength or 0.0
                guided = domain_guided(family, tuned, share) if scale is not None else nullcontext()
                with cast(AbstractContextManager[None], guided):
                    pictures = sample_pictures(tuned, prompts, **drawn_at, advance=advance, control=asked)
            rows["tuned" if step is None else f"step {step}"] = pictures
    return rows


def _described(request: SampleRequest, model: _Model, settings: dict[str, Any]) -> dict[str, Any]:
    """What `samples.json` holds."""
    given: dict[str, Any] = {"compare": True} if request.compare else {}
    if request.control is not None:
        given |= {"control": request.control, "control_ready": request.control_ready}
    if request.domain_guidance_scale is not None:
        given["domain_guidance_scale"] = request.domain_guidance_scale
    if request.unconditional_strength is not None:
        given["unconditional_strength"] = request.unconditional_strength
    if model.steps_kept:
        given["kept"] = model.steps_kept
    return {
        "run": request.run,
        "model": dataclasses.asdict(model.chosen),
        "prompts": request.prompts,
        **given,
        **settings,
    }


def _steps_to_compare(run: str, record: RunRecord) -> list[int]:
    """The steps whose weights a run kept, but for those that are its result."""
    folder, step = place_of_run(run)
    steps = [] if step is not None else [s for s in kept_steps(folder) if s != record.steps]
    if not steps:
        said = "is one step of a run" if step is not None else "kept no weights on its way (training.save_at)"
        raise UserError(f"--kept sets the steps of a run side by side, and {run} {said}; leave it out.")
    return steps


def _check_control(run: str | None, record: RunRecord | None, control: str | None) -> None:
    if record is None:
        return
    is_control = record.method == "controlnet"
    if is_control and control is None:
        raise UserError(f"the run {run} is a ControlNet, which draws under a condition; give --control photo.png.")
    if control is not None and not is_control:
        raise UserError(f"the run {run} is no ControlNet (its method is {record.method}); omit --control.")


def _read_picture(path: str) -> Image.Image:
    try:
        return decode_image(read_file(Path(path).expanduser(), MAX_PIXELS * BYTES_PER_PIXEL))
    except OSError:
        raise UserError(f"the picture {path} of --control cannot be read; name an image file.") from None
    except UserError as error:
        raise UserError(f"the picture {path} of --control {error}; give another.") from None
