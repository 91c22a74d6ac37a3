"""What a run writes down so that it can be verified: the SHA-256 of each file that went in and of each that came out.

sources         in the record: the base's files, those of a ControlNet to start from, the file of a measured schedule,
                the weights that training began from
inputs.jsonl    one line a picture: its bytes, its caption, its condition
outputs, files  in the record: the result, and all else that the run left in its folder
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from difftuning_control.runs.card import is_hub_id, model_card
from difftuning_control.runs.record import RECORD, RunRecord
from difftuning_control.runs.record_sections import Source
from difftuning_control.runs.start import start_of
from difftuning_control.runs.votes import VOTES
from difftuning_control.system.digests import digest_of_file
from difftuning_control.system.durable import AUDIT, write_text

if TYPE_CHECKING:
    from difftuning_control.data.examples import ImageData
    from difftuning_control.recipe.recipe import Recipe

INPUTS = "inputs.jsonl"
TRAIN, HELD_OUT = "train", "held_out"
KINDS = {".safetensors", ".json", ".txt", ".model"}  # of what is read of a model; nothing pickled ever is
APART = (RECORD, AUDIT, VOTES)  # the first two tell of all others, and people add to the last
UNTOLD = ("logs", "checkpoint-")  # trackers go on writing, and checkpoints are checked when they are loaded


def digest_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- what goes in ---------------------------------------------------------------------------------------------------


def sources_of(recipe: Recipe) -> dict[str, Source]:
    """Name, revision and hashed files of what a run reads beside its data and its bank."""
    places = {"base": recipe.model.id}
    if recipe.method == "controlnet" and recipe.control.init is not None:
        places["controlnet"] = recipe.control.init
    if recipe.tuning.schedule.file is not None:
        places["schedule"] = recipe.tuning.schedule.file
    sources = {}
    for name, place in places.items():
        folder = place_of(place)
        hashed = None if folder is None else {n: digest_of_file(p) for n, p in source_files(folder)}
        revision = folder.name if folder is not None and is_hub_id(place) else None
        sources[name] = Source(id=place, revision=revision, files=hashed)
    if recipe.training.begin_from is not None:
        files = {n: digest_of_file(p) for n, p in start_of(recipe.training.begin_from).files()}
        sources["begin"] = Source(id=recipe.training.begin_from, files=files)
    return sources


def place_of(name: str, revision: str | None = None) -> Path | None:
    """Where a model, or a file, lies on this machine: of a Hub id its snapshot in the cache; None where it is not.

    Args:
        revision: the commit of the snapshot.
    """
    if name == "embedded":
        from difftuning_control.families.loading import embedded_model  # saves torch where files are hashed

        return embedded_model()
    if not is_hub_id(name):
        path = Path(name).expanduser()
        return path if path.exists() else None
    from huggingface_hub import snapshot_download  # saves it for models that are folders

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or not that revision
        return None


def source_files(place: Path) -> Iterator[tuple[str, Path]]:
    """Names and paths of the files that may be read of a model's directory; of a file itself.

    Of a pipeline these are its index and what lies in the folders of its components, whichever variant is loaded.
    """
    if place.is_file():
        yield place.name, place
        return
    folders = [place]
    index = place / "model_index.json"
    if index.is_file():
        yield index.name, index
        values = json.loads(index.read_text(encoding="utf-8"))
        folders = [place / n for n, v in sorted(values.items()) if n != "safety_checker" and isinstance(v, list)]
    for folder in folders:
        if not folder.is_dir():  # of a component that the model was saved without
            continue
        files = folder.rglob("*") if folder != place else folder.iterdir()
        for path in sorted(p for p in files if p.suffix in KINDS and p.is_file()):
            yield path.relative_to(place).as_posix(), path


def local_places(*paths: str | None) -> list[str]:
    """Those that are folders here: should they be gone later, nobody looks for data sets of their names."""
    return [p for p in paths if p is not None and (p.startswith("embedded/") or Path(p).expanduser().is_dir())]


def write_inputs(output: Path, data: ImageData, held_out: ImageData) -> str:
    """Write `inputs.jsonl` from the digests that reading the pictures has taken already; returns its SHA-256."""
    lines = []
    for part, pictures in ((TRAIN, data), (HELD_OUT, held_out)):
        for example in pictures.examples:
            line = {
                "part": part,
                "name": example.name,
                "picture": example.digest,
                "caption": digest_of_text(example.caption),
                "condition": example.condition_digest,
            }
            lines.append(json.dumps(line | ({"mask": example.mask_digest} if example.mask_digest else {})))
    write_text(output / INPUTS, "".join(line + "\n" for line in lines))
    return digest_of_file(output / INPUTS)


# --- what comes out -------------------------------------------------------------------------------------------------


def write_record(record: RunRecord, recipe: Recipe, output: Path) -> None:
    """The card and a ControlNet's report, then the record with the hashes of all files in the folder."""
    write_text(output / "README.md", model_card(recipe, record))
    if recipe.method == "controlnet":
        from difftuning_control.evaluation.report.control import (
            write_control_report,  # saves the charts of other methods
        )

        write_control_report(record, output)
    record.files = {name: digest_of_file(path) for name, path in files_of_run(output) if name not in record.outputs}
    record.write(output)


def files_of_run(output: Path) -> Iterator[tuple[str, Path]]:
    """Names and paths of the files in a run's folder that can be verified; hidden ones are of nobody's concern."""
    for place, folders, names in os.walk(output):
        folder = Path(place)
        top = folder == output
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not (top and f.startswith(UNTOLD)))
        for name in sorted(names):
            if not name.startswith(".") and not (top and name in APART):
                yield (folder / name).relative_to(output).as_posix(), folder / name
