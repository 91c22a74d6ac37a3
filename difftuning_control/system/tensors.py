"""Safetensors files, written whole or not at all and checked by digest; digests of tensors and modules."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from difftuning_control.errors import UserError
from difftuning_control.system.digests import DIGEST
from difftuning_control.system.durable import beside


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of names, shapes, dtypes and bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(title_of_tensor(name, tensor.shape, tensor.dtype))
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def title_of_tensor(name: str, shape: torch.Size, dtype: torch.dtype) -> bytes:
    """What stands before a tensor's bytes in a digest."""
    return f"{name} {tuple(shape)} {dtype}".encode()


def digest_of_module(module: nn.Module) -> str:
    """16 hexadecimal digits of a module's weights, without those of any adapter injected by peft.

    A CLIP text encoder has the same under transformers 4, which has all of it in a module of its own.
    """
    state = {k.replace(".base_layer.", "."): v for k, v in module.state_dict().items() if ".lora_" not in k}
    if all(k.startswith("text_model.") for k in state):
        state = {k.removeprefix("text_model."): v for k, v in state.items()}
    return digest_of_tensors(state)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, written to a temporary name beside the target, then renamed.

    Raises:
        OSError: if it cannot be written, as for any other file.
    """
    with beside(path) as temporary, named_errors(path):
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Inside, what safetensors makes of a full disk, also within diffusers, is an OSError again, and names `path`."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def set_metadata(path: Path, values: dict[str, str]) -> None:
    """Add metadata to a safetensors file's header, in order: the library writes them in a random one."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted((header.get("__metadata__", {}) | values).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])  # in a folder yet to be placed


def cast_tensors(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors in another precision.

    Raises:
        UserError: if a value is too large for it.
    """
    cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if (large := next((name for name, tensor in cast.items() if not tensor.isfinite().all()), None)) is not None:
        raise UserError(f"{large} has values that are too large for {dtype}; give --dtype bfloat16, or leave it out.")
    return cast


def read_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a safetensors file; None if it is absent or damaged."""
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None


def refuse_unreadable(path: Path, what: str = "") -> None:
    """Refuse a file that is there and may not be read, of which safetensors says that it is not there.

    Raises:
        UserError: in this case.
    """
    try:
        with suppress(FileNotFoundError, IsADirectoryError), path.open("rb"):
            pass
    except PermissionError as error:
        raise UserError(f"{what}{path} cannot be read ({error.strerror}); ask who may read it.") from None


def whole_tensors(path: Path, what: str = "") -> dict[str, Tensor]:
    """The tensors of a safetensors file that must be there.

    Args:
        what: stands before its place in the refusal.

    Raises:
        UserError: if it is damaged, or may not be read.
    """
    refuse_unreadable(path, what)
    tensors = read_tensors(path)
    if tensors is None:
        raise UserError(f"{what}{path} is damaged or no safetensors file; give a whole one.")
    return tensors


def write_checked(path: Path, tensors: dict[str, Tensor]) -> None:
    """Like `write_tensors`, with a digest of the tensors beside them, which `rows.open_checked` asks for."""
    write_tensors(path, tensors, {DIGEST: digest_of_tensors(tensors)})
