"""Hooks that act while a pipeline samples; its own `__call__` stays as it is.

Stage hand-over: the tuned model denoises on one side of u₀ and the pretrained one on the other. It is the experiment
that the chain of forgetting rests on (Zhong et al., NeurIPS 2024, arXiv:2406.00773, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from difftuning_control.errors import UserError

if TYPE_CHECKING:
    from difftuning_control.families.family import Family

HAND_OVER = "difftuning_hand_over"


class _HandOver(ModelHook):
    """Answers a forward with the pretrained denoiser wherever `is_base` says so of its timestep."""

    def __init__(self, is_base: Callable[[Tensor], bool], base: nn.Module | None):
        super().__init__()
        self.is_base, self.base = is_base, base
        self.fn_ref: Any

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        if not self.is_base(timestep):
            return self.fn_ref.original_forward(*args, **kwargs)
        if self.base is not None:
            return self.base(*args, **kwargs)
        module.disable_adapters()
        try:
            return self.fn_ref.original_forward(*args, **kwargs)
        finally:
            module.enable_adapters()


@contextmanager
def hand_over(tuned: Family, u0: float, *, tuned_above: bool = True, base: nn.Module | None = None) -> Iterator[None]:
    """While open, `tuned` samples with its own weights at u > u0 and with the pretrained ones at u ≤ u0.

    Args:
        u0: in [0, 1].
        tuned_above: False for the other way round.
        base: the pretrained denoiser; None where the tuned one is the pretrained one with an adapter, which is
            switched off instead.

    Raises:
        UserError: if u0 is out of its range, or there is neither a base nor an adapter.
    """
    if not 0 <= u0 <= 1:
        raise UserError(f"u0 is {u0}; expected 0 to 1.")
    if base is None and not getattr(tuned.denoiser, "_hf_peft_config_loaded", False):
        raise UserError("a stage hand-over needs the pretrained denoiser, or a model with an adapter.")
    process = tuned.process

    def is_base(timestep: Tensor) -> bool:
        above = bool(process.u[process.levels_of(timestep.reshape(-1)[:1].cpu())] > u0)
        return above != tuned_above

    registry = HookRegistry.check_if_exists_or_initialize(tuned.denoiser)
    registry.register_hook(_HandOver(is_base, base), HAND_OVER)
    trainable = {p: p.requires_grad for p in tuned.denoiser.parameters()}  # peft sets it whenever it switches
    try:
        yield
    finally:
        registry.remove_hook(HAND_OVER)
        for parameter, before in trainable.items():
            parameter.requires_grad_(before)
