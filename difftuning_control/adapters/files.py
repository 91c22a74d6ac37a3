"""Adapters on disk: saved in the format that diffusers or peft loads, and found and read again.

lora, dora          pytorch_lora_weights.safetensors    load_lora_weights
tlora               the same, with the ranks in its header; load_lora_weights runs it at full rank throughout
loha … ia3          adapter/ as peft writes it          PeftModel.from_pretrained on the denoiser
difffit             difffit.safetensors                 load_adapter only, which loads all the others too

Beside any of them the embeddings of a DiT's new classes, class_embeddings.safetensors, which load_adapter takes along.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from difftuning_control.adapters.kinds import ADAPTER, lora_state, own_parts
from difftuning_control.adapters.native_names import encoder_layer
from difftuning_control.errors import UserError
from difftuning_control.system.durable import write_json
from difftuning_control.system.tensors import refuse_unreadable, set_metadata, whole_tensors, write_tensors
from difftuning_control.system.untrusted import from_json, refuse_pickle

LORA_FILE = "pytorch_lora_weights.safetensors"
DIFFFIT_FILE = "difffit.safetensors"
PEFT_FOLDER, PEFT_CONFIG, PEFT_FILE = "adapter", "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # what a PeftModel calls the model inside it
HEADER = "difftuning_adapter"


# --- saving ---------------------------------------------------------------------------------------------------------


def save_peft(module: Any, folder: Path, name: str = ADAPTER) -> None:
    """A peft directory: `adapter_config.json` and `adapter_model.safetensors`."""
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in module.peft_config[name].to_dict().items()}
    tensors = get_peft_model_state_dict(module, adapter_name=name)
    write_json(folder / PEFT_CONFIG, config | {"inference_mode": True})
    write_tensors(folder / PEFT_FILE, {PEFT_PREFIX + k: v.float() for k, v in tensors.items()})


def save_difffit(module: Any, folder: Path, name: str = ADAPTER) -> None:
    """The biases, norms and scale factors of a denoiser, under its own names."""
    tensors = {k: v.float() for k, v in own_parts(module)[name].parameters.items()}
    write_tensors(folder / DIFFFIT_FILE, tensors, {HEADER: json.dumps({"kind": "difffit"})})


def save_lora(module: Any, text_encoder: Any, write: Callable[..., None], folder: Path) -> None:
    """A LoRA of any kind for `load_lora_weights`.

    Args:
        text_encoder: with a LoRA of its own, or None.
        write: a family's `save_lora`.
    """
    text: dict[str, Any] = {}
    if text_encoder is not None:
        layers, metadata = encoder_state(text_encoder)
        text = {"text_encoder_layers": layers, "text_encoder_metadata": metadata}
    write(folder, *lora_state(module), **text)
    mask = own_parts(module).get(ADAPTER)
    set_metadata(folder / LORA_FILE, {HEADER: json.dumps(mask.describe())} if mask is not None else {})


def encoder_state(encoder: Any, name: str = ADAPTER) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `lora_state` has of a text encoder, its layers by the names that every version of transformers loads."""
    tensors, config = lora_state(encoder, name)
    return {encoder_layer(encoder, key): value for key, value in tensors.items()}, config


# --- reading --------------------------------------------------------------------------------------------------------


def find_adapter(path: Path) -> Path:
    """The adapter's file, or its peft directory."""
    if path.name == PEFT_FILE and (path.parent / PEFT_CONFIG).is_file():  # which has its scale
        return path.parent
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
    if (path / "controlnet" / "config.json").exists():
        raise UserError(f"{path} holds a ControlNet and no adapter; add_control(pipe, {str(path)!r}) takes it.")
    raise UserError(
        f"{path} holds no adapter; expected the output folder of a run, a folder with {LORA_FILE}, {DIFFFIT_FILE} or "
        f"{PEFT_CONFIG}, or a .safetensors file{_files_in(path)}."
    )


def _files_in(folder: Path) -> str:
    names = sorted(p.name for p in folder.glob("*.safetensors")) if folder.is_dir() else []
    return f" such as {folder / names[0]} ({len(names)} lie there)" if names else ""


def metadata_and_shapes(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """The metadata of a safetensors file, and the shape of each tensor.

    Raises:
        UserError: if it may not be read, or is damaged.
    """
    refuse_unreadable(path)
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, shapes
    except (OSError, SafetensorError):
        raise UserError(f"{path} is damaged or no safetensors file; give a whole one.") from None


def read_adapter(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file.

    Raises:
        UserError: if it is damaged, or has values that are not finite.
    """
    tensors = whole_tensors(path)
    broken = next((name for name, tensor in tensors.items() if not tensor.float().isfinite().all()), None)
    if broken is not None:
        raise UserError(
            f"{path} has values that are not finite, such as in {broken}: what it is of had diverged; give another "
            "file, or an earlier step."
        )
    return tensors


def read_header(path: Path) -> dict[str, Any]:
    """What this package wrote into a file's header; nothing in other people's files."""
    text = metadata_and_shapes(path)[0].get(HEADER, "{}")
    try:
        header = from_json(text)
        if header.get("kind") == "tlora":
            limits, sign = [float(v) for v in header["limits"]], int(header.get("sign", 1))
            header = {"kind": "tlora", "rank": int(header["rank"]), "limits": limits, "sign": sign}
            if len(limits) >= header["rank"] or abs(sign) != 1:
                raise ValueError("more limits than ranks, or no sign")
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"the header of {path} cannot be read ({HEADER}: {text:.100}); save the adapter anew."
        ) from None
    return header
