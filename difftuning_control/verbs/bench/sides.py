"""The command lines of both sides, and how one is run under the stopwatch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from difftuning_control.errors import UserError

RANK = 16
OURS = ["-m", "difftuning_control.cli"]
TELLING = re.compile(r"difftune: |[\w.]*(Error|Exception|Interrupt)\b|\s*what\(\): ")


@dataclass(frozen=True)
class Timed:
    """One run under the stopwatch: seconds and CPU seconds of every step but the first, seconds to the first step, of
    the whole command, the most memory that it took, in bytes, the whole command's CPU seconds, and the most memory that
    its tensors took on a GPU, 0 without one."""

    steps: list[float]
    cpu: list[float]
    first_step: float | None
    seconds: float
    peak: int
    cpu_seconds: float
    device_peak: int = 0


def run(command: list[str], folder: Path, threads: int | None) -> Timed:
    """Run one side in a process of its own.

    Raises:
        UserError: with the end of what it printed, if it fails.
    """
    record, log = folder / "record.json", folder / "output.log"
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads is not None else {})
    with log.open("w", encoding="utf-8") as out:
        watched = [sys.executable, "-m", "difftuning_control.verbs.bench.stopwatch", str(record), *command]
        code = subprocess.run(watched, stdout=out, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code != 0:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        telling = [line for line in said if TELLING.match(line)] or said  # what aborts ends with its frames
        raise UserError(
            f"{' '.join(command[:3])} ended with code {code} ({' '.join(telling[-1:])}); all it said is in {log}."
        )
    found = json.loads(record.read_text())
    walls, cpus = [step[0] for step in found["steps"]], [step[1] for step in found["steps"]]
    return Timed(
        [b - a for a, b in pairwise(walls)],
        [b - a for a, b in pairwise(cpus)],
        walls[0] - found["started"] if walls else None,
        found["ended"] - found["started"],
        found["peak"],
        found["cpu"],
        found["device_peak"],
    )


def ours(
    part: str, model: Path | str, data: Path, work: Path, side: int, steps: int, batch: int, **more: Any
) -> list[str]:
    """`difftune train` as plain fine-tuning, without what the script does not do: no validation, no pictures.

    Args:
        more: other keys of the recipe, with __ for their dots.
    """
    flags: dict[str, Any] = {
        "method": part,
        "model.id": model,
        "data.path": data,
        "data.resolution": side,
        "data.holdout": 0.0,
        "data.cache": work / "cache",
        "tuning.retention_ratio": 0.0,
        "tuning.retention_weight": 0.0,
        "training.max_steps": steps,
        "training.batch_size": batch,
        "training.lr_scheduler": "constant",
        "training.learning_rate": 1e-4,
        "training.validate_every": 0,
        "training.sample_every": 0,
        "training.checkpoint_every": 100_000,
        "tuning.schedule": json.dumps({"kind": "constant", "psi": 1.0, "xi": 0.0}),
        "output": work / f"ours-{part}",
    }
    if part == "lora":
        flags["adapter.rank"] = RANK
    else:
        flags |= {"control.annotator": "supplied", "control.path": data / "edges", "control.fidelity.every": 0}
    flags |= {key.replace("__", "."): value for key, value in more.items() if value is not None}
    return [*OURS, "train", *(f"--{k}={v}" for k, v in flags.items()), "--overwrite"]


def peer(
    part: str,
    script: Path,
    model: Path,
    data: Path,
    work: Path,
    side: int,
    steps: int,
    batch: int,
    precision: str = "no",
) -> list[str]:
    """diffusers' script on the same pictures, with the same rank, rows, learning rate and precision."""
    flags: dict[str, Any] = {
        "pretrained_model_name_or_path": model,
        "train_data_dir": data,
        "resolution": side,
        "max_train_steps": steps,
        "train_batch_size": batch,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "seed": 0,
        "checkpointing_steps": 100_000,
        "output_dir": work / f"peer-{part}",
        "cache_dir": work / "datasets",
        "caption_column": "text",
        "mixed_precision": precision,
    }
    if part == "lora":
        flags["rank"] = RANK
    else:
        flags["conditioning_image_column"] = "conditioning_image"
    return [str(script), *(f"--{k}={v}" for k, v in flags.items())]


def ratio(rounds: list[tuple[list[float], list[float]]]) -> dict[str, float]:
    """Of two sides' seconds, round by round: the median of (slower side's median / ours), the least and the most.

    Args:
        rounds: for each, the seconds of the side that is compared with, and ours.
    """
    found = [median(theirs) / median(mine) for theirs, mine in rounds]
    return {"ratio": median(found), "least": min(found), "most": max(found)}
