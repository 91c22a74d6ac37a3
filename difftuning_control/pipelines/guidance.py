"""Hooks that act while a pipeline samples; its own `__call__` stays as it is.

    where                     what answers a forward
    u ≤ u₀ (hand-over)        the pretrained weights
    unconditional rows        the pretrained weights (Domain Guidance), else as the conditional ones
    conditional rows          the tuned weights, an adapter at the strength s(u)

The pretrained weights are the tuned ones with the adapter off, or a second module (`source`). With them the guided
prediction is ε̂ = ε_pretrained(x, ∅) + w (ε_tuned(x, c) − ε_pretrained(x, ∅)), w as diffusers' `guidance_scale`. Where
a sampler has no unconditional rows (FLUX) the pretrained weights answer the same rows a second time.

References:
    Diffusion Tuning: Transferring Diffusion Models via Chain of Forgetting (Zhong et al., NeurIPS 2024),
    https://arxiv.org/abs/2406.00773 (section 3: the experiment with two models on either side of u₀)
    Domain Guidance: A Simple Transfer Approach for a Pre-trained Diffusion Model (Zhong et al., ICLR 2025),
    https://arxiv.org/abs/2504.01521
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.utils.torch_utils import is_compiled_module
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from difftuning_control.adapters.difffit import TrainedWhole
from difftuning_control.adapters.kinds import own_parts
from difftuning_control.errors import UserError
from difftuning_control.pipelines.strength import check_u

if TYPE_CHECKING:
    from difftuning_control.families.family import Family
    from difftuning_control.objective.noise import NoiseProcess

TUNED = "difftuning_tuned_weights"
AtTimestep = Callable[[Tensor], float]  # a forward's timestep to a strength in [0, 1]
Branch = Literal["tuned", "pretrained", "unconditional first", "conditional first", "both"]
"""Which weights answer a forward: the tuned or the pretrained ones for all rows; the pretrained ones for the first or
the second half; or each of them for all rows, of which `scale` then makes one prediction."""

AtForward = Callable[[dict[str, Any]], Branch]  # a forward's keyword arguments to what answers it


# --- which weights act ----------------------------------------------------------------------------------------------


def tuner_layers(module: nn.Module) -> list[Any]:
    """The peft layers of a module, whose adapters can be switched, and what trains whole beside them or alone."""
    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    return layers + [part for part in own_parts(module).values() if isinstance(part, TrainedWhole)]


def active_adapters(module: nn.Module) -> list[str]:
    """Names of the adapters that act in a module now, in the order of its layers; fused and disabled ones do not."""
    found: dict[str, None] = {}
    for layer in tuner_layers(module):
        if isinstance(layer, TrainedWhole):
            found[layer.name] = None
        elif not layer.disable_adapters:
            its = layer._get_available_adapters() - set(layer.merged_adapters)
            found |= {name: None for name in layer.active_adapters if name in its}
    return list(found)


@contextmanager
def adapters_at(layers: Sequence[Any], names: Sequence[str], strength: float) -> Iterator[None]:
    """While open, the named adapters act with `strength` times their weight, at 0 not at all; others are left alone."""
    if strength == 1:
        yield
        return
    fits = [layer for layer in layers if isinstance(layer, TrainedWhole) and layer.name in names]
    tuned = [layer for layer in layers if not isinstance(layer, TrainedWhole)]
    kept = [(layer, layer._active_adapter, dict(getattr(layer, "scaling", {}))) for layer in tuned]
    with ExitStack() as stack:
        for fit in fits:
            stack.enter_context(fit.at(strength))
        try:
            for layer, _, scaling in kept:
                if strength == 0:  # off rather than scaled by 0, which holds for DoRA too; `set_adapter` would also
                    # make adapters trainable
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
                "there is nothing to switch off: no adapter acts in the denoiser, and no pretrained one is beside it; "
                "load the adapter (load_lora_weights or load_adapter, not fused), or give the pretrained UNet as "
                "source_unet, a transformer as source_transformer."
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
    """Answers a denoiser's forward with the weights that its timestep and its rows ask for."""

    def __init__(
        self, weights: TunedWeights, strength: AtTimestep, branch: AtForward, scale: float, mask: _Rows | None
    ):
        super().__init__()
        self.weights, self.strength, self.branch, self.scale, self.mask = weights, strength, branch, scale, mask

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        branch = self.branch(kwargs)
        strength = self.strength(argument(args, kwargs, 1, "timestep"))
        forward = self.fn_ref.original_forward
        if strength == 0 or branch == "pretrained":
            return self.weights.run(forward, 0, *args, **kwargs)
        if branch == "tuned":
            return self.weights.run(forward, strength, *args, **kwargs)
        if branch == "both":
            tuned = self.weights.run(forward, strength, *args, **kwargs)
            return _apart(self.weights.run(forward, 0, *args, **kwargs), tuned, self.scale)
        sample = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        pretrained = 0 if branch == "unconditional first" else 1
        if self.mask is not None:
            with self.mask.half(sample, 1 - pretrained):
                return self.weights.run(forward, strength, *args, **kwargs)
        halves = []
        for i in range(2):
            its_args, its_kwargs = _half((args, kwargs), len(sample), i)
            its = 0.0 if i == pretrained else strength
            halves.append(self.weights.run(forward, its, *its_args, **its_kwargs))
        return _joined(*halves)


class _Rows:
    """Lets LoRAs act on some rows of a batch only: one forward of a whole batch is faster than two of halves.

    s · B(A(x)) is 0 for rows in which A's output is; that is the smallest of its tensors.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    @contextmanager
    def half(self, sample: Tensor, which: int) -> Iterator[None]:
        """While open, they act on the first or the second half only."""
        rows = len(sample)
        second = torch.arange(rows, device=sample.device) >= rows // 2
        self.mask = (second if which else ~second).to(sample.dtype)
        try:
            yield
        finally:
            self.mask = None

    @contextmanager
    def over(self, weights: TunedWeights) -> Iterator[None]:
        names = weights.adapters
        handles = [
            layer.lora_A[name].register_forward_hook(self._apply)
            for layer in weights.layers
            for name in names
            if name in layer._get_available_adapters()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _apply(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.mask is None:
            return None
        assert len(output) == len(self.mask), "a layer whose rows are not the batch's"
        return output * self.mask.view(-1, *[1] * (output.ndim - 1)).to(output.dtype)


def can_mask(weights: TunedWeights) -> bool:
    """Whether the tuned weights are plain LoRAs, which act on each row by itself and not at all where A gives 0."""
    if weights.source is not None or any(isinstance(layer, TrainedWhole) for layer in weights.layers):
        return False
    mine = [(e, n) for e in weights.layers for n in weights.adapters if n in e._get_available_adapters()]
    return all(
        isinstance(layer, LoraLayer)
        and name in layer.lora_A
        and name not in layer.lora_variant
        and not layer.lora_bias[name]
        for layer, name in mine
    )


def is_compiled(module: nn.Module) -> bool:
    """Whether it or a part of it is compiled: code that was compiled before goes on without hooks added to parts."""
    return any(is_compiled_module(m) or m._compiled_call_impl is not None for m in module.modules())


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    """What a forward was given, by name, or by place."""
    return kwargs[name] if name in kwargs else args[place]


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


def _apart(pretrained: Any, tuned: Any, scale: float) -> Any:
    """pretrained + scale · (tuned − pretrained)."""
    if isinstance(tuned, tuple):
        return tuple(p + scale * (t - p) for p, t in zip(pretrained, tuned))
    return type(tuned)(**{name: pretrained[name] + scale * (tuned[name] - pretrained[name]) for name in tuned})


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
    branch: AtForward = lambda inputs: "tuned",
    scale: float = 1.0,
) -> Iterator[SamplingHook]:
    """While open, a denoiser runs with `weights` at the strength of each timestep.

    Args:
        branch: which weights answer a forward.
        scale: w in ε_pretrained + w (ε_tuned − ε_pretrained), where both do.
    """
    mask = _Rows() if can_mask(weights) and not is_compiled(module) else None
    masked = mask.over(weights) if mask is not None else nullcontext()
    with masked, hooked(module, _TunedWeightsHook(weights, strength, branch, scale, mask), TUNED) as hook:
        yield hook


def above(process: NoiseProcess, u0: float) -> Callable[[Tensor], bool]:
    """Whether a sampler's timestep lies at u > u0."""
    bound = float(torch.tensor(u0, dtype=process.u.dtype))  # the levels' own precision: u = 0.1 is not above 0.1
    return lambda timestep: process.u_at(timestep) > bound


@contextmanager
def hand_over(tuned: Family, u0: float, *, tuned_above: bool = True, base: nn.Module | None = None) -> Iterator[None]:
    """While open, `tuned` samples with its own weights at u > u0 and with the pretrained ones at u ≤ u0.

    Args:
        u0: in [0, 1].
        tuned_above: False for the other way round.
        base: the pretrained denoiser; None where the tuned one is the pretrained one with an adapter, which is
            switched off instead.

    Raises:
        UserError: if u0 is out of its range, there is neither a base nor an adapter, or the text encoder is tuned too.
    """
    if getattr(getattr(tuned.pipe, "text_encoder", None), "_hf_peft_config_loaded", False):
        raise UserError("a stage hand-over exchanges the denoiser, but the text encoder of this model is tuned too.")
    weights = TunedWeights(tuner_layers(tuned.denoiser), active_adapters(tuned.denoiser), base)
    is_above = above(tuned.process, check_u(u0, "u0"))
    with tuned_weights(tuned.denoiser, weights, lambda timestep: float(is_above(timestep) == tuned_above)):
        yield
