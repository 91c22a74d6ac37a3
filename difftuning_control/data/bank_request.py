"""The bank that a recipe asks for: as many items as it names, or as the run needs, or as the bank has that is there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftuning_control.data.bank import BankRequest
from difftuning_control.data.bank_prompts import spread_prompts
from difftuning_control.recipe.inputs import BankConfig

if TYPE_CHECKING:
    from difftuning_control.families.family import Family


def request_of(
    family: Family, config: BankConfig, path: Path | None, prompts: list[str], resolution: int, size: int
) -> BankRequest:
    """The bank that is wanted; of size auto it is one that lies at `path`, where its other settings are these.

    Args:
        prompts: all that it may be drawn for.
        size: where the recipe's is auto and no bank lies there.
    """
    count = size if config.size == "auto" else config.size
    request = BankRequest(
        tuple(prompts), count, config.guidance_scale, config.steps, resolution, config.seed, config.solver
    )
    if config.size != "auto":
        return request
    there = _identity_in(path) if path is not None else None
    if there is not None:
        request = replace(request, size=there["size"])
        if there["prompts"] == request.identity(family)["prompts"]:
            return request
    return replace(request, prompts=spread_prompts(request.prompts, request.size))


def _identity_in(folder: Path) -> dict[str, Any] | None:
    """What the items of a complete bank depend on, see `BankRequest.identity`; None where there is no such bank."""
    try:
        identity = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["identity"]
        return identity if isinstance(identity["size"], int) and "prompts" in identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
