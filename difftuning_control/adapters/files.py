"""Adapters on disk: saved in the format that diffusers or peft loads, and put on any pipeline by `load_adapter`.

lora, dora          pytorch_lora_weights.safetensors    load_lora_weights
tlora               the same, with the ranks in its header; load_lora_weights runs it at full rank throughout
loha … ia3          adapter/ as peft writes it          PeftModel.from_pretrained on the denoiser
difffit             difffit.safetensors                 load_adapter only, which loads all the others too

Beside any of them the embeddings of a DiT's new classes, class_embeddings.safetensors, which load_adapter takes along.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from difftuning_control.adapters.difffit import DiffFit
from difftuning_control.adapters.kinds import ADAPTER, BESIDE, keep_part, lora_state, mask_ranks, own_parts
from difftuning_control.adapters.tlora import RankMask
from difftuning_control.errors import UserError
from difftuning_control.families.hub import quiet_loading
from difftuning_control.system.durable import write_json
from difftuning_control.system.tensors import read_tensors, set_metadata, write_tensors
from difftuning_control.system.untrusted import from_json, read_text, refuse_pickle

LORA_FILE = "pytorch_lora_weights.safetensors"
DIFFFIT_FILE = "difffit.safetensors"
PEFT_FOLDER, PEFT_CONFIG, PEFT_FILE = "adapter", "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # what a PeftModel calls the model inside it
HEADER = "difftuning_adapter"
UNSCALED = {"OFT": "oft", "BOFT": "boft", "IA3": "ia3"}


def denoiser_of(pipe: Any) -> tuple[str, Any]:
    """The component of a pipeline that denoises, by diffusers' name for it."""
    for name in ("unet", "transformer"):
        if getattr(pipe, name, None) is not None:
            return name, getattr(pipe, name)
    raise UserError(f"a {type(pipe).__name__} has no unet and no transformer, so no adapter fits it.")


# --- saving ---------------------------------------------------------------------------------------------------------


def save_peft(module: Any, folder: Path) -> None:
    """A peft directory: `adapter_config.json` and `adapter_model.safetensors`."""
    from peft import get_peft_model_state_dict

    config = {k: sorted(v) if isinstance(v, set) else v for k, v in module.peft_config[ADAPTER].to_dict().items()}
    tensors = get_peft_model_state_dict(module, adapter_name=ADAPTER)
    write_json(folder / PEFT_CONFIG, config | {"inference_mode": True})
    write_tensors(folder / PEFT_FILE, {PEFT_PREFIX + k: v.float() for k, v in tensors.items()})


def save_difffit(module: Any, folder: Path) -> None:
    """The biases, norms and scale factors of a denoiser, under its own names."""
    tensors = {k: v.float() for k, v in own_parts(module)[ADAPTER].parameters.items()}
    write_tensors(folder / DIFFFIT_FILE, tensors, {HEADER: json.dumps({"kind": "difffit"})})


def save_lora(module: Any, text_encoder: Any, write: Callable[..., None], folder: Path) -> None:
    """A LoRA of any kind for `load_lora_weights`.

    Args:
        text_encoder: with a LoRA of its own, or None.
        write: a family's `save_lora`.
    """
    text: dict[str, Any] = {}
    if text_encoder is not None:
        layers, metadata = lora_state(text_encoder)
        text = {"text_encoder_layers": layers, "text_encoder_metadata": metadata}
    write(folder, *lora_state(module), **text)
    mask = own_parts(module).get(ADAPTER)
    set_metadata(folder / LORA_FILE, {HEADER: json.dumps(mask.describe())} if mask is not None else {})


# --- loading --------------------------------------------------------------------------------------------------------


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
    from difftuning_control.adapters.classes import NewClasses
    from difftuning_control.families.tunable import CLASSES_FILE, make_tunable

    place = find_adapter(Path(path).expanduser())
    component, denoiser = denoiser_of(pipe)
    if not (math.isfinite(strength) and strength >= 0):
        raise UserError(f"strength is {strength}; expected a finite number of at least 0.")
    if adapter_name in _names(denoiser):
        raise UserError(f"the pipeline has an adapter {adapter_name} already; unload it or give another adapter_name.")
    with quiet_loading(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_tunable(denoiser)
        if place.is_dir():
            _load_peft(denoiser, place, adapter_name, strength)
        elif place.name == DIFFFIT_FILE or _header(place).get("kind") == "difffit":
            _load_difffit(denoiser, place, adapter_name, strength)
        else:
            _load_lora(pipe, component, denoiser, place, adapter_name, strength)
    beside = (place if place.is_dir() else place.parent) / CLASSES_FILE
    if beside.exists():
        try:
            keep_part(denoiser, BESIDE.format(adapter_name), NewClasses(pipe, beside, adapter_name, strength))
        except UserError:
            _remove(pipe, denoiser, adapter_name)
            raise


def find_adapter(path: Path) -> Path:
    """The adapter's file, or its peft directory."""
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if path.is_dir():
        for place in (path, path / PEFT_FOLDER):
            if (place / PEFT_CONFIG).exists():
                return place
        for name in (LORA_FILE, DIFFFIT_FILE):
            if (path / name).exists():
                return path / name
    refuse_pickle(f"the adapter {path}", path, "adapter")
    raise UserError(
        f"{path} holds no adapter; expected the output folder of a run, a folder with {LORA_FILE}, {DIFFFIT_FILE} or "
        f"{PEFT_CONFIG}, or a safetensors file."
    )


def metadata_of(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """The metadata of a safetensors file, and the shape of each tensor."""
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, shapes
    except (OSError, SafetensorError):
        raise UserError(f"{path} is damaged or no safetensors file; give a whole one.") from None


def _header(path: Path) -> dict[str, Any]:
    """What this package wrote into a file's header; nothing in other people's files."""
    text = metadata_of(path)[0].get(HEADER, "{}")
    try:
        found = from_json(text)
        if found.get("kind") == "tlora":
            limits, sign = [float(v) for v in found["limits"]], int(found.get("sign", 1))
            found = {"kind": "tlora", "rank": int(found["rank"]), "limits": limits, "sign": sign}
            if len(limits) >= found["rank"] or abs(sign) != 1:
                raise ValueError("more limits than ranks, or no sign")
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"the header of {path} cannot be read ({HEADER}: {text:.100}); save the adapter anew."
        ) from None
    return found


def _load_lora(pipe: Any, component: str, denoiser: Any, path: Path, name: str, strength: float) -> None:
    (metadata, shapes), header = metadata_of(path), _header(path)
    dora = any("magnitude" in key or "dora_scale" in key for key in shapes)
    _check_strength("dora" if dora else None, strength)
    try:
        config = dict(from_json(metadata.get("lora_adapter_metadata", "{}")))
    except (TypeError, ValueError) as error:
        raise UserError(f"the header of {path} cannot be read (lora_adapter_metadata: {error}).") from None
    rank = header.get("rank", 1)
    uneven = next((key for key, shape in shapes.items() if ".lora_A." in key and shape[0] % rank), None)
    if uneven is not None:
        raise UserError(f"the adapter {path} is no T-LoRA of rank {rank}: {uneven} has {shapes[uneven][0]} rows.")
    if any(".lora_A." in key for key in shapes):  # other tools' names are diffusers' to translate
        _check_lora(pipe, component, shapes, config, path)
    _free(denoiser, path)
    try:
        if hasattr(pipe, "load_lora_weights"):
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name, use_safetensors=True)
        else:
            denoiser.load_lora_adapter(read_tensors(path), prefix=component, adapter_name=name, metadata=config)
    except Exception as error:  # whatever diffusers finds wrong with it
        _remove(pipe, denoiser, name)
        raise _does_not_fit(path, error) from None
    if header.get("kind") == "tlora":
        mask_ranks(denoiser, name, header["rank"], header["limits"], header["sign"])
    if strength != 1:
        for module in (denoiser, *_encoders(pipe)):
            for layer in _layers(module, name):
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
    found = set()
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
            found.add(layer)
    targets = config.get(f"{component}.target_modules")
    if isinstance(targets, list):
        modules = _plain_modules(getattr(pipe, component))
        wanted = {n for n in modules for t in targets if n == t or n.endswith(f".{t}")}
        if wanted - found:
            raise UserError(f"the adapter {path} is not whole: weights of {min(wanted - found)} are missing.")


def _plain_modules(model: nn.Module) -> dict[str, Any]:
    """A model's layers by the names that they have without adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return found


def _load_peft(denoiser: Any, folder: Path, name: str, strength: float) -> None:
    import peft
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    kinds = {
        "LORA": peft.LoraConfig,
        "LOHA": peft.LoHaConfig,
        "LOKR": peft.LoKrConfig,
        "OFT": peft.OFTConfig,
        "BOFT": peft.BOFTConfig,
        "IA3": peft.IA3Config,
    }
    try:
        values = from_json(read_text(folder / PEFT_CONFIG))
        kind = values.pop("peft_type")
        config: Any = kinds[kind](**{k: v for k, v in values.items() if k != "auto_mapping"})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / PEFT_CONFIG} cannot be read as an adapter of {', '.join(kinds)} ({error!r})."
        ) from None
    tensors = read_tensors(folder / PEFT_FILE)
    if tensors is None:
        raise UserError(f"{folder} has no whole {PEFT_FILE}; adapters are read from safetensors files only.")
    tensors = {k.removeprefix(PEFT_PREFIX): v for k, v in tensors.items()}
    _check_strength("dora" if values.get("use_dora") else UNSCALED.get(kind), strength)
    if kind == "LORA":
        config.init_lora_weights = True
    _free(denoiser, folder)
    try:
        denoiser.add_adapter(config, name)
        expected = get_peft_model_state_dict(denoiser, adapter_name=name)
        _compare({k: tuple(v.shape) for k, v in tensors.items()}, {k: tuple(v.shape) for k, v in expected.items()})
        set_peft_model_state_dict(denoiser, tensors, adapter_name=name)
    except Exception as error:  # peft raises what it likes
        _remove(None, denoiser, name)
        raise _does_not_fit(folder, error) from None
    if strength != 1:
        for layer in _layers(denoiser, name):
            layer.set_scale(name, strength)


def _load_difffit(denoiser: Any, path: Path, name: str, strength: float) -> None:
    shapes = metadata_of(path)[1]
    if _names(denoiser):
        raise UserError("the pipeline has an adapter already, beside which a DiffFit cannot be put; unload it first.")
    try:
        _compare(shapes, DiffFit.shapes(denoiser))
    except ValueError as error:
        raise _does_not_fit(path, error) from None
    own = DiffFit(denoiser, name)
    own.set(read_tensors(path) or {}, strength)
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


def _check_strength(kind: str | None, strength: float) -> None:
    if kind is not None and strength != 1:
        raise UserError(f"strength is {strength:g}, but an adapter of kind {kind} cannot be scaled; leave it at 1.")


def _free(denoiser: Any, place: Path) -> None:
    """Refuse to put an adapter beside a DiffFit."""
    if any(isinstance(own, DiffFit) for own in own_parts(denoiser).values()):
        raise UserError(f"the pipeline has a DiffFit, beside which {place} cannot be put; unload it first.")


# --- switching and taking off ---------------------------------------------------------------------------------------


def _layers(module: Any, name: str) -> list[Any]:
    """peft's layers that hold this adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuned = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
    return [m for m in tuned if any(name in getattr(m, part, {}) for part in m.adapter_layer_names)]


def _encoders(pipe: Any) -> list[Any]:
    found = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    return [encoder for encoder in found if encoder is not None]


def _names(denoiser: Any) -> set[str]:
    """Of the adapters on a denoiser; the mask of one that diffusers has unloaded goes too."""
    peft, own = getattr(denoiser, "peft_config", {}), own_parts(denoiser)
    for name, part in list(own.items()):
        if isinstance(part, RankMask) and name not in peft:
            own.pop(name).handle.remove()
    return set(peft) | set(own)


def unload_adapter(pipe: Any, adapter_name: str = ADAPTER) -> None:
    """Take an adapter off again: the pipeline is as it was before `load_adapter`, bit for bit.

    Raises:
        UserError: if there is none of this name.
    """
    _, denoiser = denoiser_of(pipe)
    if adapter_name not in _names(denoiser):
        raise UserError(f"the pipeline has no adapter {adapter_name}.")
    _remove(pipe, denoiser, adapter_name)


def merge_adapter(pipe: Any, adapter_name: str = ADAPTER) -> None:
    """Add an adapter of peft's to the weights of denoiser and text encoders that it acts on, and take it off."""
    _, denoiser = denoiser_of(pipe)
    for module in (denoiser, *_encoders(pipe)):
        for layer in _layers(module, adapter_name):
            layer.merge(adapter_names=[adapter_name])
    _remove(pipe, denoiser, adapter_name, merged=True)


def _remove(pipe: Any, denoiser: Any, name: str, merged: bool = False) -> None:
    beside, own = (own_parts(denoiser).pop(part, None) for part in (BESIDE.format(name), name))
    if beside is not None and not merged:
        beside.remove()
    if isinstance(own, DiffFit):
        own.remove()
        return
    if own is not None:
        own.handle.remove()
    for module in (denoiser, *_encoders(pipe)):
        if name not in getattr(module, "peft_config", {}):
            continue
        if len(module.peft_config) > 1:
            from diffusers.utils.peft_utils import delete_adapter_layers

            delete_adapter_layers(module, name)
        else:
            _unwrap(module)


def _unwrap(module: Any) -> None:
    """Replace peft's layers by those that they wrap."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(module)
    del module.peft_config
    module._hf_peft_config_loaded = False
