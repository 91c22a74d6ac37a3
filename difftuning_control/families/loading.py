"""Families by pipeline class, and the loading of a model, a ControlNet or the embedded model."""

from __future__ import annotations

import importlib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from difftuning_control.errors import UserError
from difftuning_control.families.few_steps import Configs, FewSteps
from difftuning_control.families.hub import in_precision, quiet_loading
from difftuning_control.families.load_failures import EXPECTED, missing_of, model_not_loaded, not_loaded, refuse_missing
from difftuning_control.families.older_form import refuse_newer_form
from difftuning_control.recipe.inputs import ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.system.home import is_path
from difftuning_control.system.hub import hub_or_cache
from difftuning_control.system.installed import at_least
from difftuning_control.system.untrusted import refuse_pickle

if TYPE_CHECKING:
    from difftuning_control.families.family import Family

# by the pipeline's class: the module here and the class in it
FAMILIES = {
    "StableDiffusionPipeline": ("sd", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("sdxl", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("sd3", "StableDiffusion3"),
    "FluxPipeline": ("flux", "Flux"),
    "DiTPipeline": ("dit", "DiT"),
    "PixArtAlphaPipeline": ("pixart", "PixArtAlpha"),
    "PixArtSigmaPipeline": ("pixart", "PixArtSigma"),
    "SanaPipeline": ("sana", "Sana"),
    "Lumina2Pipeline": ("lumina2", "Lumina2"),
    "ZImagePipeline": ("z_image", "ZImage"),
    "QwenImagePipeline": ("qwen_image", "QwenImage"),
    "QwenImage21Pipeline": ("qwen_image21", "QwenImage21"),
    "Flux2KleinPipeline": ("flux2", "Flux2Klein"),
    "Flux2Pipeline": ("flux2", "Flux2"),
    "Krea2Pipeline": ("krea2", "Krea2"),
    "ChromaPipeline": ("chroma", "Chroma"),
    "Ideogram4Pipeline": ("ideogram4", "Ideogram4"),
}
# the first diffusers whose pipeline is the one that is followed here, where older ones are to be met
SINCE = {
    "ZImagePipeline": "0.36",
    "QwenImagePipeline": "0.37",  # before it the transformer asked for the lengths of prompts beside their mask
    "QwenImage21Pipeline": "0.42",
    "Flux2KleinPipeline": "0.37",
    "Flux2Pipeline": "0.36",
    "Krea2Pipeline": "0.39",
    "ChromaPipeline": "0.34",
    "Ideogram4Pipeline": "0.39",
}


def embedded_model() -> Path:
    """The directory of the small text-to-image model that the package carries."""
    return Path(str(resources.files("difftuning_control") / "assets" / "embedded"))


def family_of(pipe: Any) -> Family:
    """The family around a diffusers pipeline object; the pipeline is shared, not copied, and all of its models but the
    denoiser are frozen and in evaluation mode from then on.

    Raises:
        UserError: if no family knows this pipeline class, or it holds a variant that cannot be tuned.
    """
    name = next((c.__name__ for c in type(pipe).__mro__ if c.__name__ in FAMILIES), None)
    if name is None:
        raise UserError(f"a {type(pipe).__name__} cannot be tuned yet; supported: {', '.join(FAMILIES)}.")
    try:
        return _class_of(name)(pipe)
    except UserError:
        raise
    except ValueError as error:  # of the scheduler
        raise UserError(f"the model cannot be tuned: {error}") from None


def _class_of(name: str) -> type[Family]:
    """The family of a pipeline class that is known."""
    module, family = FAMILIES[name]
    return getattr(importlib.import_module(f"difftuning_control.families.{module}"), family)


def pipeline_name(model: str) -> str:
    """The class of the pipeline of `embedded`, a directory or a Hub model, of which only the index is read.

    Raises:
        UserError: as `load_family`.
    """
    return _known_class(model, _read_index(model, str(embedded_model()) if model == "embedded" else model))


def family_class(model: str) -> type[Family]:
    """The family of a model, of which only the index is read.

    Raises:
        UserError: as `load_family`.
    """
    return _class_of(pipeline_name(model))


def few_steps_of(model: str) -> FewSteps | None:
    """How a model draws that was distilled to few steps, by its configurations; None of one that was not.

    Raises:
        UserError: as `load_family`.
    """
    if model == "embedded":
        return None
    index = _read_index(model, model)
    family = _class_of(_known_class(model, index))
    from diffusers import DDIMScheduler, UNet2DConditionModel  # as in _read_index

    # of other classes too: a configuration is read by its place alone
    parts = ((DDIMScheduler, "scheduler"), (UNet2DConditionModel, family.component))
    scheduler, denoiser = (_read_part(kind, model, folder) for kind, folder in parts)
    return family.few_steps_by(Configs(model, index, scheduler, denoiser))


def _read_part(kind: Any, model: str, folder: str) -> dict[str, Any]:
    """The configuration of a part of a pipeline; empty where it cannot be read, which loading will tell of."""
    try:
        with hub_or_cache(model), quiet_loading():
            return kind.load_config(model, subfolder=folder)
    except Exception:
        return {}


def _read_index(model: str, path: str) -> dict[str, Any]:
    """The index of a pipeline in a directory or on the Hub.

    Raises:
        UserError: if there is none.
    """
    _check_directory(path)
    from diffusers import DiffusionPipeline  # saves diffusers where only a path is asked for

    try:
        with hub_or_cache(path), quiet_loading():
            return DiffusionPipeline.load_config(path)
    except Exception as error:
        raise not_loaded(f"the model {model}", path, error, EXPECTED) from None


def _known_class(model: str, index: dict[str, Any]) -> str:
    name = index.get("_class_name")
    name = name[-1] if isinstance(name, list) else name
    if name not in FAMILIES:
        what = f"is a {name}" if name else "does not say which pipeline it is (no _class_name)"
        raise UserError(f"{model} {what}, which cannot be tuned yet; supported: {', '.join(FAMILIES)}.")
    _need_pipeline(model, name)
    return name


def load_family(
    model: str,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    *,
    quantization: str | None = None,
    offload: bool = False,
) -> Family:
    """Load `embedded`, a directory, or a Hub model. Weights come from safetensors files only.

    Args:
        quantization: keep the denoiser's weights in fewer bits (float8, int8 or nf4) and compute in `dtype`.
        offload: keep the text encoders on the CPU but for the while of encoding.

    Raises:
        UserError: if it is not there, cannot be downloaded, is of no supported family, or holds only pickled weights;
            or its family cannot be quantised.
    """
    path = str(embedded_model()) if model == "embedded" else model
    index = _read_index(model, path)
    _known_class(model, index)
    _refuse_code(model, Path(path), index)
    from diffusers import DiffusionPipeline  # as in _read_index

    try:
        with hub_or_cache(path), quiet_loading():
            settings = {"variant": variant, "use_safetensors": True, "trust_remote_code": False}
            pipe = DiffusionPipeline.from_pretrained(path, **settings, **in_precision(dtype), **_left_out(index))
        refuse_newer_form(pipe, model)
    except UserError:
        raise
    except Exception as error:
        raise model_not_loaded(model, path, error, _loaded(index), variant) from None
    refuse_missing(model, pipe.components)
    family = family_of(pipe)
    family.offload = offload
    if quantization is not None:
        family.quantise(quantization)
    return family


def _refuse_code(model: str, folder: Path, index: dict[str, Any]) -> None:
    """Refuse a directory whose classes are code of its own, which diffusers before 0.36 runs without being told to.

    Raises:
        UserError: naming the file.
    """
    parts = {name: value[0] for name, value in _parts(index).items() if value}
    files = [folder / name / f"{module}.py" for name, module in parts.items() if isinstance(module, str)]
    if isinstance(name := index.get("_class_name"), list):
        files.append(folder / f"{name[0]}.py")
    if found := [file for file in files if file.is_file()]:
        raise UserError(
            f"{model} names a class in its own file {found[0].relative_to(folder)}, and code of a model is never run; "
            "give one that consists of diffusers' and transformers' classes."
        )


def _need_pipeline(model: str, name: str) -> None:
    """Refuse a family that the installed diffusers does not have.

    Raises:
        UserError: naming the version that does.
    """
    import diffusers  # which read the index

    if not at_least("diffusers", SINCE.get(name, "0")) or getattr(diffusers, name, None) is None:
        raise UserError(
            f"{model} is a {name}, which diffusers {diffusers.__version__} does not have as it is needed here; install "
            f"diffusers {SINCE[name]} or later."
        )


def _left_out(index: dict[str, Any]) -> dict[str, Any]:
    """Components that are not to be loaded: the safety checker, which judges finished pictures and has no use in
    training, and those that the model was saved without."""
    absent = [n for n, v in index.items() if n.startswith(("text_encoder", "tokenizer")) and v == [None, None]]
    checker = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}
    return checker | dict.fromkeys(absent)


def _loaded(index: dict[str, Any]) -> list[str]:
    """The parts of a pipeline that are loaded from its folders."""
    left = _left_out(index)
    return [name for name, value in _parts(index).items() if name not in left and value != [None, None]]


def _parts(index: dict[str, Any]) -> dict[str, list[Any]]:
    """The components that an index lists, with what it says of their classes."""
    return {name: value for name, value in index.items() if isinstance(value, list) and name != "_class_name"}


def load_controlnet(family: Family, path: str, dtype: torch.dtype = torch.float32) -> Any:
    """A ControlNet of the family's class from a directory, the Hub or (Z-Image, Qwen-Image) a file; safetensors only.

    Raises:
        UserError: if it is not there, or does not fit the model, with the two numbers that differ, or the family has
            none.
    """
    family.need_controlnet()
    if Path(path).is_file():
        refuse_pickle(f"the ControlNet {path}", path, "ControlNet")
        controlnet = family.controlnet_of_file(Path(path)).to(dtype)
    else:
        controlnet = load_controlnet_model(family.controlnet_class, path, dtype)
    family.check_controlnet(controlnet, path)
    return controlnet.to(family.device)


def load_controlnet_model(controlnet_class: Any, path: str, dtype: torch.dtype) -> Any:
    """A ControlNet of a class from a directory or the Hub, all of its tensors there and no others; safetensors only.

    Raises:
        UserError: if it is not there, not whole or of another class.
    """
    try:
        with hub_or_cache(path), quiet_loading():
            settings = {"use_safetensors": True, "output_loading_info": True, **in_precision(dtype)}
            controlnet, loaded = controlnet_class.from_pretrained(path, **settings)
        if absent := missing_of(controlnet):
            raise KeyError(f"{len(absent)} tensors are missing, such as {absent[0]}")
        if beyond := sorted(loaded["unexpected_keys"]):  # of a Union one; without them it is another
            name = controlnet_class.__name__
            raise KeyError(f"{len(beyond)} of its tensors are none of a {name}, such as {beyond[0]}")
    except Exception as error:
        refuse_pickle(f"the ControlNet {path}", path, "ControlNet")
        expected = "a directory with config.json and safetensors weights"
        raise not_loaded(f"the ControlNet {path}", path, error, expected) from None
    return controlnet


def _check_directory(path: str) -> None:
    folder = Path(path)
    if folder.is_file():
        refuse_pickle(f"the model {path}", path, "checkpoint")
        way = "a checkpoint as one file is opened by its pipeline's from_single_file and written by save_pretrained"
        more = f"; {way}, and a LoRA is named by --from" if folder.suffix == ".safetensors" else ""
        raise UserError(
            f"the model {path} is a file; expected a diffusers directory (with model_index.json) or a Hub id{more}."
        )
    if (folder / "modular_model_index.json").exists() and not (folder / "model_index.json").exists():
        raise UserError(
            f"the model {path} is a modular pipeline, which cannot be tuned yet; supported: {', '.join(FAMILIES)}."
        )
    if folder.is_dir() and not (folder / "model_index.json").exists():
        raise UserError(f"the model directory {path} has no model_index.json; expected a saved diffusers pipeline.")
    if not folder.exists() and is_path(path):
        raise UserError(
            f"the model directory {path} does not exist; give a diffusers directory, a Hub id or `embedded`."
        )


DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def base_dtype(recipe: Recipe) -> torch.dtype:
    """Full weights train in float32; under a LoRA or a ControlNet the frozen base can lie in the lower precision."""
    return torch.float32 if recipe.method == "full" else DTYPES[recipe.training.mixed_precision]


def load_base(recipe: Recipe) -> Family:
    """The model that a recipe tunes, as it tunes it, on the CPU.

    Raises:
        UserError: as `load_family`, and where all weights of a base are to train that was saved in fewer bits.
    """
    if recipe.method == "full":
        _refuse_quantised(recipe.model.id)
    return load_model(recipe.model, base_dtype(recipe))


def _refuse_quantised(model: str) -> None:
    if model == "embedded":
        return
    component = family_class(model).component
    from diffusers import UNet2DConditionModel  # as in few_steps_of

    kept = _read_part(UNet2DConditionModel, model, component).get("quantization_config")
    if kept:
        how = kept.get("quant_method") or "fewer bits"
        raise UserError(
            f"the {component} of {model} was saved quantised ({how}), and method full trains all of its weights; give "
            "the model in full precision, or train an adapter."
        )


def load_model(model: ModelConfig, dtype: torch.dtype) -> Family:
    """The model that a recipe names, on the CPU.

    Raises:
        UserError: as `load_family`.
    """
    return load_family(model.id, dtype, model.variant, quantization=model.quantization, offload=model.offload)
