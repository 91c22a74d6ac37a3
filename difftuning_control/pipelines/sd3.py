"""Stable Diffusion 3 and 3.5: drop-ins for the stock text-to-image and ControlNet pipelines."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline, StableDiffusion3Pipeline

from difftuning_control.pipelines.control import ControlledSampling
from difftuning_control.pipelines.extras import TunedSampling


class DiffTuningSD3Pipeline(TunedSampling, StableDiffusion3Pipeline, stock=StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` that knows the pretrained model behind a tuned one.

    `domain_guidance`, `unconditional_strength`, `tuned_adapters`, `adapter_schedule` and `hand_over` are the settings
    of `set_extras`.

    Args:
        source_transformer: the pretrained transformer, where its weights were tuned; not needed for an adapter.
    """


class DiffTuningSD3ControlNetPipeline(
    ControlledSampling, StableDiffusion3ControlNetPipeline, stock=StableDiffusion3ControlNetPipeline
):
    """`StableDiffusion3ControlNetPipeline` that knows the pretrained model and how its conditions are made.

    `domain_guidance`, `unconditional_strength`, `tuned_adapters`, `adapter_schedule`, `hand_over` and
    `control_schedule` are the settings of `set_extras`.

    Args:
        source_transformer: the pretrained transformer, where its weights were tuned; not needed for an adapter.
    """

    controlnet_class: ClassVar[Any] = SD3ControlNetModel
