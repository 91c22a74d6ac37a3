"""The table of drop-in pipelines: for each stock class, the class that takes its place and where others find it.

A new drop-in is its class's file, one row here and its one-line file in /pipelines. Importing this needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DropIn:
    """One drop-in pipeline.

    Args:
        stock: the class of diffusers whose place it takes.
        name: of its class.
        module: that has the class, in this folder.
        file: the one-line file for `custom_pipeline=`, without its ending.
        auto: the stock class's name in the tables of diffusers' Auto classes; None where these do not know it.
        control: the stock class that a ControlNet makes of the stock one, or itself where it has ControlNets; None
            where there is no drop-in for that.
    """

    stock: str
    name: str
    module: str
    file: str
    auto: str | None = None
    control: str | None = None

    @property
    def auto_name(self) -> str:
        """Its own name in the tables of diffusers' Auto classes."""
        return self.file.replace("_", "-")


SD, SD_CONTROL = "StableDiffusionPipeline", "StableDiffusionControlNetPipeline"
XL, XL_CONTROL = "StableDiffusionXLPipeline", "StableDiffusionXLControlNetPipeline"
SD3, SD3_CONTROL = "StableDiffusion3Pipeline", "StableDiffusion3ControlNetPipeline"
FLUX, FLUX_CONTROL = "FluxPipeline", "FluxControlNetPipeline"

DROP_INS = (
    DropIn(SD, "DiffTuningPipeline", "sd", "difftuning_sd", "stable-diffusion", SD_CONTROL),
    DropIn(
        SD_CONTROL,
        "DiffTuningControlNetPipeline",
        "sd",
        "difftuning_sd_controlnet",
        "stable-diffusion-controlnet",
        SD_CONTROL,
    ),
    DropIn(XL, "DiffTuningXLPipeline", "sdxl", "difftuning_sdxl", "stable-diffusion-xl", XL_CONTROL),
    DropIn(
        XL_CONTROL,
        "DiffTuningXLControlNetPipeline",
        "sdxl",
        "difftuning_sdxl_controlnet",
        "stable-diffusion-xl-controlnet",
        XL_CONTROL,
    ),
    DropIn(SD3, "DiffTuningSD3Pipeline", "sd3", "difftuning_sd3", "stable-diffusion-3", SD3_CONTROL),
    DropIn(
        SD3_CONTROL,
        "DiffTuningSD3ControlNetPipeline",
        "sd3",
        "difftuning_sd3_controlnet",
        "stable-diffusion-3-controlnet",
        SD3_CONTROL,
    ),
    DropIn(FLUX, "DiffTuningFluxPipeline", "flux", "difftuning_flux", "flux", FLUX_CONTROL),
    DropIn(
        FLUX_CONTROL,
        "DiffTuningFluxControlNetPipeline",
        "flux",
        "difftuning_flux_controlnet",
        "flux-controlnet",
        FLUX_CONTROL,
    ),
    DropIn("ZImagePipeline", "DiffTuningZImagePipeline", "z_image", "difftuning_z_image", "z-image"),
    DropIn("QwenImagePipeline", "DiffTuningQwenImagePipeline", "qwen_image", "difftuning_qwen_image", "qwenimage"),
    DropIn(
        "QwenImage21Pipeline",
        "DiffTuningQwenImage21Pipeline",
        "qwen_image21",
        "difftuning_qwen_image21",
        "qwenimage21",
    ),
    DropIn(
        "Flux2KleinPipeline", "DiffTuningFlux2KleinPipeline", "flux2_klein", "difftuning_flux2_klein", "flux2-klein"
    ),
    DropIn("Flux2Pipeline", "DiffTuningFlux2Pipeline", "flux2", "difftuning_flux2", "flux2"),
    DropIn("Krea2Pipeline", "DiffTuningKrea2Pipeline", "krea2", "difftuning_krea2", "krea2"),
    DropIn("ChromaPipeline", "DiffTuningChromaPipeline", "chroma", "difftuning_chroma", "chroma"),
    DropIn("Ideogram4Pipeline", "DiffTuningIdeogram4Pipeline", "ideogram4", "difftuning_ideogram4", "ideogram4"),
    DropIn("Lumina2Pipeline", "DiffTuningLumina2Pipeline", "lumina2", "difftuning_lumina2", "lumina2"),
    DropIn("SanaPipeline", "DiffTuningSanaPipeline", "sana", "difftuning_sana", "sana"),
    DropIn("DiTPipeline", "DiffTuningDiTPipeline", "dit", "difftuning_dit"),
)
CLASSES = tuple(drop_in.name for drop_in in DROP_INS)
BY_STOCK = {drop_in.stock: drop_in for drop_in in DROP_INS}
BY_NAME = {drop_in.name: drop_in for drop_in in DROP_INS}
