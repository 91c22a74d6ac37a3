"""What the drop-in pipelines have in common: a constructor and a call with settings, which are saved and loaded.

The settings act by `sampling`, as they do on an attached stock pipeline; without one the stock class runs as it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Union, get_type_hints

from diffusers import DiffusionPipeline

from difftuning_control.adapters.snapshot import load_adapters, save_adapters, taken_off, tuned_modules
from difftuning_control.errors import UserError
from difftuning_control.families.hub import in_precision
from difftuning_control.pipelines.checks import check_source
from difftuning_control.pipelines.guiding import guiding_of
from difftuning_control.pipelines.sampling import Sampling, bound
from difftuning_control.pipelines.saved import ADAPTERS, check_adapters, saved_folder, unsaved_settings
from difftuning_control.pipelines.settings import UNCHANGED, Extras, attachment_of, extras_of
from difftuning_control.pipelines.strength import Strength

AS_IT_IS: Any = object()  # the dtype that `from_pipe` casts shared modules to: none
SETTINGS: dict[str, Any] = {
    "domain_guidance": bool | None,
    "unconditional_strength": float | None,
    "tuned_adapters": list | None,
    "adapter_schedule": dict | str | Strength | Callable | None,
    "hand_over": float | None,
}
CONTROL_SETTINGS: dict[str, Any] = {"control_schedule": dict | list | str | Strength | Callable | None}
"""Parameters of constructors, whose annotations diffusers reads; None leaves a setting as it is without it."""


def like(stock: Callable[..., Any], **parameters: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a method the name, documentation and signature of a stock one, with further keyword parameters."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        wrapped: Any = functools.wraps(stock)(method)
        signature = inspect.signature(stock)
        added = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d) for n, d in parameters.items()]
        kept = list(signature.parameters.values())
        last = [kept.pop()] if kept[-1].kind is inspect.Parameter.VAR_KEYWORD else []
        del wrapped.__wrapped__  # would be the stock call, which knows of no extras
        wrapped.__signature__ = signature.replace(parameters=[*kept, *added, *last])
        return wrapped

    return decorate


def constructor(stock: Any, component: str, settings: dict[str, Any]) -> Callable[..., None]:
    """The constructor of a drop-in: the stock class's, with the pretrained denoiser and the settings as further
    keywords, all of them None where they are not given."""
    source, hints = f"source_{component}", get_type_hints(stock.__init__)
    added = {source: hints[component] | None, **settings, "saved_adapters": list | None}

    @like(stock.__init__, **dict.fromkeys(added))
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 it becomes one
        own = {name: kwargs.pop(name, None) for name in added}
        stock.__init__(self, *args, **kwargs)
        self._start_extras(own.pop(source), **own)

    __init__.__annotations__ = {**hints, **added}
    annotate(__init__, **{source: Union[hints[component], None]})  # noqa: UP007 as `annotate` says
    return __init__


def annotate(constructor: Any, **hints: Any) -> None:
    """Give parameters of a constructor their types, in its signature too, by which diffusers before 0.36 decides in
    `from_pipe` what a new pipeline takes over; it reads classes, and of unions those of `typing` alone."""
    constructor.__annotations__ |= hints
    signature = inspect.signature(constructor)
    given = [p.replace(annotation=hints.get(n, p.annotation)) for n, p in signature.parameters.items()]
    constructor.__signature__ = signature.replace(parameters=given)


@contextmanager
def _spread(pipe: Any) -> Iterator[None]:
    """While open, a pipeline whose parts were spread over devices says so: from_pretrained sets that after the
    constructor, and before it diffusers takes the parts' hooks for offloading, and undoes them to load a LoRA."""
    if not any(hasattr(part, "hf_device_map") for part in pipe.components.values()):
        yield
        return
    pipe.hf_device_map = {}
    try:
        yield
    finally:
        del pipe.hf_device_map


class TunedSampling:
    """Mixed into a stock pipeline class, before it, which a subclass names as `stock`.

    Attributes:
        component: the denoiser's name in the pipeline; with `source_` before it, the pretrained one's.
        settings: those that it takes and keeps in its configuration.
    """

    extras: Extras
    component: ClassVar[str] = "transformer"
    settings: ClassVar[dict[str, Any]] = SETTINGS

    def __init_subclass__(cls, stock: Any = None, **others: Any) -> None:
        """Give a drop-in its constructor and its call, unless it has its own."""
        super().__init_subclass__(**others)
        if stock is None:
            return
        made: Any = cls
        made._optional_components = [*stock._optional_components, f"source_{cls.component}"]
        if "__init__" not in vars(cls):
            made.__init__ = constructor(stock, cls.component, cls.settings)
        made.__call__ = cls._call_of(stock)

    @classmethod
    def _call_of(cls, stock: Any) -> Callable[..., Any]:
        @like(stock.__call__)
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807 it becomes one
            return self._sample(stock.__call__, args, kwargs)

        return __call__

    def _start_extras(self, source: Any, *, saved_adapters: list[str] | None = None, **settings: Any) -> None:
        pipe: Any = self
        if source is not None:
            check_source(self.denoiser, source, self.component)
        pipe.register_modules(**{self.source_name: source})
        self.extras = Extras()
        self.set_extras(**settings)
        pipe.register_to_config(saved_adapters=None)  # in the configuration of a saved pipeline only
        if saved_adapters:
            with _spread(pipe):
                load_adapters(self, saved_folder(pipe, saved_adapters))

    @property
    def denoiser(self) -> Any:
        """The tuned one."""
        return getattr(self, self.component)

    @property
    def source_name(self) -> str:
        return f"source_{self.component}"

    @property
    def source(self) -> Any:
        """The pretrained denoiser beside it, or None."""
        return getattr(self, self.source_name)

    # --- settings ---------------------------------------------------------------------------------------------------

    def set_extras(
        self,
        *,
        domain_guidance: bool | None = UNCHANGED,
        unconditional_strength: float | None = UNCHANGED,
        tuned_adapters: str | list[str] | None = UNCHANGED,
        adapter_schedule: Any = UNCHANGED,
        hand_over: float | None = UNCHANGED,
    ) -> None:
        """Change what is given and leave the rest; saved with the pipeline.

        Args:
            domain_guidance: take the unconditional branch from the pretrained model, ε_pretrained(x, ∅) +
                w (ε_tuned(x, c) − ε_pretrained(x, ∅)), w the `guidance_scale` of the call. At w = 1 that is the tuned
                prediction, and one forward.
            unconditional_strength: k in [0, 1]; the branch comes from the tuned adapter at k times its strength
                instead. 0 (and None) is the pretrained model, 1 ordinary guidance. Given alone it turns
                `domain_guidance` on.
            tuned_adapters: the adapters that were tuned, by name; needed where several act at once.
            adapter_schedule: their strength over u: a power, a table, a run's folder, or a function
                (`strength.as_strength`); None for full strength.
            hand_over: u₀; at u ≤ u₀ the pretrained model finishes the picture. None for never.

        Raises:
            UserError: for a value of another kind or out of its range.
        """
        self._change(
            domain_guidance=domain_guidance,
            unconditional_strength=unconditional_strength,
            tuned_adapters=tuned_adapters,
            adapter_schedule=adapter_schedule,
            hand_over=hand_over,
        )

    def _change(self, nets: int = 0, **given: Any) -> None:
        self.extras = self.extras.changed(nets, **given)
        pipe: Any = self
        pipe.register_to_config(**{k: v for k, v in self.extras.stored().items() if k in self.settings})

    def _sample(self, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The stock `__call__`, with the hooks that the settings ask for."""
        return Sampling(self, self.extras, self.source).run(stock, args, kwargs)

    # --- from and to disk and other pipelines -----------------------------------------------------------------------

    @property
    def components(self) -> dict[str, Any]:
        """As in the stock class; a source only where there is one, so that stock classes take them all."""
        components = super().components  # type: ignore[misc]
        return {k: v for k, v in components.items() if k != self.source_name or v is not None}

    @classmethod
    @like(DiffusionPipeline.from_pipe.__func__)
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As in the stock class, but shared modules keep their dtype and device unless `dtype` is given, and what was
        attached to the other pipeline comes along."""
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs = {**kwargs, **in_precision(AS_IT_IS)}
        if kwargs.get("domain_guidance") is False:  # what the other's configuration has is for its own
            kwargs.setdefault("unconditional_strength", None)
        elif kwargs.get("unconditional_strength") is not None:
            kwargs.setdefault("domain_guidance", True)
        extras, attachment = extras_of(pipeline), attachment_of(pipeline)
        if extras != Extras():  # a function, and what was attached, are in no configuration
            held = {name: value for name, value in vars(extras).items() if name in SETTINGS}
            kwargs = {**held, "unconditional_strength": extras.unconditional_strength or None, **kwargs}
        if attachment is not None and guiding_of(pipeline).component == cls.component:
            kwargs.setdefault(f"source_{cls.component}", attachment.source)
        parent: Any = super()
        return parent.from_pipe(pipeline, **kwargs)

    @like(DiffusionPipeline.to)
    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As in the stock class."""
        parent: Any = super()
        return self if kwargs.get("dtype") is AS_IT_IS else parent.to(*args, **kwargs)

    @like(DiffusionPipeline.save_pretrained)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in the stock class, with every setting that has something to act on, and every adapter of the denoiser
        and the text encoders: `from_pretrained` loads them again, as they acted.

        Raises:
            UserError: if a schedule is a function, which no file can hold, or an adapter is of a kind or in a module
                that a saved pipeline does not hold; nothing is written then.
        """
        pipe: Any = self
        if any(strength.values is None for strength in self.extras.strengths):
            raise UserError("a schedule is a function, which cannot be saved; give a power or a table before saving.")
        names = check_adapters(pipe)
        place = Path(bound(DiffusionPipeline.save_pretrained, self, *args, **kwargs).arguments["save_directory"])
        settings = unsaved_settings(self, names)
        kept = {name: pipe.config[name] for name in (*settings, "saved_adapters")}
        save_adapters(pipe, names, place / ADAPTERS)
        parent: Any = super()
        try:
            pipe.register_to_config(saved_adapters=names or None, **settings)
            with taken_off(list(tuned_modules(pipe).values())):
                parent.save_pretrained(*args, **kwargs)
        finally:
            pipe.register_to_config(**kept)
