"""What an export consists of, by method: modules, a LoRA's layers, a ControlNet with its spec, a source beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from difftuning_control.adapters.attached import denoiser_of, merge_adapter
from difftuning_control.adapters.files import LORA_FILE
from difftuning_control.adapters.kinds import ADAPTER
from difftuning_control.adapters.loading import load_adapter
from difftuning_control.adapters.snapshot import tuned_modules
from difftuning_control.adapters.source import save_difference
from difftuning_control.adapters.tuning import ControlNetTuning, FullTuning, adapter_result
from difftuning_control.data.control_spec import ControlSpec
from difftuning_control.data.labels import as_pretrained
from difftuning_control.errors import UserError
from difftuning_control.families.loading import load_controlnet, load_family
from difftuning_control.families.older_form import write_older_form
from difftuning_control.pipelines.registry import BY_STOCK
from difftuning_control.runs.finished import check_base, weights_of
from difftuning_control.runs.kept import place_of_run, step_folder
from difftuning_control.runs.places import need_places
from difftuning_control.system.durable import write_json, write_text
from difftuning_control.system.tensors import cast_tensors, read_tensors, set_metadata, write_tensors
from difftuning_control.system.text import portable_name
from difftuning_control.verbs.export.card import Parts
from difftuning_control.verbs.export.lora_formats import (
    comfyui_tensors,
    encoder_tensors,
    kohya_tensors,
    lora_layers,
)
from difftuning_control.verbs.export.tool_metadata import published_as, tool_metadata

if TYPE_CHECKING:
    from difftuning_control.families.family import Family
    from difftuning_control.recipe.recipe import Recipe
    from difftuning_control.recipe.requests import ExportRequest
    from difftuning_control.runs.record import RunRecord

SOURCE_FILE = "source_difference.safetensors"

NOTE = "  # noqa: F401 for custom_pipeline="
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_parts(request: ExportRequest, record: RunRecord, recipe: Recipe, folder: Path) -> Parts:
    """Write all of an export but its card and its `export.json` into an empty folder.

    Raises:
        UserError: if the base is not the one that the run was tuned from, a format has no name for a layer, or there
            is no drop-in for the pipeline.
    """
    if request.format != "diffusers":
        return _write_lora_file(request, record, recipe, folder)
    write = {"lora": _write_lora, "full": _write_full, "controlnet": _write_controlnet}[recipe.method]
    pipe = write(request, record, recipe, folder)
    stock = type(pipe).__name__
    if request.pipeline == "difftuning" and stock not in BY_STOCK:
        raise UserError(f"there is no drop-in for the {stock} of the run {request.run}; give --pipeline stock.")
    ours = BY_STOCK[stock] if request.pipeline == "difftuning" else None
    if ours is not None:
        write_text(folder / f"{ours.file}.py", f"from difftuning_control.pipelines import {ours.name}{NOTE}\n")
    for config in folder.rglob("config.json"):
        _amend(config)
    component, denoiser = denoiser_of(pipe)
    if request.base == "copied":
        whole = request.source_unet == "whole"
        source = {f"source_{component}": ["diffusers", type(denoiser).__name__]} if whole else {}
        _amend(
            folder / "model_index.json",
            **({"_class_name": [ours.file, ours.name]} if ours is not None else {}),
            **source,
        )
    controlnet = type(pipe.controlnet).__name__ if recipe.method == "controlnet" else None
    absent = tuple(n for n in ("text_encoder_3", "tokenizer_3") if getattr(pipe, n, pipe) is None)
    return Parts(stock, ours, controlnet, None, component, absent)


def _checked_base(record: RunRecord, recipe: Recipe, run: str) -> Family:
    """The base in float32, which is compared in the precision that the run's fingerprints were taken in."""
    dtype = getattr(torch, record.dtype_name)
    model = recipe.model
    need_places(record, run, ("model",))
    family = load_family(model.id, dtype, model.variant, quantization=model.quantization)
    check_base(family, record, run)
    exact = dtype == torch.float32 and model.quantization is None
    return family if exact else load_family(model.id, torch.float32, model.variant)


def _write_lora_file(request: ExportRequest, record: RunRecord, recipe: Recipe, folder: Path) -> Parts:
    base = _checked_base(record, recipe, request.run)
    load_adapter(base.pipe, Path(request.run) / LORA_FILE)
    layers = lora_layers(base.denoiser, ADAPTER)
    encoders = {n: lora_layers(m, ADAPTER) for n, m in tuned_modules(base.pipe).items() if n != base.component}
    kohya = request.format == "kohya"
    tensors = (kohya_tensors if kohya else comfyui_tensors)(layers, base.denoiser)
    tensors |= encoder_tensors(encoders, base.pipe, kohya)
    place, step = place_of_run(Path(request.run).resolve())
    name = portable_name(f"{place.name}{'' if step is None else f'-{step_folder(step)}'}") + ".safetensors"
    dtype = request.torch_dtype or torch.float32
    scaled = cast_tensors({k: v for k, v in tensors.items() if v.ndim}, dtype)
    write_tensors(folder / name, tensors | scaled, {"format": "pt"})
    set_metadata(folder / name, tool_metadata(base, record, tensors, Path(name).stem))
    published = published_as(base)
    network = published.network if published is not None else None
    return Parts(type(base.pipe).__name__, None, None, name, base.component, network=network)


def _write_lora(request: ExportRequest, record: RunRecord, recipe: Recipe, folder: Path) -> Any:
    base, run = _checked_base(record, recipe, request.run), Path(request.run)
    pipe = base.pipe
    if request.base == "copied":
        dtype = request.torch_dtype or _stored_dtype(base.denoiser, recipe.model.variant)
        if request.adapter == "fused":
            load_adapter(pipe, request.run)
            merge_adapter(pipe)
        pipe.to(dtype)
        base.save_pipeline(folder)
    if request.adapter == "separate":
        result = run / adapter_result(recipe.adapter)
        from difftuning_control.families.tunable import CLASSES_FILE  # and with it diffusers

        beside = [run / CLASSES_FILE] if (run / CLASSES_FILE).exists() else []
        for file in [*beside, *(sorted(result.iterdir()) if result.is_dir() else [result])]:
            target = folder / file.relative_to(run)
            target.parent.mkdir(exist_ok=True)
            if request.torch_dtype is None or file.suffix != ".safetensors":
                shutil.copyfile(file, target)
            else:
                _cast_file(file, target, request.torch_dtype)
    return pipe


def _write_controlnet(request: ExportRequest, record: RunRecord, recipe: Recipe, folder: Path) -> Any:
    base = _checked_base(record, recipe, request.run)
    source, place = weights_of(request.run, ControlNetTuning.result), folder / ControlNetTuning.result
    spec = ControlSpec.load(source)
    base.controlnet = load_controlnet(base, str(source))
    base.controlnet.to(request.torch_dtype or _stored_dtype(base.controlnet))
    pipe = base.control_pipeline()
    if request.base == "copied":
        base.pipe.to(request.torch_dtype or _stored_dtype(base.denoiser, recipe.model.variant))
        pipe.save_pretrained(folder, safe_serialization=True)
        write_older_form(folder)
    else:
        base.save_controlnet(place, base.controlnet)
    spec.save(place)
    return pipe


def _write_full(request: ExportRequest, record: RunRecord, recipe: Recipe, folder: Path) -> Any:
    tuned = load_family(str(weights_of(request.run, FullTuning.result)))
    dtype = request.torch_dtype or _stored_dtype(tuned.denoiser)
    tuned.pipe.to(dtype)
    tuned.save_pipeline(folder)
    if request.source_unet != "none":
        base = _checked_base(record, recipe, request.run)
        source = base.denoiser.to(dtype)
        with as_pretrained(base, record.classes):
            if request.source_unet == "whole":
                place = folder / f"source_{denoiser_of(tuned.pipe)[0]}"
                source.save_pretrained(place, safe_serialization=True)
            else:
                kept = torch.float32 if request.dtype == "float32" else torch.float16
                save_difference(tuned.denoiser, source, folder / SOURCE_FILE, kept)
    return tuned.pipe


def _stored_dtype(module: Any, variant: str | None = None) -> torch.dtype:
    """The precision in which a model's weights lie on disk, by the first of its floating-point tensors."""
    place = Path(module.config._name_or_path)
    names = [f"diffusion_pytorch_model{v}{shard}" for v in (f".{variant}", "") for shard in ("", "-*")]
    for path in (path for name in names for path in sorted(place.glob(f"{name}.safetensors"))):
        with safe_open(path, "pt") as file:
            dtypes = (file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118
            if (dtype := next((DTYPES[d] for d in dtypes if d in DTYPES), None)) is not None:
                return dtype
    return torch.float32


def _cast_file(source: Path, target: Path, dtype: torch.dtype) -> None:
    """A safetensors file in another precision, its metadata kept."""
    tensors = read_tensors(source)
    assert tensors is not None
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    write_tensors(target, cast_tensors(tensors, dtype), metadata)
    set_metadata(target, {})


def _amend(path: Path, **changes: Any) -> None:
    """Change a configuration, and take out of it where its model lay."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values.pop("_name_or_path", None)
    write_json(path, values | changes)
