"""Recipes of pilots that train a tiny model for a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from difftuning_control.recipe.inputs import BankConfig, DataConfig, ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import PilotConfig
from difftuning_control.recipe.training import TrainingConfig, TuningConfig
from support.feature_models import save_tiny_dinov2
from support.pictures import write_pictures


def tiny_study(root: Path, model_dir: Path, pictures: Path, training: dict[str, Any], **others: Any) -> Recipe:
    """A recipe with twelve held-out pictures; its caches and its bank are below `root`.

    Args:
        training: settings beside the small ones that all have.
        others: fields of the recipe.
    """
    held_out = write_pictures(root / "held", 12, seed=7)
    small = {"batch_size": 5, "validate_every": 0, "validation_size": 4, "sample_every": 0, "lr_scheduler": "constant"}
    return Recipe(
        model=ModelConfig(str(model_dir)),
        data=DataConfig(str(pictures), holdout=0.0, validation_path=str(held_out), cache=str(root / "cache")),
        tuning=TuningConfig(retention_ratio=0.4),
        bank=BankConfig(size=12, steps=2, batch_size=6, path=str(root / "bank")),
        training=TrainingConfig(**small, **training),
        **others,
    )


def tiny_pilot(features: Path, sides: list[str], **others: Any) -> PilotConfig:
    """What a pilot compares, with two seeds; `features` is where a tiny vision model is written."""
    return PilotConfig(
        sides,
        seeds=[0, 1],
        pictures=6,
        steps=2,
        guidance_scale=2.0,
        features=str(save_tiny_dinov2(features)),
        **others,
    )
