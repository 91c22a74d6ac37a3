"""The adapters of a whole pipeline on disk, each as `load_adapter` takes it, and which of them act how strongly.

<folder>/in_use.json        names and folders, which act, and the scale of every layer
<folder>/<name>/…           a LoRA file of denoiser and text encoders, a peft directory, or a DiffFit
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from diffusers.utils.torch_utils import unwrap_module
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from difftuning_control.adapters.attached import denoiser_of
from difftuning_control.adapters.difffit import DiffFit, TrainedWhole
from difftuning_control.adapters.files import HEADER, LORA_FILE, encoder_state, save_difffit, save_peft
from difftuning_control.adapters.kinds import BESIDE, lora_state, own_parts
from difftuning_control.adapters.loading import load_adapter
from difftuning_control.adapters.tlora import RankMask
from difftuning_control.errors import UserError
from difftuning_control.families.tunable import save_classes, save_transformer_lora
from difftuning_control.system.durable import write_json
from difftuning_control.system.tensors import set_metadata
from difftuning_control.system.text import is_device
from difftuning_control.system.untrusted import from_json, read_text

IN_USE = "in_use.json"
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
MARKS = ("peft_config", "_hf_peft_config_loaded")  # by which diffusers and transformers know a model with adapters


def tuned_modules(pipe: Any) -> dict[str, Any]:
    """The denoiser and the text encoders of a pipeline, by name."""
    component, _ = denoiser_of(pipe)
    modules = {name: getattr(pipe, name, None) for name in (component, *ENCODERS)}
    return {name: unwrap_module(module) for name, module in modules.items() if module is not None}


def loaded_adapters(module: nn.Module) -> list[str]:
    """Names of the adapters on a module, acting or not; what is fused is in the weights and none of them."""
    fused = {name for layer in _layers(module).values() for name in layer.merged_adapters}
    peft = [name for name in getattr(module, "peft_config", {}) if name not in fused]
    return peft + [name for name, part in own_parts(module).items() if isinstance(part, DiffFit)]


def _layers(module: nn.Module) -> dict[str, Any]:
    """The peft layers of a module, by the names that the layers in them have without adapters."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}


# --- saving ---------------------------------------------------------------------------------------------------------


def check_savable(pipe: Any) -> list[str]:
    """The names of a pipeline's adapters.

    Raises:
        UserError: for one that no file holds: parts of several kinds, or a kind other than LoRA on a text encoder; or
            one that would act once it is loaded and does not now, since peft runs none beside a fused one.
    """
    modules, savable = tuned_modules(pipe), dict[str, None]()
    component, _ = denoiser_of(pipe)
    for part, module in modules.items():
        for name in loaded_adapters(module):
            savable[name] = None
            _check_not_beside_fused(module, name, part)
            if part == component:
                continue
            kinds = {_peft_type(m, name) for m in modules.values() if name in loaded_adapters(m)}
            writer = getattr(type(pipe), "save_lora_weights", None)
            if kinds != {"LORA"} or writer is None or f"{part}_lora_layers" not in signature(writer).parameters:
                raise UserError(
                    f"the adapter {name} in {part} cannot be saved with the pipeline, which holds LoRAs there that "
                    f"{type(pipe).__name__}.save_lora_weights takes; unload it, or fuse it, before saving."
                )
    return list(savable)


def _check_not_beside_fused(module: nn.Module, name: str, part: str) -> None:
    layers = [layer for layer in _layers(module).values() if name in layer.active_adapters]
    fused = sorted({other for layer in layers for other in layer.merged_adapters})
    if fused:
        raise UserError(
            f"{', '.join(fused)} is fused in {part}, where {name} therefore does not act, and would once it is loaded; "
            f"unfuse (unfuse_lora), or take {name} away (delete_adapters), before saving."
        )


def _peft_type(module: Any, name: str) -> str:
    config = getattr(module, "peft_config", {}).get(name)
    return "DIFFFIT" if config is None else config.peft_type.value


def save_adapters(pipe: Any, names: Sequence[str], folder: Path) -> None:
    """Write the named adapters of a pipeline, in place of what an earlier pipeline left there.

    Raises:
        UserError: if there is something else.
    """
    if (folder / IN_USE).exists():
        shutil.rmtree(folder)
    if names and folder.exists():
        raise UserError(f"{folder} is there already and of no saved pipeline; save into another folder, or remove it.")
    if not names:
        return
    folders = _folders_of(names)
    for name in names:
        (folder / folders[name]).mkdir(parents=True)
        _save_adapter(pipe, name, folder / folders[name])
    used = {part: _use_of(module, names) for part, module in tuned_modules(pipe).items()}
    write_json(folder / IN_USE, {"folders": folders, "modules": {part: use for part, use in used.items() if use}})


def _folders_of(names: Sequence[str]) -> dict[str, str]:
    """Each adapter's folder: its own name, unless a system could not have it, or not beside the others."""
    folders: dict[str, str] = {}
    for i, name in enumerate(names):
        taken = {folder.lower() for folder in folders.values()}
        folder = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) and not is_device(name) else f"{i}-adapter"
        while folder.lower() in taken:
            folder += "-"
        folders[name] = folder
    return folders


def _save_adapter(pipe: Any, name: str, folder: Path) -> None:
    component, _ = denoiser_of(pipe)
    denoiser = unwrap_module(getattr(pipe, component))
    own = own_parts(denoiser)
    having = {part: module for part, module in tuned_modules(pipe).items() if name in loaded_adapters(module)}
    kinds = {_peft_type(module, name) for module in having.values()}
    if kinds == {"DIFFFIT"}:
        save_difffit(denoiser, folder, name)
    elif kinds != {"LORA"}:
        save_peft(denoiser, folder, name)
    else:
        layers: dict[str, Any] = {
            part: (lora_state if module is denoiser else encoder_state)(module, name) for part, module in having.items()
        }
        if hasattr(pipe, "save_lora_weights"):
            named = {f"{part}_lora_layers": tensors for part, (tensors, _) in layers.items()}
            named |= {f"{part}_lora_adapter_metadata": config for part, (_, config) in layers.items()}
            type(pipe).save_lora_weights(folder, **named, safe_serialization=True)
        else:
            save_transformer_lora(folder, *layers[component])
        if isinstance(mask := own.get(name), RankMask):
            set_metadata(folder / LORA_FILE, {HEADER: json.dumps(mask.describe())})
    if BESIDE.format(name) in own:
        save_classes(denoiser, folder, sorted(pipe.labels, key=pipe.labels.get))


def _use_of(module: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """Which adapters act in a module, and the scale that each layer gives them; nothing where there are none."""
    layers = _layers(module)
    if not layers:
        return {}
    acting = {name: None for layer in layers.values() for name in layer.active_adapters if name in names}
    scales = {
        name: {place: layer.scaling[name] for place, layer in layers.items() if name in getattr(layer, "scaling", {})}
        for name in names
    }
    enabled = not any(layer.disable_adapters for layer in layers.values())
    return {
        "acting": list(acting),
        "enabled": enabled,
        "scaling": {name: scaling for name, scaling in scales.items() if scaling},
    }


@contextmanager
def taken_off(modules: Sequence[nn.Module]) -> Iterator[None]:
    """While open, modules are as they would be without adapters, and can be saved; what was fused stays in them."""
    with ExitStack() as stack:
        for module in modules:
            for part in own_parts(module).values():
                if isinstance(part, TrainedWhole):
                    stack.enter_context(part.taken_off())
            marks = {name: vars(module).pop(name) for name in MARKS if name in vars(module)}
            stack.callback(vars(module).update, marks)
            for place, layer in _layers(module).items():
                parent, _, leaf = place.rpartition(".")
                inside = module.get_submodule(parent)._modules
                stack.callback(inside.__setitem__, leaf, layer)
                inside[leaf] = layer.get_base_layer()
        yield


# --- loading --------------------------------------------------------------------------------------------------------


def load_adapters(pipe: Any, folder: Path) -> None:
    """Put the adapters of a saved pipeline on it, as they acted.

    Raises:
        UserError: if they cannot be read or do not fit; those before them are then loaded.
    """
    try:
        state = from_json(read_text(folder / IN_USE))
        folders, modules = dict(state["folders"]), dict(state["modules"])
        strange = [place for place in folders.values() if Path(place).name != place]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder / IN_USE} cannot be read; save the pipeline anew.") from None
    if strange:
        raise UserError(f"{folder / IN_USE} names {strange[0]}, which is no folder beside it.")
    for name, place in folders.items():
        load_adapter(pipe, folder / place, name)
    for part, module in tuned_modules(pipe).items():
        if part in modules:
            _put_in_use(module, modules[part])


def _put_in_use(module: nn.Module, use: dict[str, Any]) -> None:
    for place, layer in _layers(module).items():
        for name, scales in use["scaling"].items():
            if place in scales:
                layer.scaling[name] = scales[place]
        layer.set_adapter(use["acting"])
        for name in layer.adapter_layer_names:  # what draws trains nothing
            getattr(layer, name).requires_grad_(False)
        if not use["enabled"]:
            layer.enable_adapters(False)
