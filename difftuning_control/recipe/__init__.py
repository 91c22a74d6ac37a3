"""What can be asked for, as dataclasses that check their ranges; nothing here imports torch."""

from difftuning_control.recipe.adapter import DEFAULT_RANK, AdapterConfig
from difftuning_control.recipe.gates import DRAWN, GATES, GatesConfig
from difftuning_control.recipe.inputs import (
    MAX_SEED,
    BankConfig,
    ControlConfig,
    DataConfig,
    FidelityConfig,
    ModelConfig,
)
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.training import (
    DEFAULT_TAU,
    ScheduleConfig,
    TrainingConfig,
    TuningConfig,
)

__all__ = [
    "DEFAULT_RANK",
    "DEFAULT_TAU",
    "DRAWN",
    "GATES",
    "MAX_SEED",
    "AdapterConfig",
    "BankConfig",
    "ControlConfig",
    "DataConfig",
    "FidelityConfig",
    "GatesConfig",
    "ModelConfig",
    "Recipe",
    "ScheduleConfig",
    "TrainingConfig",
    "TuningConfig",
]
