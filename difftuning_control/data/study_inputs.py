"""The inputs of an analysis: a recipe's pictures, its bank and held-out pictures, encoded as rows to measure on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from difftuning_control.data.bank import KnowledgeBank
from difftuning_control.data.embeddings import cached_embeddings
from difftuning_control.data.examples import ImageData
from difftuning_control.data.labels import begin_label_space
from difftuning_control.data.latents import Part
from difftuning_control.data.prepare import (
    cache_folder,
    check_captions,
    encoded,
    prepare_bank,
    read_data,
    resolution_of,
    silent,
)
from difftuning_control.families.prompts import PromptEmbeddings
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.system.terminal import progress

if TYPE_CHECKING:
    from difftuning_control.families.family import Family


MEASURED = 64  # samples of a bank of size auto that is measured on, where a run's may be smaller


@dataclass(frozen=True)
class Materials:
    """What an analysis measures on, and the embeddings of all prompts."""

    data: ImageData
    held_out: ImageData
    bank: KnowledgeBank
    target: Part
    fresh: Part  # held-out target pictures
    embeddings: PromptEmbeddings
    resolution: int


def materials(
    family: Family, recipe: Recipe, tell: Callable[[str], object] = silent, size: int = MEASURED
) -> Materials:
    """Read, encode and cache the data of a recipe; load its bank, or draw it.

    Args:
        tell: is given lines on what was left out of the data.
        size: of a bank of size auto.

    Raises:
        UserError: for whatever is wrong with the data or the bank.
    """
    data, held_out = read_data(recipe, tell)
    check_captions(family, recipe, data, held_out)
    resolution, cache = resolution_of(family, recipe.data), cache_folder(recipe.data)
    captions = [e.caption for e in data.examples]
    drawn = prepare_bank(family, recipe.bank, recipe.data, captions, resolution, tell=tell, size=size)
    bank = begin_label_space(family, recipe, data, drawn)
    assert bank is not None
    held_captions = [e.caption for e in held_out.examples]
    with progress(len(data) + len(held_out), "encoding pictures") as advance:
        target, fresh = (encoded(family, part, resolution, cache, advance) for part in (data, held_out))
    embeddings = cached_embeddings(family, captions + held_captions + bank.prompts, cache, lambda count: None)
    return Materials(data, held_out, bank, target, fresh, embeddings, resolution)
