"""Folders of pictures that a page offers, and why a training refuses those among which the page writes."""

from __future__ import annotations

import os
from contextlib import suppress

from difftuning_control.data.images import EXTENSIONS
from difftuning_control.runs.record import RECORD
from difftuning_control.system.untrusted import is_text
from difftuning_control.verbs.ui.places import EMBEDDED, Places

SHOWN = 60  # folders that are offered
OUTPUTS = ("runs", "exports")  # folders that the page writes
SETS = ("embedded/icons", "embedded/flat")  # of the package, offered last


def picture_folders(places: Places) -> list[str]:
    """Folders with pictures below those of the page, and the sets of the package."""
    found: list[str] = []
    for root in (places.folder, *places.pictures):
        for folder in [root, *sorted(p for p in root.glob("*") if p.is_dir()), *sorted(root.glob("*/*/"))]:
            named = places.name(folder)
            is_written = named.startswith(tuple(f"{place}/" for place in OUTPUTS))
            if folder.name.startswith(".") or is_written or (named.startswith(".") and named != "."):
                continue
            with suppress(OSError):  # of a folder that cannot be read
                has_pictures = any(p.suffix.lower() in EXTENSIONS for p in folder.iterdir())
                if has_pictures and is_text(named) and not (folder / RECORD).exists():
                    found.append(named)
            if len(found) >= SHOWN:
                break
    return [*dict.fromkeys(found), *SETS]


def training_folders(places: Places) -> list[str]:
    """The same folders, those of the user first that a training takes, then those that it refuses, then the sets."""
    own = [name for name in picture_folders(places) if name not in EMBEDDED]
    return [*sorted(own, key=lambda name: why_refused(places, name) is not None), *SETS]


def why_refused(places: Places, name: str) -> str | None:
    """Why a training cannot take a folder: what the page writes would lie in it; None where it can."""
    real = os.path.realpath(places.folder / name)
    if not any((places.folder / written).is_relative_to(real) for written in OUTPUTS):
        return None
    return (
        f"what this page writes would lie among the pictures of {name}; move these into a folder of their own, such as "
        "pictures."
    )
