"""The inputs of a training run, in stages: read, check, bank, encode, conditions, prompts, validators, targets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from difftuning_control.data.bank import KnowledgeBank
from difftuning_control.data.bank_draft import BankDraft
from difftuning_control.data.bank_growth import grown
from difftuning_control.data.batches import TargetSet
from difftuning_control.data.buckets import Bucket, describe, into_buckets
from difftuning_control.data.control_spec import Conditioner
from difftuning_control.data.embeddings import cached_embeddings
from difftuning_control.data.examples import ImageData
from difftuning_control.data.framing import Framing
from difftuning_control.data.labels import begin_label_space
from difftuning_control.data.latents import LatentMoments, Part, cached_moments, part_of
from difftuning_control.data.masks import loss_weights, out_of_sight
from difftuning_control.data.prepare import (
    cache_folder,
    encoded,
    hold_out,
    prepare_bank,
    resolution_of,
    silent,
    sizes_of,
)
from difftuning_control.data.stream_batches import empty_targets
from difftuning_control.evaluation.losses import BandValidator
from difftuning_control.families.prompts import PromptEmbeddings, cut_note
from difftuning_control.objective.batch import LatentBatch
from difftuning_control.objective.difftuning import DiffTuningObjective
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.identity import rows_of_step
from difftuning_control.runs.record import read_run
from difftuning_control.system.processes import Share
from difftuning_control.system.terminal import activity, progress
from difftuning_control.training.control_inputs import ControlInputs, prepare_control
from difftuning_control.training.phases import Phases
from difftuning_control.training.pictures import RunPictures, check_pictures, read_pictures, sample_prompts
from difftuning_control.training.run_bank import may_grow

if TYPE_CHECKING:
    from accelerate import Accelerator

    from difftuning_control.data.stream import Stream
    from difftuning_control.families.family import Family


@dataclass(frozen=True)
class TrainingInputs:
    """Everything a run reads. `validation` maps target and bank to their validators; `held_out` is the part of
    `all_held_out` that they see."""

    data: ImageData
    held_out: ImageData
    targets: TargetSet
    embeddings: PromptEmbeddings
    bank: KnowledgeBank | None
    validation: dict[str, BandValidator]
    sample_prompts: list[str]
    framing: Framing
    all_held_out: ImageData
    control: ControlInputs | None = None
    stream: Stream | None = None
    buckets: list[TargetSet] | None = None  # all the targets by shape; `targets` are the fullest bucket then
    bucketing: dict[str, Any] | None = None  # see `buckets.describe`

    @property
    def resolution(self) -> int:
        """The side of the pictures in pixels, or of the square with their area."""
        return self.framing.resolution


def prepare_inputs(
    recipe: Recipe,
    family: Family,
    objective: DiffTuningObjective,
    accelerator: Accelerator,
    conditioner: Conditioner | None = None,
    tell: Callable[[str], object] = silent,
    phases: Phases | None = None,
    kept: ExitStack | None = None,
) -> TrainingInputs:
    """Read, check, encode and cache everything; build the bank if it is wanted and not there.

    Args:
        conditioner: of the ControlNet that is to be trained.
        tell: is given lines on what was left out of the data, and of prompts.
        phases: count what encoding and the bank take.
        kept: keeps open what draws the bank while training begins, where the run can do so; drawn whole when None.

    Raises:
        UserError: for whatever is wrong with the data, the captions, the conditions or the bank.
    """
    phases = phases or Phases()
    framing = Framing.of(recipe.data, resolution_of(family, recipe.data))
    with phases("encode"):
        size = _bank_size(recipe, accelerator.num_processes)
        said: list[str] = []
        with activity("reading pictures", accelerator.is_main_process):
            pictures = read_pictures(recipe, family, said.append, size)
        for line in said:  # not into the middle of a line
            tell(line)
        if note := cut_note(family, recipe.training.sample_prompts, "prompts of training.sample_prompts"):
            tell(note)
        check_pictures(recipe, family, pictures, conditioner)
    grow = None
    if kept is not None and may_grow(recipe, accelerator.num_processes):
        show = accelerator.is_main_process
        grow = partial(grown, kept=kept, around=partial(phases, "bank"), show=show)
    with phases("bank"):
        bank = _retained_bank(recipe, family, pictures, framing, accelerator, tell, size, grow)
    with phases("encode"):
        encoding = _encode(recipe, family, pictures, framing, accelerator)
        control = None
        if conditioner is not None:
            control = prepare_control(
                recipe,
                family,
                conditioner,
                encoding.buckets,
                pictures.held_out,
                pictures.all_held_out,
                bank,
                encoding.cache,
                accelerator,
            )
        samples = sample_prompts(recipe, pictures, len(control.shown) if control is not None else None)
        embeddings = _embed(family, pictures, bank, control, samples, encoding.cache, accelerator)
    trained, validation = _validators(recipe, family, objective, encoding, embeddings, bank, control)
    sets = _target_sets(family, framing, pictures, encoding, control)
    for targets in sets:
        for line in out_of_sight(targets.names, targets.loss_weights, recipe.data.outside_mask):
            tell(line)
    bucketed = recipe.data.buckets and pictures.stream is None
    return TrainingInputs(
        pictures.data,
        pictures.held_out,
        sets[0],
        embeddings,
        trained,
        validation,
        samples,
        framing,
        pictures.all_held_out,
        control,
        pictures.stream,
        sets if bucketed else None,
        describe(encoding.buckets) if bucketed else None,
    )


# --- bank, latents and prompts --------------------------------------------------------------------------------------


def _retained_bank(
    recipe: Recipe,
    family: Family,
    pictures: RunPictures,
    framing: Framing,
    accelerator: Accelerator,
    tell: Callable[[str], object],
    size: int,
    grow: Callable[[BankDraft], KnowledgeBank] | None,
) -> KnowledgeBank | None:
    """The knowledge bank, drawn before the model is given the data's own classes, and as it is retained after that."""
    bank = None
    if recipe.tuning.retention_ratio > 0 and not recipe.uses_bank and recipe.bank.path is None:
        tell(
            "no bank is drawn: retention asks the pretrained model on the pictures; what is forgotten is then not "
            "measured while training"
        )
    if recipe.uses_bank or recipe.bank.path is not None:
        captions, side = pictures.captions, framing.resolution
        bank = prepare_bank(family, recipe.bank, recipe.data, captions, side, accelerator, tell, size, grow)
    return begin_label_space(family, recipe, pictures.data, bank)


def _bank_size(recipe: Recipe, processes: int) -> int:
    """How many samples a bank of size auto has; a run that is resumed, with another length perhaps, keeps its own."""
    record = read_run(Path(recipe.output)) if recipe.training.resume else None
    before = record.bank.size if record is not None and record.bank is not None else None
    return before or recipe.bank_size(rows_of_step(recipe, processes))


@dataclass(frozen=True)
class _Encoding:
    """The pictures by frame with the moments of each bucket, and the held-out ones as rows to measure on."""

    buckets: list[Bucket]
    moments: list[LatentMoments]
    held_out: Part
    cache: Path


def _encode(
    recipe: Recipe, family: Family, pictures: RunPictures, framing: Framing, accelerator: Accelerator
) -> _Encoding:
    """The latents of all pictures; of a stream, those that are held out."""
    cache, share = cache_folder(recipe.data), Share.of(accelerator)
    buckets = into_buckets(family, recipe.data, pictures.data, framing)
    moments = []
    total = len(pictures.data) + len(pictures.held_out)
    with progress(total, "encoding pictures", accelerator.is_main_process) as advance:
        if pictures.stream is None:
            moments = [cached_moments(family, b.data, b.framing, cache, advance, share=share) for b in buckets]
        held_out = encoded(family, pictures.held_out, framing.resolution, cache, advance, share)
    return _Encoding(buckets, moments, held_out, cache)


def _embed(
    family: Family,
    pictures: RunPictures,
    bank: KnowledgeBank | None,
    control: ControlInputs | None,
    samples: list[str],
    cache: Path,
    accelerator: Accelerator,
) -> PromptEmbeddings:
    """The embeddings of every prompt that the run knows beforehand."""
    prompts = [
        *([*pictures.captions, *pictures.untriggered] if pictures.stream is None else []),
        *pictures.held_captions,
        *(bank.prompts if bank is not None else []),
        *samples,
        *(control.probe.prompts if control is not None and control.probe is not None else []),
    ]
    with progress(len(set(prompts) | {""}), "encoding prompts", accelerator.is_main_process) as advance:
        return cached_embeddings(family, prompts, cache, advance, share=Share.of(accelerator))


# --- validators and targets -----------------------------------------------------------------------------------------


def _validators(
    recipe: Recipe,
    family: Family,
    objective: DiffTuningObjective,
    encoding: _Encoding,
    embeddings: PromptEmbeddings,
    bank: KnowledgeBank | None,
    control: ControlInputs | None,
) -> tuple[KnowledgeBank | None, dict[str, BandValidator]]:
    """The part of the bank that is trained on, and the validators of held-out pictures and bank items."""
    validation = {}
    if encoding.held_out.prompts:
        rows = control.rows_of_held_out() if control is not None else {}
        validation["target"] = _validator(family, objective, encoding.held_out, embeddings, rows, False)
    if bank is not None:
        bank, kept = hold_out(bank, recipe.training.validation_size)
        rows = control.rows_of_bank(len(kept)) if control is not None else {}
        retained = part_of(kept, kept.retained_prompts(recipe.measured_prompts))
        validation["bank"] = _validator(family, objective, retained, embeddings, rows, True)
    return bank, validation


def _validator(
    family: Family,
    objective: DiffTuningObjective,
    part: Part,
    embeddings: PromptEmbeddings,
    more: dict[str, torch.Tensor],
    retention: bool,
) -> BandValidator:
    conditioning = embeddings.rows(part.prompts) | more
    if part.sizes is not None:
        conditioning["sizes"] = part.sizes
    roles = torch.full((len(part.latents),), retention)
    return BandValidator(family, objective, LatentBatch(part.latents[:], conditioning, roles, [], part.loss_weights))


def _target_sets(
    family: Family, framing: Framing, pictures: RunPictures, encoding: _Encoding, control: ControlInputs | None
) -> list[TargetSet]:
    """The rows to tune on of each bucket; of a stream only their shape is known."""
    if pictures.stream is not None:
        return [empty_targets(family, framing)]
    sets = []
    for number, (bucket, moments) in enumerate(zip(encoding.buckets, encoding.moments)):
        examples = bucket.data.examples
        conditions = control.targets[number] if control is not None else None
        sizes = sizes_of(family, bucket.data, bucket.framing)
        captions, names = [e.caption for e in examples], [e.name for e in examples]
        known = list(map(pictures.captioning.untriggered, captions))
        weights = loss_weights(bucket.data, bucket.framing, moments.mean.shape[2:])
        sets.append(TargetSet(moments, captions, names, conditions, sizes, known, weights))
    return sets
