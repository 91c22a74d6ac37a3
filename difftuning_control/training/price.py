"""What a run is going to take, told before it begins: forwards by phase, seconds, memory.

Forwards follow from the recipe and the number of pictures. Seconds are known where an earlier run of the same model at
the same resolution says how long a forward takes here; a small model is loaded and timed. Memory is what the weights,
their gradients and the optimizer need; activations come on top of it, as many as the batch has rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from difftuning_control.data.bank_draft import MANIFEST
from difftuning_control.data.prepare import cache_folder, read_data
from difftuning_control.errors import UserError
from difftuning_control.evaluation.forgetting import SCHEDULE_BANDS, affordable_rows
from difftuning_control.families.fitting import fitted
from difftuning_control.families.hub import best_device
from difftuning_control.families.loading import load_base, pipeline_name
from difftuning_control.objective.noise import BANDS
from difftuning_control.objective.rows import rows_of_share
from difftuning_control.pipelines.guiding import BY_CLASS
from difftuning_control.recipe.inputs import HELD_OUT
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.identity import rows_of_step
from difftuning_control.runs.record import RunRecord
from difftuning_control.runs.record_sections import PhaseCosts
from difftuning_control.training.calendar import Calendar
from difftuning_control.training.phases import PHASES, Phases
from difftuning_control.training.pictures import SHOWN
from difftuning_control.training.setup import BUDGET_POINTS, BUDGET_ROWS
from difftuning_control.training.sizes import Memory, memory_of

SMALL = 256 * 2**20  # bytes of weights up to which a model is loaded to time it


@dataclass(frozen=True)
class Pictures:
    """How many pictures a run has to tune on and held out, and how many prompts its sample grids have."""

    tuned: int
    held_out: int
    prompts: int


@dataclass(frozen=True)
class Price:
    """What a run takes.

    Args:
        recipe: with what fits the model where it named nothing.
        forwards: rows through the denoiser by phase; a row that trains is one.
        seconds: by phase; empty where no earlier run tells.
        memory: None where the model's files are not at hand.
        notes: what was said of the data, and what fits.
        bank_is_kept: whether the bank is that of an earlier run.
        timed_at: the resolution of the run whose speed the seconds are from; None where they were measured now.
    """

    recipe: Recipe
    pictures: Pictures
    forwards: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)
    memory: Memory | None = None
    notes: tuple[str, ...] = ()
    bank_is_kept: bool = False
    timed_at: int | None = None


def price_of(recipe: Recipe, earlier: Sequence[RunRecord] = ()) -> Price:
    """What a run of a recipe takes, without loading its model unless that is a small one.

    Args:
        earlier: records of runs on this machine.

    Raises:
        UserError: for whatever training would refuse before it loads the model: pictures without captions among them.
    """
    notes: list[str] = []
    recipe = fitted(recipe, notes.append)
    pipeline = pipeline_name(recipe.model.id)
    if recipe.data.stream:
        raise UserError("how many pictures a stream has is not known before it runs; difftune train says it.")
    data, held_out = read_data(recipe, notes.append)
    captions = list(dict.fromkeys(e.caption for e in (*held_out.examples, *data.examples)))
    shown = recipe.training.sample_prompts or captions[:SHOWN]
    pictures = Pictures(len(data), len(held_out), len(shown))
    alike = [record for record in earlier if _is_alike(record, recipe)]
    kept = any(_has_bank(record, recipe) for record in alike)
    forwards = planned_forwards(recipe, pictures, _is_guided(pipeline))
    if kept:
        forwards.pop("bank", None)
    timed = next((record for record in alike if record.phases), None)
    seconds = _seconds(forwards, timed.phases if timed is not None else None)
    side = timed.data.resolution if timed is not None else None
    memory = memory_of(recipe, pipeline)
    if not seconds and memory is not None and memory.denoiser + memory.others <= SMALL:
        seconds = _seconds(forwards, _measured(recipe))
    return Price(recipe, pictures, forwards, seconds, memory, tuple(notes), kept, side)


def planned_forwards(recipe: Recipe, pictures: Pictures, guided: bool = True) -> dict[str, int]:
    """Rows through the denoiser in each phase of a run, phases without any left out.

    Args:
        guided: whether a picture at a guidance above 1 takes two rows a step.
    """
    training, tuning, end = recipe.training, recipe.tuning, recipe.training.max_steps
    rows = rows_of_step(recipe, 1)
    size = recipe.bank_size(rows) if recipe.uses_bank else 0
    watched = recipe.control.fidelity
    follows = recipe.method == "controlnet" and watched.every > 0 and pictures.held_out > 0
    to_come = Calendar(recipe, follows).to_come(0, end)

    def drawn(count: int, steps: int, scale: float) -> int:
        return count * steps * (2 if scale > 1 and guided else 1)

    retained = rows_of_share(rows, tuning.retention_ratio)
    held = min(pictures.held_out, training.validation_size)
    held += max(1, min(training.validation_size, size // HELD_OUT)) if size >= 2 else size
    grids = 1 + to_come["sampling"] if training.sample_every else 0
    grid = drawn(pictures.prompts, training.sample_steps, training.sample_guidance_scale)
    probe = drawn(min(watched.size, pictures.held_out), watched.steps, watched.guidance_scale) if follows else 0
    counts = {
        "bank": drawn(size, recipe.bank.steps, recipe.bank.guidance_scale) if recipe.bank.path is None else 0,
        "analysis": _analysed(recipe, pictures, size, rows),
        "validation": held * BANDS * (1 + to_come["validation"]),
        "training": end * (rows + (retained if tuning.retention == "teacher" else 0)),
        "sampling": grids * grid + (to_come["fidelity"] + 2) * probe,  # once at the start, and once without it
    }
    return {name: counts[name] for name in PHASES if counts.get(name)}


def _analysed(recipe: Recipe, pictures: Pictures, bank: int, rows: int) -> int:
    """What measuring schedule and budget takes before the first step."""
    trained = bank - max(1, min(recipe.training.validation_size, bank // HELD_OUT)) if bank >= 2 else bank
    count = 0
    if recipe.tuning.schedule.kind == "auto" and trained:
        most = min(pictures.tuned, trained)
        count += 2 * SCHEDULE_BANDS * affordable_rows(recipe.training.max_steps, rows, most)
    if recipe.tuning.forgetting_budget is not None:
        count += BUDGET_POINTS * min(BUDGET_ROWS, trained if recipe.uses_bank else pictures.tuned)
    return count


def _is_guided(pipeline: str) -> bool:
    """Whether guidance of a pipeline is a second prediction, and not told to the model."""
    guiding = BY_CLASS.get(pipeline)
    return guiding is not None and (guiding.scale is not None or pipeline == "DiTPipeline") and not guiding.alone


# --- earlier runs ---------------------------------------------------------------------------------------------------


def _is_alike(record: RunRecord, recipe: Recipe) -> bool:
    """Whether a run's forwards took as long as those of the recipe will."""
    try:
        before = record.recipe
    except (UserError, TypeError, ValueError):  # of another version
        return False
    same = (before.model, before.training.mixed_precision, before.method) == (
        recipe.model,
        recipe.training.mixed_precision,
        recipe.method,
    )
    return same and recipe.data.resolution in (None, record.data.resolution)  # None is the model's own


def _has_bank(record: RunRecord, recipe: Recipe) -> bool:
    """Whether the recipe's bank is that of a run, which is still there."""
    bank, before = record.bank, record.recipe
    if bank is None or recipe.bank.path is not None or not (Path(bank.folder) / MANIFEST).is_file():
        return False
    of_both = [replace(data, resolution=None, cache=None) for data in (before.data, recipe.data)]
    same = before.bank == recipe.bank and of_both[0] == of_both[1]  # its prompts are the captions
    size = recipe.bank_size(rows_of_step(recipe, 1))
    return same and bank.size == size and Path(bank.folder).is_relative_to(cache_folder(recipe.data))


def _measured(recipe: Recipe) -> PhaseCosts:
    """What it takes to load a small model, and to draw two pictures in two steps."""
    counted = Phases()
    with counted("load"):
        family = load_base(recipe).to(best_device())
    side = recipe.data.resolution or family.native_resolution
    family.check_resolution(side, "data.resolution")
    for number in range(2):  # the first call is slower than those that follow
        again = Phases()
        with again.counting(family.denoiser), again("sampling"):
            generators = [torch.Generator().manual_seed(number + row) for row in range(2)]
            family.sample(["", ""], generators, steps=2, guidance_scale=1.0, resolution=side)
    return counted.costs() | again.costs()


def _seconds(forwards: dict[str, int], phases: PhaseCosts | None) -> dict[str, float]:
    """How long so many forwards take at the speed of an earlier run, by phase; loading as long as it took."""
    if not phases:
        return {}
    counted = Phases()
    counted.add(phases)
    for name, count in forwards.items():
        counted.plan(name, counted.forwards(name) + count)
    left = {name: counted.remaining(name) for name in forwards}
    known = {name: seconds for name, seconds in left.items() if seconds is not None}
    once = {name: phases[name].seconds for name in ("load", "encode") if name in phases}
    return once | known
