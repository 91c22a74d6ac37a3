"""FLUX.2 klein: a drop-in for the stock text-to-image pipeline."""

from __future__ import annotations

from diffusers import Flux2KleinPipeline

from difftuning_control.pipelines.extras import TunedSampling


class DiffTuningFlux2KleinPipeline(TunedSampling, Flux2KleinPipeline, stock=Flux2KleinPipeline):
    """`Flux2KleinPipeline` that knows the pretrained model behind a tuned one.

    `domain_guidance`, `unconditional_strength`, `tuned_adapters`, `adapter_schedule` and `hand_over` are the settings
    of `set_extras`. The distilled klein has no unconditional rows.

    Args:
        source_transformer: the pretrained transformer, where its weights were tuned; not needed for an adapter.
    """
