"""Adapters on a pipeline: their names and layers, and how they are merged and taken off."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffusers.utils.peft_utils import delete_adapter_layers, recurse_remove_peft_layers
from diffusers.utils.torch_utils import unwrap_module
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from difftuning_control.adapters.difffit import DiffFit
from difftuning_control.adapters.kinds import ADAPTER, BESIDE, own_parts
from difftuning_control.adapters.tlora import RankMask
from difftuning_control.errors import UserError


def denoiser_of(pipe: Any) -> tuple[str, Any]:
    """The component of a pipeline that denoises, by diffusers' name for it."""
    for name in ("unet", "transformer"):
        if getattr(pipe, name, None) is not None:
            return name, getattr(pipe, name)
    raise UserError(f"a {type(pipe).__name__} has no unet and no transformer, so no adapter fits it.")


def layers_of(module: Any, name: str) -> list[Any]:
    """peft's layers that hold this adapter."""
    tuned = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
    return [m for m in tuned if any(name in getattr(m, part, {}) for part in m.adapter_layer_names)]


def runs_any_of(net: nn.Module, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether a ControlNet runs layers of the denoiser with some of these parameters, as parts of its own or lent to it
    (Z-Image's refiners)."""
    parts = [net, *(value for value in vars(unwrap_module(net)).values() if isinstance(value, nn.Module))]
    own = {id(parameter) for part in parts for parameter in part.parameters()}
    return any(id(parameter) in own for parameter in parameters)


def encoders_of(pipe: Any) -> list[Any]:
    encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    return [encoder for encoder in encoders if encoder is not None]


def adapter_names(denoiser: Any) -> set[str]:
    """Of the adapters on a denoiser; the mask of one that diffusers has unloaded goes too."""
    peft, own = getattr(denoiser, "peft_config", {}), own_parts(denoiser)
    for name, part in list(own.items()):
        if isinstance(part, RankMask) and name not in peft:
            own.pop(name).remove()
    return set(peft) | set(own)


def names_on(pipe: Any) -> set[str]:
    """Of the adapters on a pipeline, whether they are on its denoiser or on a text encoder alone."""
    _, denoiser = denoiser_of(pipe)
    return adapter_names(denoiser).union(*(getattr(encoder, "peft_config", {}) for encoder in encoders_of(pipe)))


def unload_adapter(pipe: Any, adapter_name: str = ADAPTER) -> None:
    """Take an adapter off again: the pipeline is as it was before `load_adapter`, bit for bit.

    Raises:
        UserError: if there is none of this name.
    """
    _, denoiser = denoiser_of(pipe)
    if adapter_name not in names_on(pipe):
        raise UserError(f"the pipeline has no adapter {adapter_name}.")
    remove_adapter(pipe, denoiser, adapter_name)


def merge_adapter(pipe: Any, adapter_name: str = ADAPTER) -> None:
    """Add an adapter of peft's to the weights of denoiser and text encoders that it acts on, and take it off."""
    _, denoiser = denoiser_of(pipe)
    for module in (denoiser, *encoders_of(pipe)):
        for layer in layers_of(module, adapter_name):
            layer.merge(adapter_names=[adapter_name])
    remove_adapter(pipe, denoiser, adapter_name, merged=True)


def remove_adapter(pipe: Any, denoiser: Any, name: str, merged: bool = False) -> None:
    beside, own = (own_parts(denoiser).pop(part, None) for part in (BESIDE.format(name), name))
    if beside is not None and not merged:
        beside.remove()
    if isinstance(own, DiffFit):
        own.remove()
        return
    if own is not None:
        own.remove()
    for module in (denoiser, *encoders_of(pipe)):
        if name not in getattr(module, "peft_config", {}):
            continue
        if len(module.peft_config) > 1:
            delete_adapter_layers(module, name)
        else:
            _unwrap(module)


def _unwrap(module: Any) -> None:
    """Replace peft's layers by those that they wrap."""

    recurse_remove_peft_layers(module)
    del module.peft_config
    module._hf_peft_config_loaded = False
