"""Drop-ins for diffusers' pipelines, which know the pretrained model behind a tuned one and how conditions are made."""

from difftuning_control.pipelines.controlled import add_control
from difftuning_control.pipelines.sd import DiffTuningControlNetPipeline, DiffTuningPipeline
from difftuning_control.pipelines.sdxl import DiffTuningXLControlNetPipeline, DiffTuningXLPipeline

__all__ = [
    "DiffTuningControlNetPipeline",
    "DiffTuningPipeline",
    "DiffTuningXLControlNetPipeline",
    "DiffTuningXLPipeline",
    "add_control",
]
