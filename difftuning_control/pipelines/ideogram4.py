"""Ideogram 4: a drop-in for the stock text-to-image pipeline."""

from __future__ import annotations

from diffusers import Ideogram4Pipeline

from difftuning_control.pipelines.extras import TunedSampling


class DiffTuningIdeogram4Pipeline(TunedSampling, Ideogram4Pipeline, stock=Ideogram4Pipeline):
    """`Ideogram4Pipeline` that knows the pretrained model behind a tuned one.

    `domain_guidance`, `unconditional_strength`, `tuned_adapters`, `adapter_schedule` and `hand_over` are the settings
    of `set_extras`. Domain Guidance is there without a setting: the unconditional rows are those of
    `unconditional_transformer`.

    Args:
        source_transformer: the pretrained transformer, where its weights were tuned; not needed for an adapter.
    """
