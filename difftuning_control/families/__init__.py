"""One file a model family; trainer, bank and analysis see only what `StableDiffusion` in `sd.py` shows."""

from __future__ import annotations

import json
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from difftuning_control.errors import UserError

if TYPE_CHECKING:
    from difftuning_control.families.sd import StableDiffusion

SUPPORTED = ("StableDiffusionPipeline",)


def embedded_model() -> Path:
    """The directory of the small text-to-image model that the package carries."""
    from importlib import resources

    return Path(str(resources.files("difftuning_control") / "assets" / "embedded"))


def family_of(pipe: Any) -> StableDiffusion:
    """The family around a diffusers pipeline object; the pipeline is shared, not copied.

    Raises:
        UserError: if no family knows this pipeline class.
    """
    from diffusers import StableDiffusionPipeline

    from difftuning_control.families.sd import StableDiffusion

    if isinstance(pipe, StableDiffusionPipeline):
        return StableDiffusion(pipe)
    raise UserError(f"a {type(pipe).__name__} cannot be tuned yet; supported: {', '.join(SUPPORTED)}.")


def load_family(model: str, dtype: torch.dtype = torch.float32, variant: str | None = None) -> StableDiffusion:
    """Load `embedded`, a directory, or a Hub model. Weights come from safetensors files only.

    Raises:
        UserError: if it is not there, cannot be downloaded, is of no supported family, or holds only pickled weights.
    """
    path = str(embedded_model()) if model == "embedded" else model
    _check_directory(path)
    from diffusers import DiffusionPipeline

    try:
        # the safety checker judges finished pictures; training has no use for it
        options: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
        name = _class_name(path)
        if name is not None and name not in SUPPORTED:
            raise UserError(f"{model} is a {name}, which cannot be tuned yet; supported: {', '.join(SUPPORTED)}.")
        with quiet_loading():
            pipe = DiffusionPipeline.from_pretrained(
                path, dtype=dtype, variant=variant, use_safetensors=True, **options
            )
    except UserError:
        raise
    except Exception as error:
        expected = "`embedded`, a diffusers directory with safetensors weights"
        raise _not_loaded(f"the model {model}", path, error, expected) from None
    return family_of(pipe)


def load_controlnet(family: StableDiffusion, path: str, dtype: torch.dtype = torch.float32) -> Any:
    """A ControlNet of the family's class from a directory or the Hub; safetensors only.

    Raises:
        UserError: if it is not there, or does not fit the model, with the two numbers that differ.
    """
    found = load_controlnet_model(family.controlnet_class, path, dtype)
    family.check_controlnet(found, path)
    return found.to(family.device)


def load_controlnet_model(controlnet_class: Any, path: str, dtype: torch.dtype) -> Any:
    """A ControlNet of a class from a directory or the Hub, all of its tensors there; safetensors only.

    Raises:
        UserError: if it is not there or not whole.
    """
    try:
        with quiet_loading():
            found = controlnet_class.from_pretrained(path, use_safetensors=True, dtype=dtype)
        absent = [name for name, parameter in found.named_parameters() if parameter.is_meta]
        if absent:
            raise KeyError(f"{len(absent)} tensors are missing, such as {absent[0]}")
    except Exception as error:
        expected = "a directory with config.json and safetensors weights"
        raise _not_loaded(f"the ControlNet {path}", path, error, expected) from None
    return found


def _not_loaded(what: str, path: str, error: Exception, expected: str) -> UserError:
    reason = textwrap.shorten(str(error), 200, placeholder=" …").rstrip(". ") or type(error).__name__
    where = "could not be loaded" if Path(path).is_dir() else "is no directory here and could not be downloaded"
    return UserError(f"{what} {where} ({reason}); expected {expected}, or a Hub id that this machine can reach.")


def best_device() -> torch.device:
    """The GPU that there is, or the CPU: where sampling and measuring happen outside of a training run."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No warnings about the safety checker and renamed arguments, no bars for each component but for downloads."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    for module in (diffusers_logging, transformers_logging):
        module.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        diffusers_logging.set_verbosity(level)
        for module in (diffusers_logging, transformers_logging):
            module.enable_progress_bar()


def _check_directory(path: str) -> None:
    folder = Path(path)
    if folder.is_file():
        raise UserError(
            f"the model {path} is a file; expected a diffusers directory (with model_index.json) or a Hub id."
        )
    if folder.is_dir() and not (folder / "model_index.json").exists():
        raise UserError(f"the model directory {path} has no model_index.json; expected a saved diffusers pipeline.")
    if not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise UserError(
            f"the model directory {path} does not exist; give a diffusers directory, a Hub id or `embedded`."
        )


def _class_name(path: str) -> str | None:
    index = Path(path) / "model_index.json"
    if not index.exists():
        return None
    name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    return name[-1] if isinstance(name, list) else name
