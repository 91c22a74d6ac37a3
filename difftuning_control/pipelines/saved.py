"""What a saved pipeline holds: its settings, and its adapters in a folder beside its modules, on disk or on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.utils import logging
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from difftuning_control.adapters.snapshot import IN_USE, check_savable, loaded_adapters, tuned_modules
from difftuning_control.errors import UserError
from difftuning_control.pipelines.guidance import tuner_layers
from difftuning_control.pipelines.specs import snapshot_of
from difftuning_control.system.hub import hub_or_cache

ADAPTERS = "adapters"
logger = logging.get_logger(__name__)


def check_adapters(pipe: Any) -> list[str]:
    """The names of the adapters that are saved with a pipeline: those of its denoiser and its text encoders.

    Raises:
        UserError: if there is one that a saved pipeline does not hold.
    """
    modules = {name: module for name, module in pipe.components.items() if isinstance(module, nn.Module)}
    loaded = [name for name in modules.keys() - tuned_modules(pipe).keys() if tuner_layers(modules[name])]
    if loaded:
        raise UserError(
            f"an adapter is loaded in {', '.join(sorted(loaded))}, which a saved pipeline does not hold; unload it, or "
            "merge it, before saving."
        )
    return check_savable(pipe)


def unsaved_settings(pipe: Any, names: list[str]) -> dict[str, Any]:
    """The settings that have nothing to act on, without their values: with them a saved pipeline's first call fails.

    Args:
        names: of the adapters that are saved along.
    """
    tuned = pipe.extras.tuned_adapters or loaded_adapters(unwrap_module(pipe.denoiser))
    if set(tuned) & set(names):
        return {}
    unsaved: dict[str, Any] = {"adapter_schedule": None, "tuned_adapters": None}
    if pipe.source is None:
        unsaved |= {"domain_guidance": False, "unconditional_strength": None, "hand_over": None}
    unsaved = {name: value for name, value in unsaved.items() if pipe.config[name] != value}
    if unsaved:
        absent = "no tuned adapter is loaded" + (f" and no {pipe.source_name}" if pipe.source is None else "")
        logger.warning(f"not saved: {', '.join(unsaved)}, since {absent}; set_extras again after loading one.")
    return unsaved


def saved_folder(pipe: Any, names: list[str]) -> Path:
    """The folder with a pipeline's adapters, beside the modules that were loaded with it.

    Raises:
        UserError: if there is none.
    """
    beside = {Path(origin).parent: None for module in pipe.components.values() if (origin := _origin(module))}
    for folder in beside:
        if (folder / ADAPTERS / IN_USE).is_file():
            return folder / ADAPTERS
    for folder in beside:  # of a Hub repository, of which diffusers downloads the modules only
        if (fetched := _fetched(folder)) is not None:
            return fetched / ADAPTERS
    raise UserError(
        f"the pipeline was saved with the adapters {', '.join(names)}, and there is no {ADAPTERS}/{IN_USE} beside its "
        "modules; give from_pretrained saved_adapters=None, and load them yourself (load_adapter)."
    )


def _origin(module: Any) -> str | None:
    """Where a module was loaded from."""
    config = getattr(module, "config", None)
    origin = config.get("_name_or_path") if isinstance(config, dict) else getattr(config, "_name_or_path", None)
    return origin or None


def _fetched(folder: Path) -> Path | None:
    """The folder of a Hub repository's revision, with its adapters."""
    from huggingface_hub import snapshot_download  # only where something is downloaded

    if (snapshot := snapshot_of(folder)) is None:
        return None
    try:
        with hub_or_cache(snapshot.repository):
            place = Path(snapshot_download(snapshot.repository, allow_patterns=f"{ADAPTERS}/*", **snapshot.where))
    except Exception:  # no such repository, offline: all the same here
        return None
    return place if (place / ADAPTERS / IN_USE).is_file() else None
