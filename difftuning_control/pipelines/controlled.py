"""From a running pipeline to one with a control, sharing all weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from difftuning_control.control import ControlSpec
from difftuning_control.errors import UserError
from difftuning_control.pipelines.control import load_controlnets
from difftuning_control.pipelines.sd import DiffTuningControlNetPipeline
from difftuning_control.pipelines.sdxl import DiffTuningXLControlNetPipeline

CONTROLLED = {
    "StableDiffusionPipeline": DiffTuningControlNetPipeline,
    "StableDiffusionControlNetPipeline": DiffTuningControlNetPipeline,
    "StableDiffusionXLPipeline": DiffTuningXLControlNetPipeline,
    "StableDiffusionXLControlNetPipeline": DiffTuningXLControlNetPipeline,
}


def add_control(
    pipe: Any, controlnet: Any, *, spec: ControlSpec | Sequence[ControlSpec | None] | None = None, **extras: Any
) -> Any:
    """A ControlNet pipeline around the modules of a running one, which goes on as it is.

    Adapters, device, dtype and settings come along; a pipeline that has ControlNets keeps them, and the new ones come
    after them.

    Args:
        pipe: a Stable Diffusion or SDXL text-to-image or ControlNet pipeline, of diffusers or of this package.
        controlnet: a `ControlNetModel`, its folder or Hub id, or a list of these; moved to the UNet's device and dtype.
        spec: how the new ControlNets' conditions are made, where no `control_spec.json` lies beside their weights.
        extras: settings as `set_extras` takes them.

    Raises:
        UserError: if the pipeline is of another kind, or a ControlNet was made for another base.
    """
    names = [c.__name__ for c in type(pipe).__mro__ if c.__name__ in CONTROLLED]
    if not names:
        raise UserError(
            f"a control can be added to Stable Diffusion and SDXL text-to-image pipelines, and this is a "
            f"{type(pipe).__name__}; make one of those with from_pipe first."
        )
    has = getattr(pipe, "controlnet", None)
    present = [] if has is None else list(getattr(has, "nets", [has]))
    added = load_controlnets(pipe, controlnet)
    nets = [*present, *added]
    found = CONTROLLED[names[0]].from_pipe(pipe, controlnet=nets if len(nets) > 1 else nets[0], **extras)
    if spec is not None:
        given = [spec] if isinstance(spec, ControlSpec) else list(spec)
        found.set_control_specs([*found._specs[: len(present)], *given])
    return found
