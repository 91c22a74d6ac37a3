"""Domain Guidance for what draws through a family: its pipeline has the setting for the while.

The pictures are therefore those of an attached pipeline or a drop-in one, see `guidance`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from difftuning_control.errors import UserError
from difftuning_control.pipelines.attached import attach, detach
from difftuning_control.pipelines.checks import check_share
from difftuning_control.pipelines.guiding import BY_CLASS

if TYPE_CHECKING:
    from difftuning_control.families.family import Family


def check_domain_method(run: str, method: str) -> None:
    """Refuse a run beside whose denoiser there is no other one.

    Raises:
        UserError: for a ControlNet.
    """
    if method == "controlnet":
        raise UserError(
            f"the run {run} is a ControlNet, whose denoiser is the pretrained one; leave out --domain_guidance_scale."
        )


def check_domain_family(family: Family, option: str) -> None:
    """Refuse a family that is sampled without a second prediction, naming the option that asks for one.

    Raises:
        UserError: for a model that is told its guidance (FLUX dev), is distilled, or makes its own of classes.
    """
    guiding = BY_CLASS.get(type(family.pipe).__name__)
    is_told = guiding is None or guiding.rows == "none" or guiding.alone or family.pipe.config.get("is_distilled")
    if is_told or family.class_conditional:
        raise UserError(
            "Domain Guidance is here for models that are sampled with a second, unconditional prediction, not for a "
            f"{type(family.pipe).__name__}; leave out {option}."
        )


def check_mixed_family(family: Family, option: str) -> None:
    """Refuse a family on whose unconditional prediction no adapter acts, naming the option that asks for a share.

    Raises:
        UserError: for Ideogram 4, which has a transformer of its own for it.
    """
    name = type(family.pipe).__name__
    check_share(name, BY_CLASS[name], option)


@contextmanager
def domain_guided(base: Family, tuned: Family, unconditional_strength: float = 0.0) -> Iterator[None]:
    """While open, `tuned` samples with the unconditional branch of guidance from the pretrained denoiser.

    Args:
        base: the pretrained model; the same object as `tuned` where that is the base with an adapter on.
        unconditional_strength: in [0, 1]; of the adapter in that branch, 1 for ordinary guidance.

    Raises:
        UserError: for a family that is sampled without a second prediction, or a tuned text encoder under `offload`.
    """
    with sampling_with(
        base, tuned, "--domain_guidance_scale", domain_guidance=True, unconditional_strength=unconditional_strength
    ):
        yield


@contextmanager
def sampling_with(base: Family, tuned: Family, option: str, pipe: Any = None, **settings: Any) -> Iterator[None]:
    """While open, `tuned` samples with settings of `attach`.

    Args:
        base: as in `domain_guided`.
        option: how sentences name what asked for Domain Guidance.
        pipe: the pipeline that gets the settings, such as one from image to image; that of `tuned` when None.

    Raises:
        UserError: as `domain_guided`, where the settings have Domain Guidance.
    """
    if settings.get("domain_guidance"):
        _check_guided(tuned, option)
    pipe = tuned.pipe if pipe is None else pipe
    attach(pipe, **settings, source=base.denoiser if tuned is not base else None)
    try:
        yield
    finally:
        detach(pipe)


@contextmanager
def control_sampling_with(family: Family, schedule: Any) -> Iterator[None]:
    """While open, the family's ControlNet acts with a strength over u, as `attach` takes it, in what it samples."""
    family.prepare_control = lambda pipe: attach(pipe, control_schedule=schedule)
    try:
        yield
    finally:
        family.prepare_control = lambda pipe: pipe


def _check_guided(tuned: Family, option: str) -> None:
    check_domain_family(tuned, option)
    if tuned.offload and getattr(tuned.pipe.text_encoder, "_hf_peft_config_loaded", False):
        raise UserError("Domain Guidance of a tuned text encoder does not work with model.offload; tune without it.")
