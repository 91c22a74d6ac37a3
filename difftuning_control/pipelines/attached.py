"""Settings on a stock pipeline object, of any known class: text to image, image to image, inpainting, ControlNets.

The object's class becomes a subclass of its own, of the same name, whose `__call__` runs the stock one under hooks
(`sampling`). The object itself holds nothing of it, and `detach` gives it its class back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from difftuning_control.errors import UserError
from difftuning_control.pipelines.checks import check_place, check_source
from difftuning_control.pipelines.extras import TunedSampling, like
from difftuning_control.pipelines.guiding import guiding_of
from difftuning_control.pipelines.sampling import Sampling, nets_of
from difftuning_control.pipelines.settings import UNCHANGED, Attachment, Extras, attachment_of


def attach(
    pipe: Any,
    *,
    domain_guidance: bool | None = UNCHANGED,
    unconditional_strength: float | None = UNCHANGED,
    tuned_adapters: str | list[str] | None = UNCHANGED,
    adapter_schedule: Any = UNCHANGED,
    hand_over: float | None = UNCHANGED,
    control_schedule: Any = UNCHANGED,
    source: Any = UNCHANGED,
) -> Any:
    """Let a stock pipeline of diffusers sample with settings, as the drop-in pipelines do (see their `set_extras`).

    Nothing is saved with the pipeline. On a pipeline that is attached already the settings that are given change.
    After a call with a `control_schedule`, `pipe.control_use` says how often each ControlNet ran and was skipped.

    Args:
        pipe: a pipeline of a class in `guiding.GUIDINGS`.
        domain_guidance, unconditional_strength, tuned_adapters, adapter_schedule, hand_over: as `set_extras` takes
            them.
        control_schedule: strength over u of the pipeline's ControlNets, or a list with one for each.
        source: the pretrained denoiser, where the denoiser's own weights were tuned; not needed for an adapter. It
            goes where `pipe.to(…)` moves the pipeline, but is offloaded with it nowhere.

    Returns:
        The same object.

    Raises:
        UserError: for a class whose guidance is not known, a drop-in, or a value of another kind or out of its range.
    """
    if isinstance(pipe, TunedSampling):
        raise UserError(f"a {type(pipe).__name__} has settings of its own; give them to its set_extras(…).")
    guiding = guiding_of(pipe)
    before = attachment_of(pipe)
    extras = (before.extras if before is not None else Extras()).changed(
        len(nets_of(pipe)),
        domain_guidance=domain_guidance,
        unconditional_strength=unconditional_strength,
        tuned_adapters=tuned_adapters,
        adapter_schedule=adapter_schedule,
        hand_over=hand_over,
        control_schedule=control_schedule,
    )
    if source is UNCHANGED:
        source = before.source if before is not None else None
    if source is not None:
        check_source(getattr(pipe, guiding.component), source, guiding.component)
    detach(pipe)
    pipe.__class__ = _attached_class(type(pipe), Attachment(extras, source))
    return pipe


def detach(pipe: Any) -> Any:
    """Take the settings off a pipeline: it is as it was before `attach`. Without any it stays as it is.

    Returns:
        The same object.
    """
    if attachment_of(pipe) is not None:
        pipe.__class__ = type(pipe).__base__
    return pipe


def attached(stock: Any, attachment: Attachment) -> Any:
    """A pipeline without its state: what `pickle` and `copy` begin with."""
    return stock.__new__(_attached_class(stock, attachment))


def _attached_class(stock: Any, attachment: Attachment) -> Any:
    """A subclass that is called like the stock class, by which diffusers and users know it."""
    run: Callable[..., Any] = stock.__call__
    source = attachment.source

    @like(run)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807 it becomes one
        sampling = Sampling(self, attachment.extras, source, set_by="attach(pipe, ")
        is_spread = getattr(self, "hf_device_map", None) is not None  # over devices, each module on its own
        if source is not None and attachment.extras.acts_on_weights and not is_spread:
            check_place(source, self._execution_device, sampling.component)
        try:
            return sampling.run(run, args, kwargs)
        finally:
            attachment.control_use = sampling.control_use

    @like(stock.to)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if source is None:
            return stock.to(self, *args, **kwargs)
        denoiser = getattr(self, guiding_of(self).component)
        before = denoiser.device, denoiser.dtype
        stock.to(self, *args, **kwargs)
        if (denoiser.device, denoiser.dtype) != before and not getattr(source, "is_quantized", False):
            source.to(device=denoiser.device, dtype=denoiser.dtype)
        return self

    def __reduce__(self: Any) -> Any:  # noqa: N807 `pickle` would look for the stock class and find another
        return attached, (stock, attachment), vars(self)

    return type(
        stock.__name__,
        (stock,),
        {
            **{name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")},
            "__call__": __call__,
            "__reduce__": __reduce__,
            "to": to,
            "attachment": attachment,
            "control_use": property(lambda self: attachment.control_use),
        },
    )
