"""DiT: a drop-in for the stock class-conditional pipeline, which diffusers has no ControlNets and no callbacks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from diffusers.schedulers import KarrasDiffusionSchedulers

from difftuning_control.families.tunable import TunableDiT
from difftuning_control.pipelines.extras import TunedSampling, like
from difftuning_control.pipelines.strength import Strength


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

    def __init__(
        self,
        transformer: DiTTransformer2DModel | TunableDiT,  # `from_pipe` compares the very class
        vae: AutoencoderKL,
        scheduler: KarrasDiffusionSchedulers,
        id2label: dict | None = None,
        source_transformer: DiTTransformer2DModel | TunableDiT | None = None,
        domain_guidance: bool | None = None,
        unconditional_strength: float | None = None,
        tuned_adapters: list | None = None,
        adapter_schedule: dict | str | Strength | Callable | None = None,
        hand_over: float | None = None,
        saved_adapters: list | None = None,
    ):
        DiTPipeline.__init__(self, transformer, vae, scheduler, id2label)
        self._start_extras(
            source_transformer,
            saved_adapters=saved_adapters,
            domain_guidance=domain_guidance,
            unconditional_strength=unconditional_strength,
            tuned_adapters=tuned_adapters,
            adapter_schedule=adapter_schedule,
            hand_over=hand_over,
        )
        pipe: Any = self
        pipe.register_to_config(id2label=id2label)
        for name in ("transformer", "source_transformer"):
            if getattr(pipe, name) is not None:  # perhaps a DiT that takes adapters, which is saved as what it is
                pipe.register_to_config(**{name: ("diffusers", DiTTransformer2DModel.__name__)})

    @classmethod
    @like(DiTPipeline.from_pipe.__func__)
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As in `TunedSampling`; class names come along."""
        pipe = super().from_pipe(pipeline, **kwargs)
        if "id2label" not in kwargs:
            pipe.labels = dict(pipeline.labels)
        return pipe
