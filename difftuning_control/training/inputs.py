"""The inputs of a training run: pictures, cached latents and embeddings, the knowledge bank, validators."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from difftuning_control.data.bank import KnowledgeBank
from difftuning_control.data.batches import TargetSet
from difftuning_control.data.buckets import describe, into_buckets
from difftuning_control.data.control_spec import Conditioner
from difftuning_control.data.embeddings import cached_embeddings
from difftuning_control.data.examples import ImageData
from difftuning_control.data.framing import Framing
from difftuning_control.data.labels import begin_label_space
from difftuning_control.data.latents import Part, cached_moments, part_of
from difftuning_control.data.prepare import (
    cache_folder,
    check_captions,
    encoded,
    hold_out,
    prepare_bank,
    read_data,
    read_stream,
    resolution_of,
    sizes_of,
)
from difftuning_control.errors import UserError
from difftuning_control.evaluation.losses import BandValidator
from difftuning_control.families.prompts import PromptEmbeddings
from difftuning_control.objective.batch import LatentBatch
from difftuning_control.objective.difftuning import DiffTuningObjective
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.system.processes import Share
from difftuning_control.system.terminal import progress
from difftuning_control.training.control_inputs import ControlInputs, check_control, prepare_control

if TYPE_CHECKING:
    from accelerate import Accelerator

    from difftuning_control.data.stream import Stream
    from difftuning_control.evaluation.features import Features
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
    resolution: int
    all_held_out: ImageData
    control: ControlInputs | None = None
    stream: Stream | None = None
    buckets: list[TargetSet] | None = None  # all the targets by shape; `targets` are the fullest bucket then
    bucketing: dict[str, Any] | None = None  # see `buckets.describe`


def prepare_inputs(
    recipe: Recipe,
    family: Family,
    objective: DiffTuningObjective,
    accelerator: Accelerator,
    conditioner: Conditioner | None = None,
) -> TrainingInputs:
    """Read, check, encode and cache everything; build the bank if it is wanted and not there.

    Args:
        conditioner: of the ControlNet that is to be trained.

    Raises:
        UserError: for whatever is wrong with the data, the captions, the conditions or the bank.
    """
    show, share = accelerator.is_main_process, Share.of(accelerator)
    resolution = resolution_of(family, recipe.data)
    size, stream = recipe.training.validation_size, None
    if recipe.data.stream:
        stream, data, all_held_out = read_stream(recipe, family)
    else:
        data, all_held_out = read_data(recipe)
    held_out = all_held_out.sample(size)
    check_captions(family, recipe, data, all_held_out)
    check_gates(recipe, data, all_held_out)
    if conditioner is not None:
        check_control(recipe, conditioner, all_held_out)
    captions = [e.caption for e in data.examples] if stream is None else stream.captions(recipe.bank.size)
    held_captions = [e.caption for e in held_out.examples]
    bank = None
    if recipe.uses_bank or recipe.bank.path is not None:
        bank = prepare_bank(family, recipe.bank, recipe.data, captions, resolution, accelerator)
    bank = begin_label_space(family, recipe, data, bank)
    framing = Framing(resolution, recipe.data.flip, recipe.data.crops)
    buckets = into_buckets(family, recipe.data, data, resolution)
    cache = cache_folder(recipe.data)
    with progress(len(data) + len(held_out), "encoding pictures", show) as advance:
        if stream is None:
            moments = [cached_moments(family, b.data, b.framing, cache, advance, share=share) for b in buckets]
        held = encoded(family, held_out, resolution, cache, advance, share)
    control = None
    if conditioner is not None:
        control = prepare_control(
            recipe, family, conditioner, buckets, held_out, all_held_out, bank, cache, accelerator
        )
    samples = recipe.training.sample_prompts or list(dict.fromkeys(held_captions + captions))[:6]
    if control is not None:
        samples = (held_captions or captions)[: len(control.shown)]
    drawn = control.probe.prompts if control is not None and control.probe is not None else []
    prompts = (
        (captions if stream is None else [])
        + held_captions
        + (bank.prompts if bank is not None else [])
        + samples
        + drawn
    )
    unique = len(set(prompts) | {""})
    with progress(unique, "encoding prompts", show) as advance:
        embeddings = cached_embeddings(family, prompts, cache, advance, share=share)

    validation = {}
    if held_captions:
        rows = control.rows_of_held_out() if control is not None else {}
        validation["target"] = _validator(family, objective, held, embeddings, rows, False)
    if bank is not None:
        bank, kept = hold_out(bank, size)
        rows = control.rows_of_bank(len(kept)) if control is not None else {}
        retained = part_of(kept, kept.retained_prompts(recipe.tuning.retention_prompts))
        validation["bank"] = _validator(family, objective, retained, embeddings, rows, True)
    if stream is not None:
        from difftuning_control.data.stream_batches import empty_targets

        targets = empty_targets(family, framing)
        return TrainingInputs(
            data, held_out, targets, embeddings, bank, validation, samples, resolution, all_held_out, stream=stream
        )
    sets = []
    for number, bucket in enumerate(buckets):
        examples = bucket.data.examples
        made = control.targets[number] if control is not None else None
        sizes = sizes_of(family, bucket.data, bucket.framing)
        sets.append(TargetSet(moments[number], [e.caption for e in examples], [e.name for e in examples], made, sizes))
    found = TrainingInputs(
        data, held_out, sets[0], embeddings, bank, validation, samples, resolution, all_held_out, control
    )
    return replace(found, buckets=sets, bucketing=describe(buckets)) if recipe.data.buckets else found


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
    batch = LatentBatch(part.latents[:], conditioning, torch.full((len(part.latents),), retention))
    return BandValidator(family, objective, batch)


def check_gates(recipe: Recipe, data: ImageData, held_out: ImageData) -> None:
    """Refuse before training what could not be judged after it.

    Raises:
        UserError: if too few pictures are held out, some of them are tuned on too, or the features are not at hand.
    """
    gates = recipe.gates
    if not gates.draws:
        return
    from difftuning_control.evaluation.features import load_features
    from difftuning_control.evaluation.figures import check_held_out

    check_held_out(held_out)
    shared = {e.digest for e in data.examples} & {e.digest for e in held_out.examples}
    if shared:
        raise UserError(
            f"{len(shared)} of the {len(held_out)} held-out pictures are tuned on too, and gates are judged on others; "
            "take the copies out, or leave the gates out."
        )
    _: Features = load_features(gates.features)
