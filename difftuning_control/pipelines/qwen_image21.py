"""Qwen-Image 2.1: a drop-in for the stock pipeline."""

from __future__ import annotations

from diffusers import QwenImage21Pipeline

from difftuning_control.pipelines.extras import TunedSampling


class DiffTuningQwenImage21Pipeline(TunedSampling, QwenImage21Pipeline, stock=QwenImage21Pipeline):
    """`QwenImage21Pipeline` that knows the pretrained model behind a tuned one.

    `domain_guidance`, `unconditional_strength`, `tuned_adapters`, `adapter_schedule` and `hand_over` are the settings
    of `set_extras`. The scale of Domain Guidance is the call's `true_cfg_scale`; it needs a negative
    prompt. With `adapter_schedule` or `hand_over` the prompt is computed at every step (`use_kv_cache=False`).

    Args:
        source_transformer: the pretrained transformer, where its weights were tuned; not needed for an adapter.
    """
