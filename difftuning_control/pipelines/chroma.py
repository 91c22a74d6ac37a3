"""Chroma: a drop-in for the stock text-to-image pipeline."""

from __future__ import annotations

from diffusers import ChromaPipeline

from difftuning_control.pipelines.extras import TunedSampling


class DiffTuningChromaPipeline(TunedSampling, ChromaPipeline, stock=ChromaPipeline):
    """`ChromaPipeline` that knows the pretrained model behind a tuned one.

    `domain_guidance`, `unconditional_strength`, `tuned_adapters`, `adapter_schedule` and `hand_over` are the settings
    of `set_extras`.

    Args:
        source_transformer: the pretrained transformer, where its weights were tuned; not needed for an adapter.
    """
