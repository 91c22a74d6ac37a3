"""torch.compile for the training step: the blocks that a model repeats, each compiled once for all of its kind.

Compiling blocks instead of the whole takes a fraction of the time for nearly the same speed, and leaves the names of
the weights as they are. What is only looked at, validation and pictures, runs without it: other shapes would be
compiled anew. Results are equal up to rounding.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch._dynamo
from torch import nn

from difftuning_control.errors import UserError

MOST_SHAPES = 64  # of the blocks of one class, with buckets; beyond that PyTorch runs them uncompiled


def check_compiler(backend: str, device: torch.device) -> None:
    """Compile a product on the device, forwards and backwards.

    Raises:
        UserError: if that fails, as without a C++ compiler or Triton.
    """
    try:
        x = torch.ones(2, device=device, requires_grad=True)
        torch.compile(lambda x: (x * x).sum(), backend=backend)(x).backward()
    except Exception as error:  # whatever a compiler says
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"training.compile is {backend}, which does not work here ({said}); install what it needs (a C++ compiler, "
            "on a GPU Triton), or leave it out."
        ) from None


def compile_blocks(module: nn.Module, backend: str) -> int:
    """Have every entry of the lists of equal blocks compiled at its first call; gives the number of such blocks.

    Each shape is compiled by itself: blocks of one class differ in width and resolution, which PyTorch would take for
    sizes that vary, and compile into slower code or not at all.
    """
    limits: Any = torch._dynamo.config
    name = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"  # before torch 2.7
    setattr(limits, name, max(getattr(limits, name), MOST_SHAPES))
    count = 0
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len({type(block) for block in child}) == 1:
            for block in child:
                block.compile(backend=backend, dynamic=False)
            count += len(child)
        else:
            count += compile_blocks(child, backend)
    return count


def eagerly() -> AbstractContextManager[None]:
    """While open, what is compiled runs as if it were not."""
    return torch.compiler.set_stance("force_eager")
