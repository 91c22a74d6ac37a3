"""Hooks that act while a pipeline samples; its own `__call__` stays as it is.

    where                     what answers a forward
    u ≤ u₀ (hand-over)        the pretrained weights
    unconditional half        the pretrained weights (Domain Guidance), else as the conditional half
    conditional half          the tuned weights, an adapter at the strength s(u)

The pretrained weights are the tuned ones with the adapter off, or a second module (`source`). With them the guided
prediction is ε̂ = ε_pretrained(x, ∅) + w (ε_tuned(x, c) − ε_pretrained(x, ∅)), w as diffusers' `guidance_scale`.

A ControlNet answers with its residuals times s(u); where that is 0 it is not run.

References:
    Diffusion Tuning: Transferring Diffusion Models via Chain of Forgetting (Zhong et al., NeurIPS 2024),
    https://arxiv.org/abs/2406.00773 (section 3: the experiment with two models on either side of u₀)
    Domain Guidance: A Simple Transfer Approach for a Pre-trained Diffusion Model (Zhong et al., ICLR 2025),
    https://arxiv.org/abs/2504.01521
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from difftuning_control.errors import UserError
from difftuning_control.strength import check_u

if TYPE_CHECKING:
    from difftuning_control.families.sd import StableDiffusion
    from difftuning_control.noise import NoiseProcess

TUNED = "difftuning_tuned_weights"
CONTROL = "difftuning_control_strength"
AtTimestep = Callable[[Tensor], float]  # a forward's timestep to a strength in [0, 1]


# --- which weights act ----------------------------------------------------------------------------------------------


def tuner_layers(module: nn.Module) -> list[Any]:
    """The peft layers of a module, whose adapters can be switched."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def active_adapters(module: nn.Module) -> list[str]:
    """Names of the adapters that act in a module now, in the order of its layers; fused and disabled ones do not."""
    found: dict[str, None] = {}
    for layer in tuner_layers(module):
        if not layer.disable_adapters:
            its = layer._get_available_adapters() - set(layer.merged_adapters)
            found |= {name: None for name in layer.active_adapters if name in its}
    return list(found)


@contextmanager
def adapters_at(layers: Sequence[Any], names: Sequence[str], strength: float) -> Iterator[None]:
    """While open, the named adapters act with `strength` times their weight, at 0 not at all; others are left alone."""
    if strength == 1:
        yield
        return
    kept = [(layer, layer._active_adapter, dict(getattr(layer, "scaling", {}))) for layer in layers]
    try:
        for layer, _, scaling in kept:
            if strength == 0:  # off rather than scaled by 0, which holds for DoRA too; `set_adapter` would also make
                # adapters trainable
                layer._active_adapter = [n for n in layer.active_adapters if n not in names]
            elif scaling:
                layer.scaling.update({n: scaling[n] * strength for n in names if n in scaling})
        yield
    finally:
        for layer, active, scaling in kept:
            layer._active_adapter = active
            if scaling:
                layer.scaling.update(scaling)


@dataclass(frozen=True)
class TunedWeights:
    """The weights of a denoiser and the pretrained ones behind them.

    Args:
        layers: its peft layers.
        adapters: names of the adapters that were tuned.
        source: the pretrained denoiser, for models whose own weights were tuned; else the adapters are switched off.

    Raises:
        UserError: if there is neither.
    """

    layers: list[Any]
    adapters: list[str]
    source: nn.Module | None = None

    def __post_init__(self) -> None:
        if self.source is None and not self.adapters:
            raise UserError(
                "there is nothing to switch off: no adapter acts in the denoiser, and there is no source_unet; load "
                "the adapter (load_lora_weights, not fused), or give the pretrained UNet as source_unet."
            )

    def run(self, forward: Callable[..., Any], strength: float, *args: Any, **kwargs: Any) -> Any:
        """A forward with the tuned weights at a strength, 0 for the pretrained ones and 1 for the tuned ones."""
        if strength == 0 and self.source is not None:
            return self.source(*args, **kwargs)
        with adapters_at(self.layers, self.adapters, strength):
            return forward(*args, **kwargs)


class SamplingHook(ModelHook):
    """Acts on the forwards of a sampling loop; while paused the module answers as without it."""

    def __init__(self) -> None:
        super().__init__()
        self.fn_ref: Any
        self.is_paused = False

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        if self.is_paused:
            return self.fn_ref.original_forward(*args, **kwargs)
        return self.forward(module, *args, **kwargs)

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def pausing(callback: Callable[..., Any], hooks: Sequence[SamplingHook]) -> Callable[..., Any]:
    """A callback of a sampling loop, in which the hooks pause: it may draw with another pipeline of the same module."""

    @functools.wraps(callback)
    def paused(*args: Any, **kwargs: Any) -> Any:
        try:
            for hook in hooks:
                hook.is_paused = True
            return callback(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.is_paused = False

    return paused


class _TunedWeightsHook(SamplingHook):
    def __init__(self, weights: TunedWeights, strength: AtTimestep, is_guided: Callable[[], bool]):
        super().__init__()
        self.weights, self.strength, self.is_guided = weights, strength, is_guided

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        strength = self.strength(_argument(args, kwargs, 1, "timestep"))
        forward = self.fn_ref.original_forward
        if strength == 0 or not self.is_guided():
            return self.weights.run(forward, strength, *args, **kwargs)
        rows = len(_argument(args, kwargs, 0, "sample"))
        (first, first_named), (second, second_named) = (_half((args, kwargs), rows, i) for i in (0, 1))
        unconditional = self.weights.run(forward, 0, *first, **first_named)
        return _joined(unconditional, self.weights.run(forward, strength, *second, **second_named))


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs[name]


def _half(value: Any, rows: int, which: int) -> Any:
    """The first or second half of every tensor that has a row for each of a batch, in arguments of any nesting."""
    if isinstance(value, Tensor) and value.ndim and len(value) == rows:
        return value.chunk(2)[which]
    if isinstance(value, (list, tuple)):
        return type(value)(_half(v, rows, which) for v in value)
    return {k: _half(v, rows, which) for k, v in value.items()} if isinstance(value, dict) else value


def _joined(first: Any, second: Any) -> Any:
    """The two halves' outputs as those of one batch: a tuple, or diffusers' output class."""
    if isinstance(first, tuple):
        return tuple(torch.cat(pair) for pair in zip(first, second))
    return type(first)(**{name: torch.cat([first[name], second[name]]) for name in first})


@contextmanager
def hooked(module: nn.Module, hook: SamplingHook, name: str) -> Iterator[SamplingHook]:
    """While open, the hook acts on the module; afterwards the module is as before, whatever happened.

    Raises:
        UserError: if another call acts on the module and is not paused.
    """
    had_registry, own_forward = hasattr(module, "_diffusers_hook"), "forward" in vars(module)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if any(isinstance(other, SamplingHook) and not other.is_paused for other in registry.hooks.values()):
        raise UserError(
            f"another call is sampling with this {type(module).__name__} and its extras; draw one after the other, or "
            "give each pipeline a copy."
        )
    if name in registry.hooks:
        name = f"{name}_{len(registry.hooks)}"  # beside that of a paused call
    registry.register_hook(hook, name)
    try:
        yield hook
    finally:
        registry.remove_hook(name, recurse=False)
        if not own_forward and not registry.hooks:
            del module.forward  # the class's again, where nothing else replaced it
        if not had_registry:
            del module._diffusers_hook


@contextmanager
def tuned_weights(
    module: nn.Module,
    weights: TunedWeights,
    strength: AtTimestep = lambda timestep: 1.0,
    is_guided: Callable[[], bool] = lambda: False,
) -> Iterator[SamplingHook]:
    """While open, a denoiser runs with `weights` at the strength of each timestep.

    Args:
        is_guided: whether the batch now holds unconditional rows in its first half which the pretrained weights are to
            answer.
    """
    with hooked(module, _TunedWeightsHook(weights, strength, is_guided), TUNED) as hook:
        yield hook


def above(process: NoiseProcess, u0: float) -> Callable[[Tensor], bool]:
    """Whether a sampler's timestep lies at u > u0."""
    bound = float(torch.tensor(u0, dtype=process.u.dtype))  # the levels' own precision: u = 0.1 is not above 0.1
    return lambda timestep: process.u_at(timestep) > bound


@contextmanager
def hand_over(
    tuned: StableDiffusion, u0: float, *, tuned_above: bool = True, base: nn.Module | None = None
) -> Iterator[None]:
    """While open, `tuned` samples with its own weights at u > u0 and with the pretrained ones at u ≤ u0.

    Args:
        u0: in [0, 1].
        tuned_above: False for the other way round.
        base: the pretrained denoiser; None where the tuned one is the pretrained one with an adapter, which is
            switched off instead.

    Raises:
        UserError: if u0 is out of its range, or there is neither a base nor an adapter.
    """
    weights = TunedWeights(tuner_layers(tuned.denoiser), active_adapters(tuned.denoiser), base)
    is_above = above(tuned.process, check_u(u0, "u0"))
    with tuned_weights(tuned.denoiser, weights, lambda timestep: float(is_above(timestep) == tuned_above)):
        yield


# --- how strongly a ControlNet acts ---------------------------------------------------------------------------------


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
        sample = _argument(args, kwargs, 0, "sample")
        strength = self.strength(_argument(args, kwargs, 1, "timestep"))
        if strength * kwargs.get("conditioning_scale", 1.0) == 0:
            self.use.skipped += 1
            return no_residuals(module, sample, kwargs.get("return_dict", True))
        start = _now(sample.device)
        found = self.fn_ref.original_forward(*args, **kwargs)
        self.use.run += 1
        self.use.clocks.append((start, _now(sample.device)))
        if strength == 1:
            return found
        down, mid = found[0], found[1]
        scaled = tuple(d * strength for d in down), mid * strength
        return scaled if isinstance(found, tuple) else type(found)(*scaled)


def no_residuals(controlnet: Any, sample: Tensor, return_dict: bool) -> Any:
    """Residuals that add nothing, without a forward; those of the down blocks are (B, 1, 1, 1) and broadcast.

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
    from diffusers.models.controlnets.controlnet import ControlNetOutput

    return ControlNetOutput(down, mid)  # type: ignore[arg-type]


@contextmanager
def control_strength(controlnet: nn.Module, strength: AtTimestep, use: ControlUse) -> Iterator[SamplingHook]:
    """While open, a ControlNet acts with the strength of each timestep; `use` counts how often it ran."""
    with hooked(controlnet, _ControlHook(strength, use), CONTROL) as hook:
        yield hook
