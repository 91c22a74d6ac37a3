"""A device beside the CPU, for a machine that has none: PyTorch's meta device, under a watch that raises where a GPU
would, and notes where somebody would wait for it.

Tensors there have no values: what reads them raises by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
COPIES = ("aten::_to_copy", "aten::copy_")
BY_INDEX = ("aten::index.", "aten::index_put", "aten::_index_put", "aten::_unsafe_index")  # which take those of the CPU


@dataclass
class Watch(TorchDispatchMode):
    """While it is open, an operation on tensors of both devices raises.

    `waits` has what copies to the device while the CPU waits until it has done all before, `later` what does not wait,
    and `doubles` what makes float64 on the device.
    """

    waits: list[str] = field(default_factory=list)
    later: list[str] = field(default_factory=list)
    doubles: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given, name = dict(kwargs or {}), func.name()
        tensors = [t for t in tree_leaves((args, given)) if isinstance(t, torch.Tensor)]
        there = [t for t in tensors if t.device == DEVICE]
        here = [t for t in tensors if t.device != DEVICE and t.ndim]  # a single number may be anywhere
        if there and here and not name.startswith((*COPIES, *BY_INDEX)):
            shapes = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in tensors)
            raise RuntimeError(f"{name} has tensors of two devices: {shapes}")
        found = func(*args, **given)
        to = given.get("device")
        if name.startswith("aten::_to_copy") and to is not None and torch.device(to) == DEVICE and not there:
            (self.later if given.get("non_blocking") else self.waits).append(f"{name} {tuple(tensors[0].shape)}")
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.device == DEVICE and tensor.dtype == torch.float64:
                self.doubles.append(name)
        return found

    __hash__ = object.__hash__
