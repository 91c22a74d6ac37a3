"""The pictures of a run: to tune on and held out, read and checked before anything that takes long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from difftuning_control.data.control_spec import Conditioner
from difftuning_control.data.examples import ImageData
from difftuning_control.data.prepare import check_captions, read_data, read_stream, silent
from difftuning_control.errors import UserError
from difftuning_control.evaluation.features import load_features
from difftuning_control.evaluation.figures import check_held_out
from difftuning_control.recipe.captioning import Captioning
from difftuning_control.recipe.inputs import MOST_SAMPLES
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.training.control_inputs import check_control

if TYPE_CHECKING:
    from difftuning_control.data.stream import Stream
    from difftuning_control.families.family import Family

SHOWN = 6  # pictures of a sample grid


@dataclass(frozen=True)
class RunPictures:
    """The pictures as they are read: to tune on, all that are held out, and those of them that validation sees.

    Of a `stream` nothing is in `data` but what stands for it, and `captions` are those of its first rows.
    """

    data: ImageData
    all_held_out: ImageData
    held_out: ImageData
    captions: list[str]
    stream: Stream | None
    captioning: Captioning = field(default_factory=Captioning)

    @property
    def untriggered(self) -> list[str]:
        """The captions without the trigger, where there is one."""
        return [] if self.captioning.trigger is None else [self.captioning.untriggered(c) for c in self.captions]

    @property
    def held_captions(self) -> list[str]:
        return [e.caption for e in self.held_out.examples]


def read_pictures(
    recipe: Recipe, family: Family, tell: Callable[[str], object] = silent, bank_size: int = MOST_SAMPLES
) -> RunPictures:
    """Read the data of a recipe, or the beginning of its stream.

    Args:
        bank_size: how many captions of a stream a bank has prompts of.
        tell: is given lines on what was left out of them.

    Raises:
        UserError: for whatever is wrong with it.
    """
    stream = None
    if recipe.data.stream:
        stream, data, all_held_out = read_stream(recipe, family, tell)
    else:
        data, all_held_out = read_data(recipe, tell)
    held_out = all_held_out.sample(recipe.training.validation_size)
    captions = [e.caption for e in data.examples] if stream is None else stream.captions(bank_size)
    return RunPictures(data, all_held_out, held_out, captions, stream, recipe.data.captioning)


def sample_prompts(recipe: Recipe, pictures: RunPictures, conditions: int | None) -> list[str]:
    """The prompts of the sample grids: with a ControlNet those of the conditions that are shown, so many."""
    held, captions = pictures.held_captions, pictures.captions
    if conditions is not None:
        return (held or captions)[:conditions]
    return recipe.training.sample_prompts or list(dict.fromkeys(held + captions))[:SHOWN]


def check_pictures(recipe: Recipe, family: Family, pictures: RunPictures, conditioner: Conditioner | None) -> None:
    """Refuse what could not be trained on or judged, before anything that takes long.

    Raises:
        UserError: naming the first that is wrong.
    """
    check_captions(family, recipe, pictures.data, pictures.all_held_out)
    check_gates(recipe, pictures.data, pictures.all_held_out)
    if conditioner is not None:
        check_control(recipe, conditioner, pictures.all_held_out)


def check_gates(recipe: Recipe, data: ImageData, held_out: ImageData) -> None:
    """Refuse before training what could not be judged after it.

    Raises:
        UserError: if too few pictures are held out, some of them are tuned on too, or the features are not at hand.
    """
    gates = recipe.gates
    if not gates.draws:
        return
    check_held_out(held_out)
    shared = {e.digest for e in data.examples} & {e.digest for e in held_out.examples}
    if shared:
        raise UserError(
            f"{len(shared)} of the {len(held_out)} held-out pictures are tuned on too, and gates are judged on others; "
            "take the copies out, or leave the gates out."
        )
    load_features(gates.features)
