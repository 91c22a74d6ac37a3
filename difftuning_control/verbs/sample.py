"""`difftune sample`: pictures of a trained or a pretrained model, with the seeds that make them comparable."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image

from difftuning_control.data.control_spec import Conditioner, ControlSpec
from difftuning_control.data.images import decode_image
from difftuning_control.data.labels import begin_as
from difftuning_control.errors import UserError
from difftuning_control.evaluation.drawing import sample_pictures, save_grid
from difftuning_control.families.hub import best_device
from difftuning_control.families.loading import load_family
from difftuning_control.pipelines.domain_guidance import check_domain_method, domain_guided
from difftuning_control.runs.finished import data_of_runs, finished_run, tuned_model, weights_of
from difftuning_control.runs.folder import refuse_among_data, refuse_unwritable
from difftuning_control.runs.kept import kept_steps, place_of_run
from difftuning_control.runs.places import need_places
from difftuning_control.runs.record import RunRecord
from difftuning_control.system.durable import write_json
from difftuning_control.system.secrets import without_secrets
from difftuning_control.system.terminal import progress
from difftuning_control.system.text import file_stem
from difftuning_control.system.untrusted import BYTES_PER_PIXEL, MAX_PIXELS, read_file

if TYPE_CHECKING:
    from difftuning_control.recipe.requests import Moved


def sample_to_folder(
    prompts: list[str],
    run: str | None,
    model: dict[str, Any] | None,
    control: str | None,
    control_ready: bool,
    compare: bool,
    output: str,
    steps: int,
    guidance_scale: float,
    domain_guidance_scale: float | None,
    resolution: int | None,
    seed: int,
    overwrite: bool,
    kept: bool = False,
    moved: Moved | None = None,
) -> str:
    """Write one PNG a prompt, `samples.json`, and with `compare` a grid, with `kept` one of all steps that the run kept
    too; returns what was written in words.

    Of a ControlNet, `condition.png` is what it was shown.

    Raises:
        UserError: if the run is not there or not finished, a ControlNet has no condition or another run has one, or
            the output folder already holds pictures or cannot be written.
    """
    folder = Path(output)
    if run is not None:
        refuse_among_data(folder, data_of_runs(run, moved=moved))
    refuse_unwritable(folder)
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"the output {folder} is not empty; choose another folder or give --overwrite.")
    settings: dict[str, Any] = {"seed": seed, "steps": steps, "guidance_scale": guidance_scale}
    record = finished_run(run, moved) if run is not None else None
    chosen = vars(record.recipe.model) if record is not None else model or {"id": "embedded", "variant": None}
    _check_control(run, record, control)
    steps_kept = _steps_to_compare(run, record) if kept and run is not None and record is not None else []
    if record is not None and run is not None:
        need_places(record, run, ("model",))
    if domain_guidance_scale is not None:
        check_domain_method(str(run), record.method if record is not None else "")
    photo = _read_picture(control) if control is not None else None
    dtype = getattr(torch, record.dtype_name) if record is not None else torch.float32  # that of the tuning
    memory = {
        "quantization": chosen.get("quantization"),
        "offload": chosen.get("offload", False),
    }  # earlier ones had none
    family = load_family(chosen["id"], dtype, chosen["variant"], **memory).to(best_device())
    side = resolution or (record.data.resolution if record is not None else family.native_resolution)
    family.check_resolution(side, "resolution")
    settings["resolution"] = side
    condition = None
    if photo is not None:
        conditioner = Conditioner(ControlSpec.load(weights_of(run or "", "controlnet")), family.device)
        condition = conditioner.prepare(photo, side, side, control_ready)
    if record is not None:
        begin_as(family, record.classes, record.seed)
    family.check_prompts(prompts)  # before anything is drawn
    total = len(prompts) * (1 + compare + len(steps_kept))
    asked = _rows(condition, len(prompts)) if condition is not None else None
    drawn_at = settings if domain_guidance_scale is None else settings | {"guidance_scale": domain_guidance_scale}
    rows: dict[str, list[Image.Image]] = {}
    with progress(total, "sampling") as advance:
        if compare:
            rows["base"] = sample_pictures(family, prompts, **settings, advance=advance)
        if record is None or run is None:
            pictures = sample_pictures(family, prompts, **settings, advance=advance)
        else:
            for step in (*steps_kept, None):
                with tuned_model(family, run, record, step) as tuned:
                    guided = cast(AbstractContextManager[None], nullcontext())
                    if domain_guidance_scale is not None:
                        guided = domain_guided(family, tuned)
                    with guided:
                        pictures = sample_pictures(tuned, prompts, **drawn_at, advance=advance, control=asked)
                rows["tuned" if step is None else f"step {step}"] = pictures
    folder.mkdir(parents=True, exist_ok=True)
    for i, (prompt, picture) in enumerate(zip(prompts, pictures)):
        picture.save(folder / f"{i:03d}-{file_stem(without_secrets(prompt))}.png")
    if condition is not None:
        condition.save(folder / "condition.png")
    if compare:
        shown = {"condition": [condition] * len(prompts)} if condition is not None else {}
        save_grid(folder / "grid.png", shown | rows, prompts)
    given: dict[str, Any] = {"control": control, "control_ready": control_ready} if control is not None else {}
    if domain_guidance_scale is not None:
        given["domain_guidance_scale"] = domain_guidance_scale
    if steps_kept:
        given["kept"] = steps_kept
    write_json(folder / "samples.json", {"run": run, "model": chosen, "prompts": prompts, **given, **settings})
    return f"{len(pictures)} pictures in {folder}"


def _steps_to_compare(run: str, record: RunRecord) -> list[int]:
    """The steps whose weights a run kept, but for those that are its result."""
    folder, step = place_of_run(run)
    found = [] if step is not None else [s for s in kept_steps(folder) if s != record.steps]
    if not found:
        said = "is one step of a run" if step is not None else "kept no weights on its way (training.save_at)"
        raise UserError(f"--kept sets the steps of a run side by side, and {run} {said}; leave it out.")
    return found


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


def _rows(condition: Image.Image, count: int) -> torch.Tensor:
    """One condition for each of so many prompts, (count, 3, H, W) uint8."""
    return torch.from_numpy(np.array(condition)).permute(2, 0, 1).expand(count, -1, -1, -1)
