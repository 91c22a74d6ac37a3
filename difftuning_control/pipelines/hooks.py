"""Hooks around the forward of a module while a pipeline samples, in diffusers' own chain of hooks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import HookFunctionReference
from diffusers.utils.torch_utils import is_compiled_module, unwrap_module
from torch import nn

from difftuning_control.errors import UserError

AROUND = "_difftuning_hooks"  # of a compiled module: the chain around it, not within what was compiled
ACTING = "_difftuning_sampling"  # of a module, compiled or not: the hooks that act on it


class SamplingHook(ModelHook):
    """Acts on the forwards of a sampling loop; while paused the module answers as without it."""

    def __init__(self) -> None:
        super().__init__()
        self.fn_ref: Any
        self.is_paused = False
        self.thread = get_ident()

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        if self.is_paused:
            return self.fn_ref.original_forward(*args, **kwargs)
        if get_ident() != self.thread:  # of a pipeline that may know nothing of the settings
            raise _at_once(module)
        return self.forward(module, *args, **kwargs)

    def forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def _at_once(module: nn.Module) -> UserError:
    return UserError(
        f"another call is sampling with this {type(module).__name__} and its extras; draw one after the other, or "
        "give each pipeline a copy."
    )


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


class _Reference(HookFunctionReference):
    """A hook's place in a chain. What an earlier hook writes into it as it goes is what this hook calls from then on:
    group offloading with a stream takes its first hook out after the first forward."""

    own: Any

    def _written(self, behind: Any) -> None:
        self.original_forward = behind

    forward: Any = property(lambda self: self.own, _written)


@contextmanager
def hooked(module: nn.Module, hook: SamplingHook, name: str) -> Iterator[SamplingHook]:
    """While open, the hook acts on the module; afterwards the module is as before, whatever happened.

    Raises:
        UserError: if another call acts on the module and is not paused.
    """
    acting = vars(unwrap_module(module)).setdefault(ACTING, [])
    if not all(other.is_paused for other in acting):
        raise _at_once(module)
    acting.append(hook)
    try:
        with _in_chain(module, hook, name):
            yield hook
    finally:
        acting.remove(hook)
        if not acting:
            del vars(unwrap_module(module))[ACTING]


@contextmanager
def _in_chain(module: nn.Module, hook: SamplingHook, name: str) -> Iterator[None]:
    """While open, the hook is the last of the module's chain."""
    is_compiled, own_forward = is_compiled_module(module), "forward" in vars(module)
    had_registry = hasattr(module, "_diffusers_hook")
    if is_compiled:  # the code within may have a chain of its own
        registry = vars(module).setdefault(AROUND, HookRegistry(module))
    else:
        registry = HookRegistry.check_if_exists_or_initialize(module)
    if name in registry.hooks:
        name = f"{name}_{len(registry.hooks)}"  # beside that of a paused call
    registry.register_hook(hook, name)
    own = vars(hook.fn_ref).pop("forward")
    hook.fn_ref.__class__, hook.fn_ref.own = _Reference, own
    try:
        yield
    finally:
        registry.remove_hook(name, recurse=False)
        if not own_forward and not registry.hooks:
            del module.forward  # the class's again, where nothing else replaced it
        if is_compiled and not registry.hooks:
            del vars(module)[AROUND]
        if not is_compiled and not had_registry:
            del module._diffusers_hook
