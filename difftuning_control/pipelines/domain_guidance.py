"""Domain Guidance for what draws through a family: its pipeline is exchanged for our drop-in one for the while.

The pictures are therefore those of the drop-in pipeline, see `guidance`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from difftuning_control import pipelines
from difftuning_control.errors import UserError
from difftuning_control.pipelines.registry import BY_STOCK

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


def check_domain_family(family: Family, option: str) -> Any:
    """The drop-in pipeline that draws with Domain Guidance in the place of the family's own.

    Raises:
        UserError: for a family without one here, naming the option that asks for it.
    """
    row = BY_STOCK.get(type(family.pipe).__name__)
    drop_in: Any = None if row is None else getattr(pipelines, row.name)
    # a family whose guidance is another argument, or that makes its own of classes, is not sampled like the drop-in
    if drop_in is None or drop_in.guidance_argument != "guidance_scale" or family.class_conditional:
        raise UserError(
            "Domain Guidance is here for pipelines with ordinary guidance (SD, SDXL, SD3), not for a "
            f"{type(family.pipe).__name__}; leave out {option}."
        )
    return drop_in


@contextmanager
def domain_guided(base: Family, tuned: Family) -> Iterator[None]:
    """While open, `tuned` samples with the unconditional branch of guidance from the pretrained denoiser.

    Args:
        base: the pretrained model; the same object as `tuned` where that is the base with an adapter on.

    Raises:
        UserError: for a family without a drop-in pipeline here, or a tuned text encoder under `offload`.
    """
    before, drop_in = tuned.pipe, check_domain_family(tuned, "--domain_guidance_scale")
    if tuned.offload and getattr(before.text_encoder, "_hf_peft_config_loaded", False):
        raise UserError("Domain Guidance of a tuned text encoder does not work with model.offload; tune without it.")
    source = base.denoiser if tuned is not base else None
    tuned.pipe = drop_in.from_pipe(before, domain_guidance=True, **{f"source_{tuned.component}": source})
    try:
        yield
    finally:
        tuned.pipe = before
