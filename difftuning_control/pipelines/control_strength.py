"""A ControlNet's strength over the noise while a pipeline samples: its residuals times s(u); at 0 it is not run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from difftuning_control.errors import UserError
from difftuning_control.pipelines.guidance import AtTimestep, argument, sample_of
from difftuning_control.pipelines.hooks import SamplingHook, hooked

CONTROL = "difftuning_control_strength"


@dataclass
class ControlUse:
    """How often a ControlNet ran in a call, and how long; where its strength was 0 it was skipped."""

    run: int = 0
    skipped: int = 0
    clocks: list[tuple[Any, Any]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Spent in the ControlNet."""
        return sum(_elapsed(start, end) for start, end in self.clocks)

    @property
    def seconds_saved(self) -> float | None:
        """By the forwards that were skipped, as long as those that ran; None where none ran."""
        return self.seconds / self.run * self.skipped if self.run else None


def _now(device: torch.device) -> Any:
    """A point in time; on a GPU one that is read later, so that nothing waits for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


class _ControlHook(SamplingHook):
    def __init__(self, strength: AtTimestep, use: ControlUse):
        super().__init__()
        self.strength, self.use = strength, use

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        sample = sample_of(args, kwargs)
        strength = self.strength(argument(args, kwargs, 1, "timestep"))
        scale = kwargs.get("conditioning_scale", 1.0)  # of a union of conditions a list
        if strength == 0 or not any(scale if isinstance(scale, (list, tuple)) else [scale]):
            self.use.skipped += 1
            return no_residuals(module, sample, kwargs.get("return_dict", True))
        start = _now(sample.device)
        residuals = self.fn_ref.original_forward(*args, **kwargs)
        self.use.run += 1
        self.use.clocks.append((start, _now(sample.device)))
        return residuals if strength == 1 else _times(residuals, strength)


def _times(residuals: Any, strength: float) -> Any:
    """Every tensor of what a ControlNet gives, times the strength."""
    if isinstance(residuals, Tensor):
        return residuals * strength
    if isinstance(residuals, dict):  # diffusers' output classes are
        return type(residuals)(**{name: _times(value, strength) for name, value in residuals.items()})
    return None if residuals is None else type(residuals)(_times(value, strength) for value in residuals)


KNOWN = ("ControlNetModel", "ControlNetUnionModel", "SD3ControlNetModel", "FluxControlNetModel")


def check_skippable(controlnet: nn.Module) -> None:
    """Refuse a ControlNet that is not known to add what `no_residuals` leaves out.

    Raises:
        UserError: naming its class.
    """
    name = type(unwrap_module(controlnet)).__name__
    if name not in KNOWN:
        raise UserError(f"control_schedule acts on {', '.join(KNOWN)}, and this is a {name}; leave it out.")


def no_residuals(controlnet: Any, sample: Tensor, return_dict: bool) -> Any:
    """Residuals that add nothing, without a forward: as many as the ControlNet gives, of one element a row where it
    does, so that they broadcast."""
    if hasattr(controlnet, "controlnet_down_blocks"):
        return _no_unet_residuals(controlnet, sample, return_dict)
    # saves the transformers of FLUX and SD 3 for models of other families
    from diffusers.models.controlnets.controlnet_flux import FluxControlNetOutput
    from diffusers.models.controlnets.controlnet_sd3 import SD3ControlNetOutput

    blocks = [sample.new_zeros(len(sample), 1, 1) for _ in controlnet.controlnet_blocks]
    if not hasattr(controlnet, "controlnet_single_blocks"):
        return SD3ControlNetOutput(blocks) if return_dict else (blocks,)  # type: ignore[arg-type]
    single = [sample.new_zeros(len(sample), 1, 1) for _ in controlnet.controlnet_single_blocks]
    residuals = blocks or None, single or None
    return FluxControlNetOutput(*residuals) if return_dict else residuals  # type: ignore[arg-type]


def _no_unet_residuals(controlnet: Any, sample: Tensor, return_dict: bool) -> Any:
    """Those of the down blocks are (B, 1, 1, 1).

    The middle's has its full size, since several ControlNets add theirs into the first one's in place.
    """
    down = tuple(sample.new_zeros(len(sample), 1, 1, 1) for _ in controlnet.controlnet_down_blocks)
    height, width = sample.shape[-2:]
    for block in controlnet.down_blocks:
        if block.downsamplers is not None:
            height, width = (height + 1) // 2, (width + 1) // 2
    mid = sample.new_zeros(len(sample), controlnet.config.block_out_channels[-1], height, width)
    if not return_dict:
        return down, mid
    from diffusers.models.controlnets.controlnet import ControlNetOutput  # saves the UNets for transformers

    return ControlNetOutput(down, mid)  # type: ignore[arg-type]


@contextmanager
def control_strength(controlnet: nn.Module, strength: AtTimestep, use: ControlUse) -> Iterator[SamplingHook]:
    """While open, a ControlNet acts with the strength of each timestep; `use` counts how often it ran."""
    with hooked(controlnet, _ControlHook(strength, use), CONTROL) as hook:
        yield hook
