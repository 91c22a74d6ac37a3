"""Annotators, pictures and prepared inputs of ControlNets."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from difftuning_control.data.control_spec import Conditioner
from difftuning_control.families.loading import load_family
from difftuning_control.families.sd import StableDiffusion
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.record_sections import Fingerprints
from difftuning_control.training.inputs import TrainingInputs, prepare_inputs
from difftuning_control.training.setup import attach_controlnet, build_objective, make_accelerator

OUTLINE = """
import numpy as np

def outline(picture, least=30):
    grey = picture.astype(int).sum(2)
    found = np.zeros(grey.shape, bool)
    found[:, 1:] |= abs(np.diff(grey, axis=1)) > least
    found[1:] |= abs(np.diff(grey, axis=0)) > least
    return found

def soft(picture):
    return 255 - picture // 2
"""
_number = count()


def on_path(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str = OUTLINE) -> str:
    """The name of a module of annotators, new on Python's path."""
    name = f"annotators_{next(_number)}"
    (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    return name


def write_photos(folder: Path, amount: int = 8, seed: int = 0) -> Path:
    """Pictures of coloured blocks in several proportions and sizes, with `metadata.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(seed), []
    for i in range(amount):
        height, width = [(40, 24), (24, 40), (16, 16), (33, 20)][i % 4]
        blocks = rng.integers(0, 255, (height // 5 + 1, width // 5 + 1, 3), np.uint8)
        pixels = blocks.repeat(5, 0).repeat(5, 1)[:height, :width]
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"red {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def prepared(recipe: Recipe) -> tuple[StableDiffusion, Conditioner, TrainingInputs]:
    """What a run of the recipe trains on."""
    family = load_family(recipe.model.id)
    conditioner = attach_controlnet(recipe, family, Fingerprints())
    objective = build_objective(recipe, family.process)
    return family, conditioner, prepare_inputs(recipe, family, objective, make_accelerator(recipe), conditioner)


def ignore(done: int) -> None:
    """Takes the place of a progress bar."""


def rows_of(pictures: list[Image.Image]) -> Tensor:
    """(N, 3, H, W) uint8."""
    return torch.from_numpy(np.stack([np.array(p) for p in pictures])).permute(0, 3, 1, 2)
