"""Pictures drawn over a picture (image to image) with diffusers' own pipeline around a family's modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from difftuning_control.data.images import frame
from difftuning_control.errors import UserError
from difftuning_control.system.seeds import step_seed

if TYPE_CHECKING:
    from difftuning_control.families.family import Family


def image_pipeline(family: Family) -> Any:
    """diffusers' pipeline from image to image around the same modules.

    Raises:
        UserError: for a family that diffusers has none for.
    """
    from diffusers import AutoPipelineForImage2Image  # the list of all such pipelines, for who draws over a picture

    try:
        return family.placed(AutoPipelineForImage2Image.from_pipe(family.pipe))
    except ValueError:
        name = type(family.pipe).__name__
        raise UserError(f"diffusers draws over no picture with a {name}; take the picture away.") from None


def redrawn_pictures(
    family: Family,
    pipe: Any,
    picture: Image.Image,
    prompts: Sequence[str],
    *,
    change: float,
    seed: int,
    steps: int,
    guidance_scale: float,
    resolution: int,
    batch_size: int = 4,
    advance: Callable[[int], object] = lambda count: None,
) -> list[Image.Image]:
    """The picture drawn over, once a prompt; picture i has noise that depends on (seed, i) alone.

    Args:
        pipe: from `image_pipeline`.
        change: how far the picture is taken back into noise, diffusers' `strength`. (0 to 1]
        resolution: side of the square that the picture is framed to.

    Raises:
        UserError: if so small a change leaves no step.
    """
    if int(steps * change) < 1:
        raise UserError(f"a change of {change:g} leaves none of {steps} steps; expected at least {1 / steps:.2f}.")
    framed = Image.fromarray(frame(picture, resolution, resolution))
    sizes = {"height", "width"} & inspect.signature(pipe.__call__).parameters.keys()
    pipe.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        with torch.no_grad():
            pictures += pipe(
                **family.prompt_arguments(part),
                image=[framed] * len(part),
                strength=change,
                num_inference_steps=steps,
                **family.guidance_arguments(guidance_scale, len(part)),
                **dict.fromkeys(sizes, resolution),
                generator=[torch.Generator().manual_seed(step_seed(seed, start + i)) for i in range(len(part))],
                output_type="pil",
            ).images
        advance(len(part))
    return pictures
