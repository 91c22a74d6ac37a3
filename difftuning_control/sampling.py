"""`difftune sample`: pictures of a trained or a pretrained model, with the seeds that make them comparable."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from difftuning_control.errors import UserError
from difftuning_control.families import best_device, load_family
from difftuning_control.fingerprint import write_json
from difftuning_control.inputs import check_resolution, progress
from difftuning_control.pictures import sample_pictures, save_grid
from difftuning_control.provenance import refuse_file
from difftuning_control.runs import finished_run, tuned_model


def sample_to_folder(
    prompts: list[str],
    run: str | None,
    model: dict[str, Any] | None,
    compare: bool,
    output: str,
    steps: int,
    guidance_scale: float,
    resolution: int | None,
    seed: int,
    overwrite: bool,
) -> str:
    """Write one PNG a prompt, `samples.json`, and with `compare` a grid; returns what was written in words.

    Raises:
        UserError: if the run is not there or not finished, or the output folder already holds pictures.
    """
    folder = Path(output)
    refuse_file(folder)
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"the output {folder} is not empty; choose another folder or give --overwrite.")
    settings: dict[str, Any] = {"seed": seed, "steps": steps, "guidance_scale": guidance_scale}
    record = finished_run(run) if run is not None else None
    chosen = record["recipe"]["model"] if record is not None else model or {"id": "embedded", "variant": None}
    family = load_family(chosen["id"], variant=chosen["variant"]).to(best_device())
    side = resolution or (record["data"]["resolution"] if record is not None else family.native_resolution)
    settings["resolution"] = check_resolution(family, side, "resolution")
    total = len(prompts) * (2 if compare else 1)
    with progress(total, "sampling") as advance:
        base = sample_pictures(family, prompts, **settings, advance=advance) if compare else []
        if record is None or run is None:
            pictures = sample_pictures(family, prompts, **settings, advance=advance)
        else:
            with tuned_model(family, run, record) as tuned:
                pictures = sample_pictures(tuned, prompts, **settings, advance=advance)
    folder.mkdir(parents=True, exist_ok=True)
    for i, (prompt, picture) in enumerate(zip(prompts, pictures)):
        name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"
        picture.save(folder / f"{i:03d}-{name}.png")
    if compare:
        save_grid(folder / "grid.png", {"base": base, "tuned": pictures}, prompts)
    write_json(folder / "samples.json", {"run": run, "model": chosen, "prompts": prompts, **settings})
    return f"{len(pictures)} pictures in {folder}"
