"""FLUX.2 dev: a drop-in for the stock text-to-image pipeline."""

from __future__ import annotations

from diffusers import Flux2Pipeline

from difftuning_control.pipelines.extras import TunedSampling


class DiffTuningFlux2Pipeline(TunedSampling, Flux2Pipeline, stock=Flux2Pipeline):
    """`Flux2Pipeline` that knows the pretrained model behind a tuned one.

    `domain_guidance`, `unconditional_strength`, `tuned_adapters`, `adapter_schedule` and `hand_over` are the settings
    of `set_extras`. Domain Guidance is refused: dev is told its guidance and predicts once a step.

    Args:
        source_transformer: the pretrained transformer, where its weights were tuned; not needed for an adapter.
    """
