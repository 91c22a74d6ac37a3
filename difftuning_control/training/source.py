"""The source of a run's training rows: of pictures in one shape, in buckets, or of a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate import Accelerator

from difftuning_control.data.batches import BatchSource
from difftuning_control.data.buckets import BucketSource
from difftuning_control.data.caption_lengths import check_caption
from difftuning_control.data.stream_batches import StreamSource
from difftuning_control.objective.difftuning import DiffTuningObjective
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.training.inputs import TrainingInputs

if TYPE_CHECKING:
    from difftuning_control.data.stream import Stream
    from difftuning_control.families.family import Family


def training_source(
    recipe: Recipe,
    family: Family,
    objective: DiffTuningObjective,
    inputs: TrainingInputs,
    accelerator: Accelerator,
) -> BatchSource | BucketSource | StreamSource:
    """The rows of every step, for this process."""
    tuning, training, control = recipe.tuning, recipe.training, inputs.control
    plain = BatchSource(
        family,
        objective,
        inputs.targets,
        inputs.embeddings,
        inputs.bank,
        tuning.retention_prompts,
        tuning.prompt_dropout,
        training.batch_size,
        training.seed,
        accelerator.process_index,
        accelerator.num_processes,
        control.bank if control is not None else None,
        recipe.control.dropout,
        training.gradient_accumulation_steps,
        nothing=control.nothing if control is not None else None,
        retained=tuning.retention_rows,
    )
    if inputs.stream is not None:
        return _streamed(recipe, family, inputs, plain, inputs.stream)
    return plain if inputs.buckets is None else BucketSource(plain, inputs.buckets)


def _streamed(
    recipe: Recipe, family: Family, inputs: TrainingInputs, plain: BatchSource, stream: Stream
) -> StreamSource:
    return StreamSource(plain, stream, inputs.framing, check_caption(family, recipe.data))
