"""Stable Diffusion 1.x and 2.x: drop-ins for the stock text-to-image and ControlNet pipelines."""

from __future__ import annotations

from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline

from difftuning_control.pipelines.unet import ControlledUNet, UNetSampling


class DiffTuningPipeline(UNetSampling, StableDiffusionPipeline, stock=StableDiffusionPipeline):
    """`StableDiffusionPipeline` that knows the pretrained model behind a tuned one.

    `domain_guidance`, `unconditional_strength`, `tuned_adapters`, `adapter_schedule` and `hand_over` are the settings
    of `set_extras`.

    Args:
        source_unet: the pretrained UNet, where its weights were tuned; not needed for an adapter.
    """


class DiffTuningControlNetPipeline(
    ControlledUNet, StableDiffusionControlNetPipeline, stock=StableDiffusionControlNetPipeline
):
    """`StableDiffusionControlNetPipeline` that knows the pretrained model and how its conditions are made.

    `domain_guidance`, `unconditional_strength`, `tuned_adapters`, `adapter_schedule`, `hand_over` and
    `control_schedule` are the settings of `set_extras`.

    Args:
        source_unet: the pretrained UNet, where its weights were tuned; not needed for an adapter.
    """
