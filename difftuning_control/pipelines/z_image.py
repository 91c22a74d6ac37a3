"""Z-Image, base and Turbo: a drop-in for the stock text-to-image pipeline."""

from __future__ import annotations

from diffusers import ZImagePipeline

from difftuning_control.pipelines.extras import TunedSampling


class DiffTuningZImagePipeline(TunedSampling, ZImagePipeline, stock=ZImagePipeline):
    """`ZImagePipeline` that knows the pretrained model behind a tuned one.

    `domain_guidance`, `unconditional_strength`, `tuned_adapters`, `adapter_schedule` and `hand_over` are the settings
    of `set_extras`. At the call's `guidance_scale` s the scale of Domain Guidance is s + 1.

    Args:
        source_transformer: the pretrained transformer, where its weights were tuned; not needed for an adapter.
    """
