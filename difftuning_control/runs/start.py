"""What a new run can begin from: the weights of a finished run, of a step that one kept, or an adapter of others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftuning_control.adapters.files import find_adapter
from difftuning_control.adapters.tuning import ControlNetTuning, FullTuning, adapter_result
from difftuning_control.errors import UserError
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.finished import check_base, finished_run, weights_of
from difftuning_control.runs.kept import place_of_run
from difftuning_control.runs.record import RECORD, RunRecord
from difftuning_control.system.digests import digest_of, digest_of_file

if TYPE_CHECKING:
    from difftuning_control.families.family import Family

FREE = ("dropout", "init", "text_encoder_learning_rate")  # of an adapter: what decides how it trains, not what it is


@dataclass(frozen=True)
class Start:
    """Weights to begin from.

    Args:
        place: as the recipe names it.
        record: of the run that they are of; None for an adapter that lies by itself.
    """

    place: Path
    record: RunRecord | None

    @property
    def weights(self) -> Path:
        """The file or folder that holds them."""
        if self.record is None:
            return find_adapter(self.place)
        recipe = self.record.recipe
        if recipe.method == "lora":
            return self.place / adapter_result(recipe.adapter)
        return weights_of(self.place, FullTuning.result if recipe.method == "full" else ControlNetTuning.result)

    def files(self) -> Iterator[tuple[str, Path]]:
        """Names and paths of the files that decide what a run begins from."""
        from difftuning_control.families.tunable import CLASSES_FILE  # and with it diffusers

        weights = self.weights
        top = weights if weights.is_dir() else weights.parent
        files = [weights] if weights.is_file() else []
        if weights.is_dir():
            files = [p for p in sorted(weights.rglob("*")) if p.suffix in (".safetensors", ".json") and p.is_file()]
            files = [p for p in files if p.name != "losses.json"]
        beside = top / CLASSES_FILE
        for path in [*files, *([beside] if beside.is_file() and beside not in files else [])]:
            yield path.relative_to(top).as_posix(), path

    @property
    def fingerprint(self) -> str:
        return digest_of({name: digest_of_file(path) for name, path in self.files()})


def start_of(place: str | Path) -> Start:
    """What lies at a place to begin from.

    Raises:
        UserError: if there is neither a finished run nor an adapter.
    """
    path = Path(place).expanduser()
    if not path.exists():
        raise UserError(
            f"there is nothing at {place} to begin from; give a run, RUN/step-000010 or a LoRA file, or where it was "
            "moved to, with --from."
        )
    record = finished_run(path) if (place_of_run(path)[0] / RECORD).is_file() else None
    start = Start(path, record)
    if not start.weights.exists():
        raise UserError(f"{place} no longer has its weights ({start.weights.name}); begin from another run.")
    return start


def check_start(start: Start, recipe: Recipe, family: Family) -> None:
    """Refuse weights that are not of this recipe's kind, or of another base.

    Raises:
        UserError: naming every key that differs, with both values.
    """
    if start.record is None:
        if recipe.method != "lora":
            option = "model.id" if recipe.method == "full" else "control.init"
            raise UserError(
                f"{start.place} is no run, and method {recipe.method} begins from a run; a model by itself is named "
                f"by --{option}."
            )
        return
    theirs, ours = start.record.recipe, recipe
    pairs: dict[str, tuple[Any, Any]] = {"method": (theirs.method, ours.method)}
    if ours.method == theirs.method == "lora":
        for name, value in vars(ours.adapter).items():
            if name not in FREE:
                pairs[f"adapter.{name}"] = (getattr(theirs.adapter, name), value)
        pairs["adapter.rank"] = (theirs.adapter.full_rank, ours.adapter.full_rank)
        if ours.adapter.kind == "lokr":
            pairs["adapter.rank"] = (theirs.adapter.rank, ours.adapter.rank)
        if ours.adapter.kind == "tlora":
            pairs["adapter.min_rank"] = (theirs.adapter.lowest_rank, ours.adapter.lowest_rank)
    if ours.method != "controlnet":
        pairs["tuning.label_space"] = (theirs.tuning.label_space, ours.tuning.label_space)
    differing = [f"{key} is {there} there and {here} here" for key, (there, here) in pairs.items() if there != here]
    if differing:
        raise UserError(
            f"training cannot begin from {start.place}: {'; '.join(differing)}; give the same, or leave out --from."
        )
    if start.record.may_have_dtype(family.dtype):  # the weights of another precision have other digests
        check_base(family, start.record, start.place)
