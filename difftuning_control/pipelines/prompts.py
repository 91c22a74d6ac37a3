"""Prompts under Domain Guidance: where a text encoder is tuned, its branch has the pretrained model's embeddings."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from difftuning_control.pipelines.guidance import TunedWeights, adapters_at

How = Literal["alternate", "second run"]


@contextmanager
def encoders_at(encoders: Sequence[TunedWeights], strength: float) -> Iterator[None]:
    """While open, the adapters of these text encoders act with a share of their strength."""
    with ExitStack() as stack:
        for weights in encoders:
            stack.enter_context(adapters_at(weights.layers, weights.adapters, strength))
        yield


@contextmanager
def encoding_negative_prompts(
    pipe: Any, encoders: Sequence[TunedWeights], how: How | None, strength: float
) -> Iterator[None]:
    """While open, the pipeline's `encode_prompt` gives negative embeddings with these encoders at a strength.

    Args:
        how: whether it gives them after each positive one (Stable Diffusion), or in the call's second run (FLUX).
    """
    stock, had = pipe.encode_prompt, vars(pipe).get("encode_prompt")
    runs = 0

    @functools.wraps(stock)
    def encode(*args: Any, **kwargs: Any) -> Any:
        nonlocal runs
        runs += 1
        if how == "second run":
            with encoders_at(encoders, strength if runs == 2 else 1):
                return stock(*args, **kwargs)
        tuned = stock(*args, **kwargs)
        with encoders_at(encoders, strength):
            others = stock(*args, **kwargs)
        return tuple(p if i % 2 else t for i, (t, p) in enumerate(zip(tuned, others)))  # positive, negative, …

    vars(pipe)["encode_prompt"] = encode
    try:
        yield
    finally:
        del vars(pipe)["encode_prompt"]
        if had is not None:
            vars(pipe)["encode_prompt"] = had
