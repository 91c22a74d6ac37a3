"""The table of drop-in pipelines: for each stock class, the one-line file and the class that take its place."""

from __future__ import annotations

PIPELINES = {
    "StableDiffusionPipeline": ("difftuning_sd", "DiffTuningPipeline"),
    "StableDiffusionControlNetPipeline": ("difftuning_sd_controlnet", "DiffTuningControlNetPipeline"),
    "StableDiffusionXLPipeline": ("difftuning_sdxl", "DiffTuningXLPipeline"),
    "StableDiffusionXLControlNetPipeline": ("difftuning_sdxl_controlnet", "DiffTuningXLControlNetPipeline"),
    "StableDiffusion3Pipeline": ("difftuning_sd3", "DiffTuningSD3Pipeline"),
    "StableDiffusion3ControlNetPipeline": ("difftuning_sd3_controlnet", "DiffTuningSD3ControlNetPipeline"),
    "FluxPipeline": ("difftuning_flux", "DiffTuningFluxPipeline"),
    "FluxControlNetPipeline": ("difftuning_flux_controlnet", "DiffTuningFluxControlNetPipeline"),
    "DiTPipeline": ("difftuning_dit", "DiffTuningDiTPipeline"),
}
"""For each stock class, the one-line file and the class of ours that take its place."""
