"""The output folder of a run: who may write into it, and what is cleared before a new run."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from difftuning_control.data.sources import place_of_data
from difftuning_control.errors import UserError
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.kept import STEP
from difftuning_control.runs.places import KEYS, RUN, places_of
from difftuning_control.runs.record import RECORD, read_run
from difftuning_control.system.durable import discard, free, is_empty, sweep

CHECKPOINT = re.compile(r"checkpoint-(\d+)")  # folders, as those of `kept.STEP`
WRITTEN = (
    "pytorch_lora_weights.safetensors",
    "pipeline",
    "recipe.yaml",
    RECORD,
    "metrics.jsonl",
    "README.md",
    "samples",
    "logs",
    "schedule.json",
    "controlnet",
    "fidelity.json",
    "report.html",
    "adapter",
    "difffit.safetensors",
    "class_embeddings.safetensors",
    "inputs.jsonl",
    "gates",
    "votes.json",
)


def _check_output(output: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it is a run to resume or to overwrite."""
    if is_empty(output):
        return
    run = read_run(output)
    if resume and run is not None:
        return
    if run is None:
        raise UserError(f"the output {output} is not empty and holds no run; choose another folder.")
    if not overwrite:
        raise UserError(
            f"the output {output} already holds a run ({run.status}); go on with difftune resume {output}, "
            "replace it with --overwrite, or choose another folder."
        )


def refuse_unwritable(output: Path) -> None:
    """Refuse an output before the work, not after it; nothing is left there.

    Raises:
        UserError: if there is a file where it or a folder above it should be, or nothing can be written in it.
    """
    if any(p.is_file() for p in (output, *output.parents)):
        raise UserError(f"the output {output} is a file or lies below one; name a folder.")
    place = next(p for p in (output, *output.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        said = f"the output {output} cannot be written ({error.strerror})"
        raise UserError(f"{said}; mend that, or choose another folder.") from None


def data_places(recipe: Recipe) -> list[str]:
    """The folders of a recipe whose pictures are read; also banks of pictures, but not of samples."""
    named = [recipe.data.path, recipe.data.validation_path, *recipe.folders_apart]
    bank = Path(recipe.bank.path) if recipe.bank.path is not None else None
    if bank is not None and bank.is_dir() and not is_empty(bank) and not (bank / "manifest.json").exists():
        named.append(str(bank))
    return [place for place in named if place is not None]


def written_places(recipe: Recipe) -> dict[str, str]:
    """What a recipe's run writes into, by option: its output, and the cache and the bank where they are named."""
    bank = recipe.bank.path
    places = {"--output": recipe.output, "--data.cache": recipe.data.cache}
    places["--bank.path"] = bank if bank is not None and (not Path(bank).is_dir() or is_empty(Path(bank))) else None
    return {option: place for option, place in places.items() if place is not None}


def refuse_among_data(written: str | Path, data: Iterable[str | None], option: str = "--output") -> None:
    """Refuse a folder to write into that lies in a folder of pictures, where what is written would be read as data; and
    an output that holds one, which could be cleared away with it.

    Args:
        option: which names the folder.

    Raises:
        UserError: naming both.
    """
    target = Path(os.path.realpath(Path(written).expanduser()))
    for place in data:
        if place is None:
            continue
        folder = Path(os.path.realpath(place_of_data(place)))
        if not folder.exists():  # a data set of the Hub
            continue
        is_cleared = option in ("--output", "--to")
        if target.is_relative_to(folder) or (is_cleared and folder.is_relative_to(target)):
            raise UserError(
                f"{option} {written} and the data {place} lie in one another, and what a run writes is not to be taken "
                f"for data; name a folder outside of it with {option}."
            )


def refuse_places(recipe: Recipe, overwrite: bool, clears_all: bool = False) -> None:
    """Refuse what a run would write among the data that it reads, or clear away though it begins from it.

    Args:
        clears_all: of a pilot; a run leaves what it does not write itself.

    Raises:
        UserError: naming both, or what would be cleared away.
    """
    for option, place in written_places(recipe).items():
        refuse_among_data(place, data_places(recipe), option)
    if overwrite and (clears_all or not recipe.training.resume):
        _refuse_clearing_sources(recipe, clears_all)


def _refuse_clearing_sources(recipe: Recipe, clears_all: bool) -> None:
    """Refuse to overwrite an output where the model, the weights, the schedule or whatever else a run begins from would
    be cleared away.

    Raises:
        UserError: naming it.
    """
    target = Path(os.path.realpath(Path(recipe.output).expanduser()))
    for role, place in places_of(recipe).items():
        real = Path(os.path.realpath(place))
        if role in (RUN, "bank", "cache") or not real.is_relative_to(target):
            continue
        if clears_all or real == target or _is_of_a_run(target / real.relative_to(target).parts[0]):
            raise UserError(
                f"{KEYS[role]} {place} lies in the output {recipe.output}, which --overwrite clears first; choose "
                "another --output."
            )


def _is_of_a_run(entry: Path) -> bool:
    """Whether a run writes a file or folder with this name into its output."""
    return entry.name in WRITTEN or (entry.is_dir() and any(p.fullmatch(entry.name) for p in (CHECKPOINT, STEP)))


def check_folder(path: str | Path, marker: str, overwrite: bool, option: str = "--output") -> None:
    """Refuse an output folder that holds something else than an earlier result, or one that is not to be replaced.

    Args:
        marker: the file that such a result always has.
        option: which names the folder.

    Raises:
        UserError: in these cases, and if nothing can be written there.
    """
    folder = Path(path)
    refuse_unwritable(folder)
    if not folder.exists() or is_empty(folder):
        return
    if not (folder / marker).exists():
        raise UserError(f"the output {folder} is not empty and holds no {marker}; choose another folder.")
    if not overwrite:
        raise UserError(f"the output {folder} already holds {marker}; give --overwrite or another {option}.")


class OutputFolder:
    """An output folder that one run writes into; its lock goes when the process does.

    Raises:
        UserError: if another run is writing there, nothing can be written, or the folder holds something and is neither
            to be resumed nor to be overwritten.
    """

    def __init__(self, path: Path, resume: bool, overwrite: bool):
        refuse_unwritable(path)
        self.path, self._created = path, [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"the output {path} is in use by another run; wait for it, or choose another folder."
            ) from None
        try:
            _check_output(path, resume, overwrite)
        except UserError:
            self.release()
            raise

    def sweep(self) -> None:
        """Remove what a killed run left half written."""
        for folder in (self.path, self.path / "samples"):
            sweep(folder)

    def clear(self) -> None:
        """Remove what an earlier run wrote; other files are left alone."""
        self.sweep()
        # its checkpoints first and its record last: broken off, this leaves a run that can be overwritten once more
        for entry in sorted(self.path.iterdir(), key=lambda p: (p.name == RECORD, p.name)):
            if _is_of_a_run(entry):
                discard(entry) if entry.is_dir() else entry.unlink()

    def release(self) -> None:
        """Give the lock back; folders that were made for nothing go too."""
        if self._lock.is_locked:
            free(self._lock)
            self._lock.release()
        with suppress(OSError):  # the first that holds something
            for folder in self._created:
                folder.rmdir()
