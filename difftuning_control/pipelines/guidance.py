"""Hooks that act while a pipeline samples; its own `__call__` stays as it is.

    where                     what answers a forward
    u ≤ u₀ (hand-over)        the pretrained weights
    unconditional rows        the tuned weights, an adapter at the strength k s(u): k = 0 is Domain Guidance
    conditional rows          the tuned weights, an adapter at the strength s(u)

The pretrained weights are the tuned ones with the adapter off, or a second module (`source`). With them the guided
prediction is ε̂ = ε_k(x, ∅) + w (ε_tuned(x, c) − ε_k(x, ∅)), w as diffusers' `guidance_scale`; ε_0 is the pretrained
model's and ε_1 the tuned one's, which is ordinary guidance. Where a sampler has no unconditional rows (FLUX) the same
rows are answered a second time.

References:
    Diffusion Tuning: Transferring Diffusion Models via Chain of Forgetting (Zhong et al., NeurIPS 2024),
    https://arxiv.org/abs/2406.00773 (section 3: the experiment with two models on either side of u₀)
    Domain Guidance: A Simple Transfer Approach for a Pre-trained Diffusion Model (Zhong et al., ICLR 2025),
    https://arxiv.org/abs/2504.01521
    Steering Guidance for Personalized Text-to-Image Diffusion Models (2025), https://arxiv.org/abs/2508.00319 (weights
    between the pretrained and the tuned ones in the unconditional rows)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.utils.torch_utils import is_compiled_module
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from difftuning_control.adapters.difffit import TrainedWhole
from difftuning_control.adapters.kinds import own_parts
from difftuning_control.errors import UserError
from difftuning_control.pipelines.hooks import SamplingHook, hooked
from difftuning_control.pipelines.strength import check_u

if TYPE_CHECKING:
    from difftuning_control.families.family import Family
    from difftuning_control.objective.noise import NoiseProcess

TUNED = "difftuning_tuned_weights"
AtTimestep = Callable[[Tensor], float]  # a forward's timestep to a strength in [0, 1]
Branch = Literal["tuned", "unconditional", "unconditional first", "conditional first", "both"]
"""Which rows a forward has: all conditional or all unconditional; the unconditional ones in the first or the second
half; or conditional ones that are answered as both, of which `scale` then makes one prediction."""

AtForward = Callable[[dict[str, Any], Tensor], Branch]  # a forward's keyword arguments and timestep to its rows


# --- which weights act ----------------------------------------------------------------------------------------------


def tuner_layers(module: nn.Module) -> list[Any]:
    """The peft layers of a module, whose adapters can be switched, and what trains whole beside them or alone."""
    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    return layers + [part for part in own_parts(module).values() if isinstance(part, TrainedWhole)]


def active_adapters(module: nn.Module) -> list[str]:
    """Names of the adapters that act in a module now, in the order of its layers; fused and disabled ones do not."""
    names: dict[str, None] = {}
    for layer in tuner_layers(module):
        if isinstance(layer, TrainedWhole):
            names[layer.name] = None
        elif not layer.disable_adapters and not layer.merged_adapters:  # beside a fused one peft runs none
            its = layer._get_available_adapters()
            names |= {name: None for name in layer.active_adapters if name in its}
    return list(names)


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


class _TunedWeightsHook(SamplingHook):
    """Answers a denoiser's forward with the weights that its timestep and its rows ask for."""

    def __init__(
        self,
        weights: TunedWeights,
        strength: AtTimestep,
        branch: AtForward,
        scale: float,
        unconditional: float,
        mask: _Rows | None,
    ):
        super().__init__()
        self.weights, self.strength, self.branch, self.scale = weights, strength, branch, scale
        self.unconditional, self.mask = unconditional, mask

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        timestep = argument(args, kwargs, 1, "t" if "t" in kwargs else "timestep")
        branch, strength = self.branch(kwargs, timestep), self.strength(timestep)
        weaker, forward = strength * self.unconditional, self.fn_ref.original_forward
        if branch == "unconditional" or weaker == strength:
            return self.weights.run(forward, weaker, *args, **kwargs)
        if branch == "tuned":
            return self.weights.run(forward, strength, *args, **kwargs)
        if branch == "both":
            tuned = self.weights.run(forward, strength, *args, **kwargs)
            return _apart(self.weights.run(forward, weaker, *args, **kwargs), tuned, self.scale)
        sample = sample_of(args, kwargs)
        first = branch == "unconditional first"
        if self.mask is not None:
            share = self.unconditional
            with self.mask.halves(sample, *((share, 1.0) if first else (1.0, share))):
                return self.weights.run(forward, strength, *args, **kwargs)
        parts = []
        for i, its in enumerate((weaker, strength) if first else (strength, weaker)):
            its_args, its_kwargs = _half((args, kwargs), len(sample), i, isinstance(sample, list))
            parts.append(self.weights.run(forward, its, *its_args, **its_kwargs))
        return _joined(*parts)


class _Rows:
    """Lets LoRAs act otherwise on each half of a batch: one forward of a whole batch is faster than two of halves.

    s · B(A(x)) is as many times as large in a row as A's output is; that is the smallest of its tensors.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    @contextmanager
    def halves(self, sample: Tensor, first: float, second: float) -> Iterator[None]:
        """While open, they act with these shares of their strength on the first and on the second half."""
        rows = len(sample)
        shares = [first] * (rows // 2) + [second] * (rows - rows // 2)
        self.mask = torch.tensor(shares, dtype=sample.dtype, device=sample.device)
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
        if len(output) % len(self.mask):
            raise UserError("a tuned layer is given parts of the batch (forward chunking); turn that off to draw so.")
        mask = self.mask.repeat_interleave(len(output) // len(self.mask))  # of PixArt's sizes, which are several a row
        return output * mask.view(-1, *[1] * (output.ndim - 1)).to(output)


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


def sample_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The noisy rows that a denoiser or a ControlNet was given: a tensor (B, …), or Z-Image's list of B tensors."""
    return args[0] if args else next(kwargs[name] for name in ("sample", "hidden_states", "x") if name in kwargs)


def _half(value: Any, rows: int, which: int, lists: bool) -> Any:
    """The first or second half of every tensor that has a row for each of a batch, in arguments of any nesting.

    Args:
        lists: whether a list may have an entry for each row.
    """
    if isinstance(value, Tensor) and value.ndim and len(value) == rows:
        return value.chunk(2)[which]
    if lists and isinstance(value, list) and len(value) == rows:
        return value[rows // 2 :] if which else value[: rows // 2]
    if isinstance(value, (list, tuple)):
        return type(value)(_half(v, rows, which, lists) for v in value)
    return {k: _half(v, rows, which, lists) for k, v in value.items()} if isinstance(value, dict) else value


def _joined(first: Any, second: Any) -> Any:
    """The two halves' outputs as those of one batch: a tuple, or diffusers' output class."""
    if isinstance(first, tuple):
        return tuple(_one_batch(*pair) for pair in zip(first, second))
    return type(first)(**{name: _one_batch(first[name], second[name]) for name in first})


def _one_batch(first: Any, second: Any) -> Any:
    return [*first, *second] if isinstance(first, list) else torch.cat([first, second])


def _apart(weaker: Any, tuned: Any, scale: float) -> Any:
    """weaker + scale · (tuned − weaker)."""
    if isinstance(tuned, tuple):
        return tuple(p + scale * (t - p) for p, t in zip(weaker, tuned))
    return type(tuned)(**{name: weaker[name] + scale * (tuned[name] - weaker[name]) for name in tuned})


@contextmanager
def tuned_weights(
    module: nn.Module,
    weights: TunedWeights,
    strength: AtTimestep = lambda timestep: 1.0,
    branch: AtForward = lambda inputs, timestep: "tuned",
    scale: float = 1.0,
    unconditional: float = 0.0,
    lists: bool = False,
) -> Iterator[SamplingHook]:
    """While open, a denoiser runs with `weights` at the strength of each timestep.

    Args:
        branch: which rows a forward has.
        scale: w in ε_k + w (ε_tuned − ε_k), where the same rows are answered as both.
        unconditional: k, the share of the strength that unconditional rows are answered with.
        lists: whether the denoiser takes a list of rows, of which no layer sees a batch.
    """
    mask = _Rows() if can_mask(weights) and not is_compiled(module) and not lists else None
    masked = mask.over(weights) if mask is not None else nullcontext()
    tuned = _TunedWeightsHook(weights, strength, branch, scale, unconditional, mask)
    with masked, hooked(module, tuned, TUNED) as hook:
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
