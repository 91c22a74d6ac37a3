"""Prompts under Domain Guidance: where a text encoder is tuned, its branch has the pretrained model's embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from difftuning_control.pipelines.guidance import TunedWeights, adapters_at


@contextmanager
def pretrained(encoders: Sequence[TunedWeights]) -> Iterator[None]:
    """While open, the adapters of these text encoders are off."""
    with ExitStack() as stack:
        for weights in encoders:
            stack.enter_context(adapters_at(weights.layers, weights.adapters, 0))
        yield


class NegativePrompts:
    """Mixed into pipelines whose `encode_prompt` gives embeddings by turns of the prompt and of the negative one."""

    _text_tuned: list[TunedWeights]

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As in the stock class; under Domain Guidance the negative embeddings come from the pretrained encoders."""
        parent: Any = super()
        tuned = parent.encode_prompt(*args, **kwargs)
        if not self._text_tuned:
            return tuned
        with pretrained(self._text_tuned):
            others = parent.encode_prompt(*args, **kwargs)
        return tuple(p if i % 2 else t for i, (t, p) in enumerate(zip(tuned, others)))  # positive, negative, …
