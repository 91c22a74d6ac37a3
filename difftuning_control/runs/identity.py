"""The identity of a run: a digest of what decides its weights; with the versions and the device that made them."""

from __future__ import annotations

import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.record_sections import Fingerprints
from difftuning_control.system.digests import digest_of
from difftuning_control.system.durable import write_text
from difftuning_control.system.version import VERSION


class _RecipeDumper(yaml.SafeDumper):
    """With text such as 1e3 in quotes, which jsonargparse takes for a number where PyYAML does not."""


_RecipeDumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[\d_.]+[eE][-+]?\d+$"), list("-+.0123456789")
)
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")


def versions() -> dict[str, str]:
    own = {"python": platform.python_version(), "difftuning-control": VERSION}
    return own | {name: version(name) for name in PACKAGES}


def deciding_settings(recipe: Recipe, schedule_file: dict[str, Any] | None = None) -> dict[str, Any]:
    """A recipe's values without what only watches or says where things are written.

    Args:
        schedule_file: what stands for the path of a schedule; what its file says when None.
    """
    values = recipe.to_dict()
    values.pop("output")
    values.pop("gates")
    values["data"].pop("cache")
    schedule = values["tuning"]["schedule"]
    if schedule_file is not None:
        schedule |= schedule_file
    elif schedule["path"] is not None:  # what the file says, not where it lies
        schedule["path"] = recipe.tuning.schedule.build(1000).to_dict()
    if recipe.training.begin_from is None:
        values["training"].pop("begin_from")
    if recipe.tuning.retention == "samples":  # which earlier versions did not name
        values["tuning"].pop("retention")
        values["tuning"].pop("retention_rows")
    if recipe.measured_prompts == recipe.tuning.retention_prompts:  # nor this, and always measured so
        values["training"].pop("validation_prompts")
    if recipe.bank.solver == "own":  # nor this
        values["bank"].pop("solver")
    if recipe.data.trigger is None:  # nor this
        values["data"].pop("trigger")
    if recipe.data.masks is None:  # nor these
        values["data"].pop("masks")
        values["data"].pop("outside_mask")
    values["data"].pop("max_pixels")  # what is left out shows in the data's fingerprint
    for name in (
        "resume",
        "checkpoint_every",
        "save_at",
        "validate_every",
        "sample_every",
        "sample_prompts",
        "sample_steps",
        "sample_guidance_scale",
        "trackers",
        "shard",
    ):
        values["training"].pop(name)
    values["control"].pop("workers")
    if recipe.training.stop_when is None:
        values["control"].pop("fidelity")
    return values


def rows_of_step(recipe: Recipe, processes: int) -> int:
    """How many rows all processes have in an optimizer step."""
    return recipe.training.batch_size * recipe.training.gradient_accumulation_steps * processes


def recipe_identity(recipe: Recipe, fingerprints: Fingerprints, processes: int) -> str:
    """A digest of what decides the weights: the recipe without what only watches, and the inputs' fingerprints.

    Args:
        processes: how many share the work. How a step's rows are dealt out decides nothing but rounding.
    """
    return digest_of([identity_settings(recipe), fingerprints.to_dict(), rows_of_step(recipe, processes)])


def identity_settings(recipe: Recipe, schedule_file: dict[str, Any] | None = None) -> dict[str, Any]:
    """A recipe's values as far as they decide the weights; see `deciding_settings`."""
    values = without_places(deciding_settings(recipe, schedule_file))
    for name in ("batch_size", "gradient_accumulation_steps"):
        values["training"].pop(name)
    values["training"].pop("begin_from", None)
    for name in ("weights", "init"):
        values["control"].pop(name)
    return values


def without_places(values: dict[str, Any]) -> dict[str, Any]:
    """Deciding settings without where model, data, masks and bank lie, whose content is in fingerprints."""
    for section, names in (
        ("model", ("id",)),
        ("data", ("path", "validation_path", "split", "validation_split", "masks")),
        ("bank", ("path",)),
        ("control", ("path", "validation_path")),
    ):
        for name in names:
            values[section].pop(name, None)
    return values


def write_recipe(output: Path, recipe: Recipe) -> None:
    text = yaml.dump(recipe.to_dict(), Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True)
    write_text(output / "recipe.yaml", text)


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
