"""`difftune sample`: pictures of a trained or a pretrained model, with the seeds that make them comparable."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from difftuning_control.errors import UserError
from difftuning_control.families import load_family, quiet_loading
from difftuning_control.fingerprint import write_json
from difftuning_control.inputs import check_resolution, progress
from difftuning_control.pictures import sample_pictures, save_grid
from difftuning_control.provenance import read_run


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
    if any(p.is_file() for p in (folder, *folder.parents)):
        raise UserError(f"the output {folder} is a file or lies below one; name a folder.")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"the output {folder} is not empty; choose another folder or give --overwrite.")
    settings: dict[str, Any] = {"seed": seed, "steps": steps, "guidance_scale": guidance_scale}
    record = _finished_run(run) if run is not None else None
    chosen = record["recipe"]["model"] if record is not None else model or {"id": "embedded", "variant": None}
    family = load_family(chosen["id"], variant=chosen["variant"])
    side = resolution or (record["data"]["resolution"] if record is not None else family.native_resolution)
    settings["resolution"] = check_resolution(family, side, "resolution")
    total = len(prompts) * (2 if compare else 1)
    with progress(total, "sampling") as advance:
        base = sample_pictures(family, prompts, **settings, advance=advance) if compare else []
        if record is not None:
            assert run is not None
            if record["recipe"]["method"] == "lora":
                with quiet_loading():
                    family.pipe.load_lora_weights(run)
            else:
                family = load_family(str(Path(run) / "pipeline"))
        pictures = sample_pictures(family, prompts, **settings, advance=advance)
    folder.mkdir(parents=True, exist_ok=True)
    for i, (prompt, picture) in enumerate(zip(prompts, pictures)):
        name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"
        picture.save(folder / f"{i:03d}-{name}.png")
    if compare:
        save_grid(folder / "grid.png", {"base": base, "tuned": pictures}, prompts)
    write_json(folder / "samples.json", {"run": run, "model": chosen, "prompts": prompts, **settings})
    return f"{len(pictures)} pictures in {folder}"


def _finished_run(run: str) -> dict[str, Any]:
    record = read_run(Path(run))
    if record is None:
        raise UserError(f"{run} holds no run (no readable run.json); give the output folder of difftune train.")
    if record["status"] != "complete":
        raise UserError(f"the run {run} is {record['status']}, not complete; go on with --training.resume true.")
    return record
