"""Drop-ins for diffusers' pipelines, which know the pretrained model behind a tuned one and how conditions are made."""

from difftuning_control.pipelines.controlled import add_control
from difftuning_control.pipelines.dit import DiffTuningDiTPipeline
from difftuning_control.pipelines.flux import DiffTuningFluxControlNetPipeline, DiffTuningFluxPipeline
from difftuning_control.pipelines.sd import DiffTuningControlNetPipeline, DiffTuningPipeline
from difftuning_control.pipelines.sd3 import DiffTuningSD3ControlNetPipeline, DiffTuningSD3Pipeline
from difftuning_control.pipelines.sdxl import DiffTuningXLControlNetPipeline, DiffTuningXLPipeline

__all__ = [
    "DiffTuningControlNetPipeline",
    "DiffTuningDiTPipeline",
    "DiffTuningFluxControlNetPipeline",
    "DiffTuningFluxPipeline",
    "DiffTuningPipeline",
    "DiffTuningSD3ControlNetPipeline",
    "DiffTuningSD3Pipeline",
    "DiffTuningXLControlNetPipeline",
    "DiffTuningXLPipeline",
    "add_control",
]
