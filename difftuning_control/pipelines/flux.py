"""FLUX.1: drop-ins for the stock text-to-image and ControlNet pipelines.

FLUX has no unconditional rows: dev is told its guidance. Under Domain Guidance w is the call's `true_cfg_scale`, and

    with a negative prompt       ε̂ = ε_pretrained(x, negative) + w (ε_tuned(x, c) − ε_pretrained(x, negative))
    without                      ε̂ = ε_pretrained(x, c) + w (ε_tuned(x, c) − ε_pretrained(x, c))

each with the embedded guidance of the call, at two forwards a step. The first is the stock class's own, whose second
forward the pretrained weights answer. At w = 1, the stock default, both are the tuned prediction and one forward.
"""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxPipeline

from difftuning_control.pipelines.control import ControlledSampling
from difftuning_control.pipelines.extras import TunedSampling


class DiffTuningFluxPipeline(TunedSampling, FluxPipeline, stock=FluxPipeline):
    """`FluxPipeline` that knows the pretrained model behind a tuned one.

    `domain_guidance`, `unconditional_strength`, `tuned_adapters`, `adapter_schedule` and `hand_over` are the settings
    of `set_extras`. The scale of Domain Guidance is the call's `true_cfg_scale`.

    Args:
        source_transformer: the pretrained transformer, where its weights were tuned; not needed for an adapter.
    """


class DiffTuningFluxControlNetPipeline(ControlledSampling, FluxControlNetPipeline, stock=FluxControlNetPipeline):
    """`FluxControlNetPipeline` that knows the pretrained model and how its conditions are made.

    `domain_guidance`, `unconditional_strength`, `tuned_adapters`, `adapter_schedule`, `hand_over` and
    `control_schedule` are the settings of `set_extras`. The scale of Domain Guidance is the call's `true_cfg_scale`.

    Args:
        source_transformer: the pretrained transformer, where its weights were tuned; not needed for an adapter.
    """

    controlnet_class: ClassVar[Any] = FluxControlNetModel
    control_keys: ClassVar[tuple[str, ...]] = (
        "in_channels",
        "num_attention_heads",
        "attention_head_dim",
        "joint_attention_dim",
        "pooled_projection_dim",
    )
