"""Prompts under Domain Guidance: where a text encoder is tuned, its branch has the pretrained model's embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

    def _encode(self, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The stock `encode_prompt`; under Domain Guidance the negative embeddings are the pretrained encoders'."""
        tuned = stock(self, *args, **kwargs)
        if not self._text_tuned:
            return tuned
        with pretrained(self._text_tuned):
            others = stock(self, *args, **kwargs)
        return tuple(p if i % 2 else t for i, (t, p) in enumerate(zip(tuned, others)))  # positive, negative, …
