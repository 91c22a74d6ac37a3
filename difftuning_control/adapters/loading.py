"""The loading of adapters of any kind onto any pipeline: checked first, and taken off again where they do not fit."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import peft
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from difftuning_control.adapters.attached import (
    adapter_names,
    denoiser_of,
    encoders_of,
    layers_of,
    names_on,
    remove_adapter,
    runs_any_of,
)
from difftuning_control.adapters.difffit import DiffFit
from difftuning_control.adapters.files import (
    DIFFFIT_FILE,
    PEFT_CONFIG,
    PEFT_FILE,
    PEFT_PREFIX,
    find_adapter,
    metadata_and_shapes,
    read_adapter,
    read_header,
)
from difftuning_control.adapters.foreign import read_foreign
from difftuning_control.adapters.kinds import ADAPTER, BESIDE, keep_part, mask_ranks, own_parts
from difftuning_control.adapters.lora_keys import OtherFormError, is_native, read_by_diffusers
from difftuning_control.adapters.native_names import plain_layers
from difftuning_control.adapters.new_classes import NewClasses
from difftuning_control.errors import UserError
from difftuning_control.families.hub import quiet_loading
from difftuning_control.families.tunable import CLASSES_FILE, make_tunable
from difftuning_control.recipe.adapter_kinds import KINDS, Kind, kind_of_peft
from difftuning_control.system.untrusted import from_json, read_text


def load_adapter(pipe: Any, path: str | Path, adapter_name: str = ADAPTER, strength: float = 1.0) -> None:
    """Put an adapter of any kind on a diffusers pipeline, as it was trained: a T-LoRA with its mask.

    Args:
        path: the output folder of a run, what lies in it, or a LoRA file or peft directory of somebody else's.
        adapter_name: free on this pipeline.
        strength: 1 as trained, 0 the pretrained model; of oft, boft, ia3 and dora only 1.

    Raises:
        UserError: if there is no adapter, it does not fit this model, or it cannot be had at this strength; the
            pipeline is then as it was.
    """
    place = find_adapter(Path(path).expanduser())
    component, denoiser = denoiser_of(pipe)
    if not (math.isfinite(strength) and strength >= 0):
        raise UserError(f"strength is {strength}; expected a finite number of at least 0.")
    if adapter_name in names_on(pipe):
        raise UserError(f"the pipeline has an adapter {adapter_name} already; unload it or give another adapter_name.")
    with quiet_loading(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_tunable(denoiser)
        if place.is_dir():
            _load_peft(denoiser, place, adapter_name, strength)
        elif place.name == DIFFFIT_FILE or read_header(place).get("kind") == "difffit":
            _load_difffit(denoiser, place, adapter_name, strength)
        else:
            _load_lora(pipe, component, denoiser, place, adapter_name, strength)
    beside = (place if place.is_dir() else place.parent) / CLASSES_FILE
    if beside.exists():
        try:
            keep_part(denoiser, BESIDE.format(adapter_name), NewClasses(pipe, beside, adapter_name, strength))
        except UserError:
            remove_adapter(pipe, denoiser, adapter_name)
            raise


def _load_lora(pipe: Any, component: str, denoiser: Any, path: Path, name: str, strength: float) -> None:
    (metadata, shapes), header = metadata_and_shapes(path), read_header(path)
    dora, tensors = any("magnitude" in key for key in shapes), read_adapter(path)
    _check_strength("dora" if dora else "lora", strength)
    try:
        config = dict(from_json(metadata.get("lora_adapter_metadata", "{}")))
    except (TypeError, ValueError) as error:
        raise UserError(f"the header of {path} cannot be read (lora_adapter_metadata: {error}).") from None
    rank = header.get("rank", 1)
    uneven = next((key for key, shape in shapes.items() if ".lora_A." in key and shape[0] % rank), None)
    if uneven is not None:
        raise UserError(f"the adapter {path} is no T-LoRA of rank {rank}: {uneven} has {shapes[uneven][0]} rows.")
    foreign, layers = None, plain_layers(denoiser)
    translated = hasattr(pipe, "load_lora_weights") and component != "unet" and read_by_diffusers(shapes, layers)
    if not translated and not is_native(shapes, component, layers):
        try:
            foreign = read_foreign(tensors, pipe, component)
        except OtherFormError as error:
            raise UserError(f"the adapter {path} {error}.") from None
        shapes, config = {key: tuple(value.shape) for key, value in foreign.items()}, {}
    if not translated:
        _check_lora(pipe, component, shapes, config, path)
    _free(denoiser, path)
    try:
        if foreign is not None:
            if hasattr(pipe, "load_lora_weights"):
                pipe.load_lora_weights(foreign, adapter_name=name)
            else:
                denoiser.load_lora_adapter(foreign, prefix=component, adapter_name=name)
        elif hasattr(pipe, "load_lora_weights"):
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name, use_safetensors=True)
        else:
            denoiser.load_lora_adapter(tensors, prefix=component, adapter_name=name, metadata=config)
    except Exception as error:  # whatever diffusers finds wrong with it
        remove_adapter(pipe, denoiser, name)
        raise _does_not_fit(path, error) from None
    if (left := _left_out(tensors, denoiser, name) if translated else _passed_over(shapes, pipe, name)) is not None:
        remove_adapter(pipe, denoiser, name)
        raise UserError(f"the adapter {path} cannot be had on a {type(pipe).__name__}: diffusers leaves out {left}.")
    if not translated and not config:
        for module in (denoiser, *encoders_of(pipe)):
            _without_alpha(module, name)
    if header.get("kind") == "tlora":
        mask_ranks(denoiser, name, header["rank"], header["limits"], header["sign"])
        net = getattr(pipe, "controlnet", None)
        masked = [p for layer in layers_of(denoiser, name) for p in layer.parameters()]
        if net is not None and runs_any_of(net, masked):
            own_parts(denoiser)[name].follow(net)
    if strength != 1:
        for module in (denoiser, *encoders_of(pipe)):
            for layer in layers_of(module, name):
                layer.set_scale(name, strength)


def _check_lora(
    pipe: Any, component: str, shapes: dict[str, tuple[int, ...]], config: dict[str, Any], path: Path
) -> None:
    """Refuse a LoRA whose layers are not this model's."""
    parts: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        module, _, part = key.rpartition(".lora_")
        prefix, _, layer = module.partition(".")
        parts.setdefault((prefix, layer), {})["lora_" + part] = shape
    layers = set()
    for (prefix, layer), given in parts.items():
        model = getattr(pipe, prefix, None)
        modules = _plain_modules(model) if isinstance(model, nn.Module) else {}
        target = modules.get(layer) or modules.get(layer.removeprefix("text_model."))
        down, up = given.get("lora_A.weight"), given.get("lora_B.weight")
        if target is None or not hasattr(target, "weight"):
            raise UserError(
                f"the adapter {path} does not fit this model: it has weights for {prefix}.{layer}, which is no layer."
            )
        if down is None or up is None:
            raise UserError(f"the adapter {path} is not whole: A or B of {prefix}.{layer} is missing.")
        linear = isinstance(target, nn.Linear)  # the weight of a quantised one is packed
        out, into = (target.out_features, target.in_features) if linear else target.weight.shape[:2]
        if (up[0], down[1]) != (out, into) or up[1] != down[0]:
            raise UserError(
                f"the adapter {path} does not fit this model: it was made for {prefix}.{layer} of {up[0]} × {down[1]}, "
                f"here it is {out} × {into}."
            )
        if prefix == component:
            layers.add(layer)
    targets = config.get(f"{component}.target_modules")
    if isinstance(targets, list):
        modules = _plain_modules(getattr(pipe, component))
        wanted = {n for n in modules for t in targets if n == t or n.endswith(f".{t}")}
        if wanted - layers:
            raise UserError(f"the adapter {path} is not whole: weights of {min(wanted - layers)} are missing.")


def _without_alpha(module: Any, name: str) -> None:
    """Let a LoRA whose file has no alpha, or has it in B, add B A, and be saved so: older diffusers give all
    layers one alpha, whatever their ranks."""
    for layer in layers_of(module, name):
        layer.lora_alpha[name] = layer.r[name]
        layer.set_scale(name, 1.0)
    if (config := getattr(module, "peft_config", {}).get(name)) is not None:
        config.lora_alpha, config.alpha_pattern = config.r, dict(config.rank_pattern)


def _passed_over(shapes: dict[str, tuple[int, ...]], pipe: Any, name: str) -> str | None:
    """Of the layers of a file those in a module that has none of the adapter, as FLUX's second text encoder."""
    modules = dict.fromkeys(key.partition(".")[0] for key in shapes)
    bare = [module for module in modules if not layers_of(getattr(pipe, module), name)]
    return f"the layers of its {bare[0]}" if bare else None


def _left_out(tensors: dict[str, Tensor], denoiser: Any, name: str) -> str | None:
    """How many of the values of a file's ups and Kronecker factors are in no layer of an adapter."""
    ups = ("lora1.up.weight", "lora2.up.weight")
    given = sum(value.numel() for key, value in tensors.items() if key.endswith(ups) or ".lokr_" in key)
    parts = (part for layer in layers_of(denoiser, name) for part in layer.named_parameters())
    mine = (value for key, value in parts if ("lora_B" in key or "lokr_" in key) and name in key.split("."))
    left = given - sum(value.numel() for value in mine)
    return f"{left} of its values" if left > 0 else None


def _plain_modules(model: nn.Module) -> dict[str, Any]:
    """A model's layers by the names that they have without adapters."""
    modules: dict[str, Any] = {}
    for name, module in model.named_modules():
        modules[name] = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return modules


def _load_peft(denoiser: Any, folder: Path, name: str, strength: float) -> None:
    classes = {facts.peft.upper(): f"{facts.peft}Config" for facts in KINDS.values() if facts.peft is not None}
    try:
        values = from_json(read_text(folder / PEFT_CONFIG))
        kind = values.pop("peft_type")
        config: Any = getattr(peft, classes[kind])(**{k: v for k, v in values.items() if k != "auto_mapping"})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / PEFT_CONFIG} cannot be read as an adapter of {', '.join(classes)} ({error!r})."
        ) from None
    if not (folder / PEFT_FILE).is_file():
        raise UserError(f"{folder} has no {PEFT_FILE}; adapters are read from safetensors files only.")
    if values.get("modules_to_save") or values.get("bias", "none") != "none":
        raise UserError(
            f"{folder / PEFT_CONFIG} trains layers or biases of the model itself (modules_to_save, bias), which would "
            "stay when the adapter is taken off; give an adapter without them."
        )
    tensors = {k.removeprefix(PEFT_PREFIX): v for k, v in read_adapter(folder / PEFT_FILE).items()}
    _check_strength("dora" if values.get("use_dora") else kind_of_peft(kind), strength)
    if kind == "LORA":
        config.init_lora_weights = True
    _free(denoiser, folder)
    try:
        denoiser.add_adapter(config, name)
        expected = get_peft_model_state_dict(denoiser, adapter_name=name)
        _compare({k: tuple(v.shape) for k, v in tensors.items()}, {k: tuple(v.shape) for k, v in expected.items()})
        set_peft_model_state_dict(denoiser, tensors, adapter_name=name)
    except Exception as error:  # peft raises what it likes
        remove_adapter(None, denoiser, name)
        raise _does_not_fit(folder, error) from None
    if strength != 1:
        for layer in layers_of(denoiser, name):
            layer.set_scale(name, strength)


def _load_difffit(denoiser: Any, path: Path, name: str, strength: float) -> None:
    shapes, tensors = metadata_and_shapes(path)[1], read_adapter(path)
    if adapter_names(denoiser):
        raise UserError("the pipeline has an adapter already, beside which a DiffFit cannot be put; unload it first.")
    try:
        _compare(shapes, DiffFit.shapes(denoiser))
    except ValueError as error:
        raise _does_not_fit(path, error) from None
    own = DiffFit(denoiser, name)
    own.set(tensors, strength)
    keep_part(denoiser, name, own)


def _compare(given: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """A ValueError unless names and shapes are the same."""
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing:
        raise ValueError(f"weights of {missing[0]} are missing")
    if unknown:
        raise ValueError(f"it has weights for {unknown[0]}, which is no layer")
    for key, shape in expected.items():
        if given[key] != shape:
            raise ValueError(f"{key} is {given[key]} in it and {shape} here")


def _does_not_fit(place: Path, error: Exception) -> UserError:
    return UserError(f"the adapter {place} does not fit this model: {str(error).strip().splitlines()[0].rstrip('.')}.")


def _check_strength(kind: Kind, strength: float) -> None:
    if not KINDS[kind].is_scalable and strength != 1:
        raise UserError(f"strength is {strength:g}, but an adapter of kind {kind} cannot be scaled; leave it at 1.")


def _free(denoiser: Any, place: Path) -> None:
    """Refuse to put an adapter beside a DiffFit."""
    if any(isinstance(own, DiffFit) for own in own_parts(denoiser).values()):
        raise UserError(f"the pipeline has a DiffFit, beside which {place} cannot be put; unload it first.")
