"""All weights of a large model, spread over processes by PyTorch's own `fully_shard` (FSDP2).

Each of n processes keeps 1/n of every weight, of its gradient and of the optimizer's state, so that AdamW in float32
takes 16/n bytes a weight; the weights of a block are gathered for the while it computes. Everything is as without it
up to rounding: the losses, the gradients' norm, the averaged weights, the result.

References:
    PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel (Zhao et al., 2023), https://arxiv.org/abs/2304.11277
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from difftuning_control.system.digests import digest_of_file

if TYPE_CHECKING:
    from accelerate import Accelerator

    from difftuning_control.families.family import Family


def shard(model: nn.Module, accelerator: Accelerator) -> None:
    """Spread the weights over all processes, in place: block by block, and what lies beside the blocks together."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for child in model.children():
        for block in child if isinstance(child, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down to a norm over all processes; gives the norm before, a scalar."""
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@contextmanager
def gathered(family: Family, main: bool) -> Iterator[None]:
    """While open, the main process's pipeline has the whole denoiser, on the CPU, so that it can be saved as usual. All
    processes come here together."""
    sharded = family.denoiser
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if main:
        with torch.device("meta"):
            whole = type(sharded).from_config(sharded.config)
        whole.load_state_dict(state, assign=True)
        vars(family.pipe)[family.component] = whole  # its own setter would note the class anew
    try:
        yield
    finally:
        vars(family.pipe)[family.component] = sharded


# --- checkpoints ------------------------------------------------------------------------------------------------------


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Each process's part of the tensors as a safetensors file in `folder`; all processes come here together.

    Raises:
        OSError: if one of them cannot write.
    """
    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        failures = [reason for reason, _ in error.failures.values() if isinstance(reason, OSError)]
        if not failures:
            raise
        raise failures[0] from None


def read_shards(folder: Path, tensors: dict[str, Tensor], together: bool) -> None:
    """Fill the tensors, whole or spread over any number of processes, from the safetensors files in `folder`.

    Args:
        together: all processes come here with their parts of the same tensors.
    """
    dcp.load(dict(tensors), storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=not together)


def shapes(folder: Path) -> dict[str, torch.Size]:
    """The whole shape of every tensor in the safetensors files in `folder`."""
    entries: Any = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in entries.items()}


def digests_together(files: list[Path]) -> dict[str, str | None]:
    """The digest of every file by name, None where it is missing; each process reads some of them."""
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = [(p.name, digest_of_file(p) if p.exists() else None) for p in files[rank::count]]
    return dict(gather_object(mine))
