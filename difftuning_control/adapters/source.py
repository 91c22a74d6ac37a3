"""The pretrained denoiser of fully tuned weights, kept as what the tuning took away from it: Δ = θ_source − θ_tuned.

Domain Guidance asks the pretrained model too. Beside an adapter it is there already; beside tuned weights it would be
a second model on disk. Δ is small, so half precision keeps it well, and tensors that tuning left alone are not stored.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from difftuning_control.errors import UserError
from difftuning_control.system.tensors import digest_of_tensors, set_metadata, write_tensors

LOADABLE = (torch.float32, torch.float16, torch.bfloat16)  # the precisions in which tuned weights may be loaded


def save_difference(
    tuned_unet: nn.Module, source_unet: nn.Module, path: str | Path, dtype: torch.dtype = torch.float16
) -> None:
    """Write Δ = θ_source − θ_tuned of the tensors that differ, and which tuned weights it belongs to.

    Args:
        path: of a safetensors file.
        dtype: of Δ. In float16 it is wrong by at most 2⁻¹¹ |Δ|, or 2⁻²⁵ where |Δ| < 2⁻¹⁴.

    Raises:
        UserError: if the two are not of one architecture, nothing differs, or Δ is too large for the dtype.
    """
    tuned, source = tuned_unet.state_dict(), source_unet.state_dict()
    if {n: t.shape for n, t in tuned.items()} != {n: t.shape for n, t in source.items()}:
        raise UserError("the tuned and the source model have different tensors; give two of one architecture.")
    difference = {}
    for name, tensor in tuned.items():
        if not torch.equal(tensor.cpu(), source[name].cpu()):
            difference[name] = (source[name].cpu().float() - tensor.cpu().float()).to(dtype)
    if not difference:
        raise UserError("the tuned weights equal the source's; there is no difference to keep.")
    if not all(delta.isfinite().all() for delta in difference.values()):
        raise UserError(f"the difference to the source is too large for {_name(dtype)}; keep it in float32.")
    write_tensors(Path(path), difference, {_name(d): _digest(tuned, d) for d in LOADABLE})
    set_metadata(Path(path), {})


def load_source(unet: nn.Module, path: str | Path) -> nn.Module:
    """The source model of a tuned one: θ_tuned + Δ in the tuned dtype, all other tensors the tuned model's own.

    What is shared is the same parameter: it takes no memory, and moves and changes its dtype with the tuned model.

    Raises:
        UserError: if the file cannot be read, belongs to other weights, or the model has an adapter injected.
    """
    if getattr(unet, "_hf_peft_config_loaded", False):
        raise UserError("the model has an adapter; load its source first, and adapters after it.")
    try:
        with safe_open(path, "pt") as file:
            digests = file.metadata() or {}
            difference = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"the difference {path} cannot be read ({reason}); name a file of difftune export.") from None
    if not digests.keys() >= set(map(_name, LOADABLE)):
        raise UserError(f"{path} holds no difference to a source; name a file of difftune export.")
    dtype = next(unet.parameters()).dtype
    if digests.get(_name(dtype)) != _digest(unet.state_dict(), dtype):
        raise UserError(
            f"the difference {path} belongs to other tuned weights; give it the model that was exported with it, in "
            f"{', '.join(map(_name, LOADABLE))}."
        )
    with torch.device("meta"):
        source = type(unet).from_config(unet.config)  # type: ignore[attr-defined]
    tensors = {**dict(unet.named_parameters()), **dict(unet.named_buffers())}
    for name, tensor in tensors.items():
        if name in difference:
            delta = difference[name].to(tensor.device, torch.float32)
            value = (tensor.detach().float() + delta).to(tensor.dtype)
            tensor = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
        _put(source, name, tensor)
    return source.eval()


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Let a parameter or buffer of a module be this very tensor."""
    place, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(place), leaf, tensor)


def _digest(state: dict[str, Tensor], dtype: torch.dtype) -> str:
    return digest_of_tensors({n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
