"""DiT: a drop-in for the stock class-conditional pipeline, which diffusers has no ControlNets and no callbacks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Union

from diffusers import DiTPipeline, DiTTransformer2DModel

from difftuning_control.families.tunable import TunableDiT
from difftuning_control.pipelines.extras import SETTINGS, TunedSampling, annotate, constructor, like


def dit_constructor() -> Callable[..., None]:
    """As `constructor` makes it, with a DiT that takes adapters accepted and saved as what it is, and names kept."""
    started = constructor(DiTPipeline, "transformer", SETTINGS)

    @like(started)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 it becomes one
        started(self, *args, **kwargs)
        given = inspect.signature(started).bind(self, *args, **kwargs).arguments
        self.register_to_config(id2label=given.get("id2label"))
        for name in ("transformer", "source_transformer"):
            if getattr(self, name) is not None:
                self.register_to_config(**{name: ("diffusers", DiTTransformer2DModel.__name__)})

    either = Union[DiTTransformer2DModel, TunableDiT]  # noqa: UP007 as `annotate` says; `from_pipe` compares the very class
    annotate(__init__, transformer=either, source_transformer=Union[either, None])  # noqa: UP007
    return __init__


class DiffTuningDiTPipeline(TunedSampling, DiTPipeline, stock=DiTPipeline):
    """`DiTPipeline` that knows the pretrained model behind a tuned one, and whose class names are saved with it.

    Classes that an adapter brought are the null class to the pretrained model: after a hand-over it goes on with that,
    and an adapter schedule moves their embeddings from the null class's to their own.

    `domain_guidance`, `unconditional_strength`, `tuned_adapters`, `adapter_schedule` and `hand_over` are the settings
    of `set_extras`.

    Args:
        id2label: names of the classes, by number.
        source_transformer: the pretrained transformer, where its weights were tuned; not needed for an adapter.
    """

    __init__ = dit_constructor()

    @classmethod
    @like(DiTPipeline.from_pipe.__func__)
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As in `TunedSampling`; class names come along, which the stock pipeline has as numbers by name."""
        names: dict[int, list[str]] = {}
        for name, number in pipeline.labels.items():
            names.setdefault(number, []).append(name)
        kwargs.setdefault("id2label", {number: ", ".join(several) for number, several in sorted(names.items())} or None)
        return super().from_pipe(pipeline, **kwargs)
