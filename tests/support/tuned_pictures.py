"""Pictures of trained models, and the pipelines that exports open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from difftuning_control.system.seeds import step_seed

PROMPTS = ["red 1", "a blue square", "six"]
SAMPLING = {"seed": 3, "steps": 2, "guidance_scale": 3.0, "resolution": 16}
LORA_FILE = "pytorch_lora_weights.safetensors"


def generators(amount: int = len(PROMPTS)) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(step_seed(SAMPLING["seed"], i)) for i in range(amount)]


def assert_same_pictures(found: list[Image.Image], expected: list[Image.Image]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1  # of 255: rounding at an edge


def opened(folder: Path) -> Any:
    """The pipeline that the lines of an export's card make."""
    code = (folder / "README.md").read_text().split("```python")[1].split("```")[0]
    lines: dict[str, Any] = {}
    exec(code.rpartition("image = pipe(")[0], lines)
    lines["pipe"].set_progress_bar_config(disable=True)
    return lines["pipe"]
