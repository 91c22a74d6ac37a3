"""Fine-tune diffusion models on a few images without forgetting: Diff-Tuning as a diffusers plug-in."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from difftuning_control.discovery import register
from difftuning_control.pipelines.registry import CLASSES
from difftuning_control.system.version import VERSION

if TYPE_CHECKING:
    from difftuning_control.adapters.attached import unload_adapter
    from difftuning_control.adapters.loading import load_adapter
    from difftuning_control.adapters.source import load_source, save_difference
    from difftuning_control.data.bank import BankRequest, KnowledgeBank
    from difftuning_control.data.control_spec import Conditioner, ControlSpec
    from difftuning_control.errors import NonFiniteLossError, UserError
    from difftuning_control.families.loading import embedded_model, family_of, load_family
    from difftuning_control.objective.batch import LatentBatch
    from difftuning_control.objective.difftuning import DiffTuningObjective, per_sample_loss
    from difftuning_control.objective.masking import mask_weights
    from difftuning_control.objective.noise import NoiseProcess
    from difftuning_control.objective.rows import extend_rows
    from difftuning_control.objective.schedules import ConstantSchedule, PaperSchedule, PowerSchedule, TabulatedSchedule
    from difftuning_control.pipelines.attached import attach, detach
    from difftuning_control.pipelines.controlled import add_control
    from difftuning_control.pipelines.files import pipeline_path
    from difftuning_control.pipelines.guider import DomainGuidance
    from difftuning_control.recipe.adapter import AdapterConfig
    from difftuning_control.recipe.gates import GatesConfig
    from difftuning_control.recipe.inputs import BankConfig, ControlConfig, DataConfig, FidelityConfig, ModelConfig
    from difftuning_control.recipe.recipe import Recipe
    from difftuning_control.recipe.studies import AnalysisConfig, Evaluation, PilotConfig
    from difftuning_control.recipe.training import ScheduleConfig, TrainingConfig, TuningConfig
    from difftuning_control.runs.record import RunRecord, read_run
    from difftuning_control.training.result import TrainingResult
    from difftuning_control.verbs.train import train

__all__ = [
    "AdapterConfig",
    "AnalysisConfig",
    "BankConfig",
    "BankRequest",
    "Conditioner",
    "ConstantSchedule",
    "ControlConfig",
    "ControlSpec",
    "DataConfig",
    "DiffTuningObjective",
    "DomainGuidance",
    "Evaluation",
    "FidelityConfig",
    "GatesConfig",
    "KnowledgeBank",
    "LatentBatch",
    "ModelConfig",
    "NoiseProcess",
    "NonFiniteLossError",
    "PaperSchedule",
    "PilotConfig",
    "PowerSchedule",
    "Recipe",
    "RunRecord",
    "ScheduleConfig",
    "TabulatedSchedule",
    "TrainingConfig",
    "TrainingResult",
    "TuningConfig",
    "UserError",
    "add_control",
    "attach",
    "detach",
    "embedded_model",
    "extend_rows",
    "family_of",
    "load_adapter",
    "load_family",
    "load_source",
    "mask_weights",
    "per_sample_loss",
    "pipeline_path",
    "read_run",
    "save_difference",
    "train",
    "unload_adapter",
    *CLASSES,
]

_HOME = {
    "BankRequest": "data.bank",
    "KnowledgeBank": "data.bank",
    "LatentBatch": "objective.batch",
    "Conditioner": "data.control_spec",
    "ControlSpec": "data.control_spec",
    "NonFiniteLossError": "errors",
    "UserError": "errors",
    "embedded_model": "families",
    "family_of": "families",
    "load_adapter": "adapters.loading",
    "load_family": "families",
    "NoiseProcess": "objective.noise",
    "DiffTuningObjective": "objective",
    "extend_rows": "objective",
    "mask_weights": "objective",
    "per_sample_loss": "objective",
    **dict.fromkeys(CLASSES, "pipelines"),
    "add_control": "pipelines",
    "AdapterConfig": "recipe",
    "BankConfig": "recipe",
    "ControlConfig": "recipe",
    "DataConfig": "recipe",
    "FidelityConfig": "recipe",
    "GatesConfig": "recipe",
    "ModelConfig": "recipe",
    "ScheduleConfig": "recipe",
    "TrainingConfig": "recipe",
    "TuningConfig": "recipe",
    "AnalysisConfig": "recipe.studies",
    "Evaluation": "recipe.studies",
    "PilotConfig": "recipe.studies",
    "pipeline_path": "pipelines.files",
    "DomainGuidance": "pipelines",
    "attach": "pipelines",
    "detach": "pipelines",
    "Recipe": "recipe",
    "ConstantSchedule": "objective.schedules",
    "PaperSchedule": "objective.schedules",
    "PowerSchedule": "objective.schedules",
    "TabulatedSchedule": "objective.schedules",
    "RunRecord": "runs.record",
    "read_run": "runs.record",
    "TrainingResult": "training.result",
    "load_source": "adapters.source",
    "save_difference": "adapters.source",
    "train": "verbs.train",
    "unload_adapter": "adapters.attached",
}
__version__ = VERSION
register()
# bitsandbytes, which peft imports, warns on some processors that it could not fetch a kernel; nobody asked it to
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))


def __getattr__(name: str) -> Any:
    """Public names, imported on first use so that importing the package stays cheap."""
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
