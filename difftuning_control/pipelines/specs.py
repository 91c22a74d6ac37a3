"""Where the `control_spec.json` of a ControlNet lies, on disk or on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from difftuning_control.data.control_spec import SPEC_FILE, ControlSpec
from difftuning_control.errors import UserError
from difftuning_control.system.hub import hub_or_cache


def find_spec(controlnet: Any, condition_range: tuple[float, float], missing_ok: bool = False) -> Any:
    """The `control_spec.json` beside a ControlNet's weights, in a folder or in a Hub repository.

    A ControlNet does not know which `subfolder` it was loaded from: its spec is then the one beside its own weights.

    Args:
        condition_range: what the pipeline makes of a picture, which the spec must have too.
        missing_ok: None where there is none.

    Raises:
        UserError: if there is none, or it does not belong to these weights.
    """
    origin = controlnet.config.get("_name_or_path")
    place = Path(origin) if origin and Path(origin).is_dir() else _from_hub(origin) if origin else None
    if place is not None and not (place / SPEC_FILE).is_file():
        place = _from_snapshot(place)
    if place is None and origin:
        place = _from_subfolder(origin, controlnet)
    if place is None or not (place / SPEC_FILE).is_file():
        if missing_ok:
            return None
        raise UserError(
            f"preprocess=True needs to know how conditions are made, and there is no {SPEC_FILE} beside the ControlNet "
            f"({origin or 'not loaded from a folder'}); give set_control_specs("
            "ControlSpec(…)), or prepare the condition yourself and leave preprocess out."
        )
    spec = ControlSpec.load(place)
    spec.check_range(condition_range)
    is_local = Path(origin).is_dir() and not any(p.name.startswith("models--") for p in place.parents)
    if spec.is_function and not is_local:  # what others have published must not say which code is run here
        raise UserError(
            f"the {SPEC_FILE} of {origin} on the Hub names the function {spec.annotator}, which is not run unasked; "
            "look at it, and give it yourself: set_control_specs(ControlSpec(…))."
        )
    return spec


@dataclass(frozen=True)
class Snapshot:
    """A folder in the Hub's cache.

    Args:
        repository: its id on the Hub.
        within: the folder's path in the repository.
        where: the revision and the cache, as `huggingface_hub` takes them.
    """

    repository: str
    within: Path
    where: dict[str, Any]


def snapshot_of(folder: Path) -> Snapshot | None:
    """What …/models--owner--name/snapshots/<revision>/<within> stands for; None for another folder."""
    revision = next((p for p in (folder, *folder.parents) if p.parent.name == "snapshots"), None)
    if revision is None or not revision.parents[1].name.startswith("models--"):
        return None
    repository = revision.parents[1].name.removeprefix("models--").replace("--", "/")
    where = {"revision": revision.name, "cache_dir": revision.parents[2]}
    return Snapshot(repository, folder.relative_to(revision), where)


def _from_hub(repository: str, file: str = SPEC_FILE, **where: Any) -> Path | None:
    """The snapshot folder of a Hub repository that has a spec."""
    from huggingface_hub import hf_hub_download  # only where something is downloaded

    try:
        with hub_or_cache(repository):
            return Path(hf_hub_download(repository, file, **where)).parent
    except Exception:  # no such file, no such repository, offline: all the same here
        return None


def _from_snapshot(folder: Path) -> Path | None:
    """The same for a ControlNet that came with a pipeline, of which diffusers loads only weights and configurations."""
    if (snapshot := snapshot_of(folder)) is None:
        return None
    return _from_hub(snapshot.repository, (snapshot.within / SPEC_FILE).as_posix(), **snapshot.where)


def _from_subfolder(origin: str, controlnet: Any) -> Path | None:
    """The folder within a folder or Hub repository that has a spec beside this ControlNet's weights."""
    from huggingface_hub import snapshot_download  # only where something is downloaded

    try:
        is_local = Path(origin).is_dir()
        with hub_or_cache(origin):
            within = Path(origin if is_local else snapshot_download(origin, allow_patterns=f"*/{SPEC_FILE}"))
    except Exception:  # as in `_from_hub`
        return None
    beside = [path.parent for path in sorted(within.glob(f"*/{SPEC_FILE}"))]
    return next((folder for folder in beside if _holds(folder, controlnet)), None)


def _holds(folder: Path, controlnet: Any) -> bool:
    """Whether a folder's weights are those of a model, in the model's precision."""
    files, tensors = sorted(folder.glob("*.safetensors")), controlnet.state_dict()
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name not in tensors or not _same(file.get_tensor(name), tensors[name]):
                    return False
    return bool(files)


def _same(saved: Tensor, loaded: Tensor) -> bool:
    return saved.shape == loaded.shape and torch.equal(saved.to(loaded.dtype), loaded.detach().cpu())
