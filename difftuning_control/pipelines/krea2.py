"""Krea 2: a drop-in for the stock text-to-image pipeline."""

from __future__ import annotations

from diffusers import Krea2Pipeline

from difftuning_control.pipelines.extras import TunedSampling


class DiffTuningKrea2Pipeline(TunedSampling, Krea2Pipeline, stock=Krea2Pipeline):
    """`Krea2Pipeline` that knows the pretrained model behind a tuned one.

    `domain_guidance`, `unconditional_strength`, `tuned_adapters`, `adapter_schedule` and `hand_over` are the settings
    of `set_extras`. At the call's `guidance_scale` s the scale of Domain Guidance is s + 1.

    Args:
        source_transformer: the pretrained transformer, where its weights were tuned; not needed for an adapter.
    """
