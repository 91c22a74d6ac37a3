"""The classes of a class-conditional model under a recipe: of each picture, and a label space of the data's own.

The captions of the pictures are then names of classes. A new label space begins after the bank has been drawn, which is
for the pretrained model's classes or for none; the bank's items stand for the empty class from then on.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from difftuning_control.data.label_space import FIRST, LabelSpace
from difftuning_control.errors import UserError

if TYPE_CHECKING:
    from difftuning_control.data.bank import KnowledgeBank
    from difftuning_control.data.examples import ImageData
    from difftuning_control.families.family import Family
    from difftuning_control.recipe.recipe import Recipe


def check_classes(family: Family, recipe: Recipe, data: ImageData, held_out: ImageData) -> None:
    """Refuse settings that the model has no use for, and pictures whose class it does not have or will not learn.

    Raises:
        UserError: in these cases.
    """
    tuning = recipe.tuning
    if tuning.variance == "hybrid" and not family.learned_variance:
        raise UserError("tuning.variance is hybrid, but this model does not predict its variance; say fixed.")
    if family.class_conditional and recipe.bank.prompts == "general":
        raise UserError("bank.prompts is general, but this model is told classes and no prompts; say classes or both.")
    if family.class_conditional and recipe.data.trigger is not None:
        raise UserError("data.trigger is given, but this model is told classes and no prompts; leave it out.")
    if tuning.variance == "hybrid" and recipe.data.masks is not None:
        raise UserError(
            "data.masks is given and tuning.variance is hybrid, whose bound is of whole pictures; say fixed."
        )
    if not family.class_conditional:
        if tuning.label_space == "new" or recipe.bank.prompts in ("classes", "both"):
            key, value = ("bank.prompts", recipe.bank.prompts)
            if tuning.label_space == "new":
                key, value = "tuning.label_space", "new"
            raise UserError(f"{key} is {value}, but this model is told prompts and has no classes; leave it out.")
        return
    if tuning.label_space == "own":
        _check_names(family, data, held_out)
        return
    if recipe.uses_bank and tuning.retention_prompts != "empty":
        raise UserError(
            f"tuning.retention_prompts is {tuning.retention_prompts}, but with tuning.label_space new the classes that "
            "the bank was drawn for are gone; say empty."
        )
    if recipe.training.validation_prompts in ("own", "both"):
        raise UserError(
            f"training.validation_prompts is {recipe.training.validation_prompts}, but with tuning.label_space new the "
            "classes that the bank was drawn for are gone; say retained or empty."
        )
    if (recipe.uses_bank or recipe.bank.path is not None) and recipe.bank.prompts == "captions":
        raise UserError(
            "bank.prompts is captions, but with tuning.label_space new the pretrained model does not know the data's "
            "classes; say empty, classes or both."
        )
    learnt = set(class_names(data))
    strange = next((e for e in held_out.examples if e.caption not in learnt), None)
    if strange is not None:
        raise UserError(
            f"the class {strange.caption!r} has only held-out pictures, such as {strange.name}; hold out fewer "
            "(--data.holdout), or take them out."
        )


def _check_names(family: Any, data: ImageData, held_out: ImageData) -> None:
    for example in (*data.examples, *held_out.examples):
        try:
            family.class_of(example.caption)
        except UserError as error:
            raise UserError(
                f"the class of {example.name}: {str(error).rstrip('.?')}; for classes that the model is to learn anew "
                "say --tuning.label_space new."
            ) from None


def class_names(data: ImageData) -> list[str]:
    """The classes of the pictures in order."""
    return sorted({e.caption for e in data.examples})


def begin_label_space(family: Any, recipe: Recipe, data: ImageData, bank: KnowledgeBank | None) -> KnowledgeBank | None:
    """Give the model the data's classes where the recipe says so; returns the bank as it is retained from then on."""
    if not family.class_conditional or recipe.tuning.label_space == "own":
        return bank
    family.set_classes(class_names(data), recipe.training.seed if recipe.tuning.label_start == "random" else None)
    return replace(bank, prompts=[""] * len(bank)) if bank is not None else None


def begin_as(family: Any, space: LabelSpace | None, seed: int) -> None:
    """Give the model the label space that a run began with, if it has one.

    Args:
        seed: of the run.
    """
    if space is not None and space.is_new:
        family.set_classes(list(space.classes), None if space.label_start == FIRST else seed)


def as_pretrained(family: Any, space: LabelSpace | None) -> AbstractContextManager[None]:
    """While open, the base of a run takes classes of the run's own label space for the empty one: of these it knows
    nothing, and in its own label space their numbers mean others."""
    if space is None or not space.is_new:
        return nullcontext()
    return family.unknown_classes(len(space.classes))


def label_space_of(family: Any, recipe: Recipe, data: ImageData) -> LabelSpace | None:
    """Which class each name is; None for models without classes."""
    if not family.class_conditional:
        return None
    numbers = {name: family.class_of(name) for name in class_names(data)}
    named = all(name in family.labels for name in numbers)
    return LabelSpace(
        label_space=recipe.tuning.label_space,
        classes=numbers,
        named=named,
        null_class=family.null_class,
        label_start=recipe.tuning.label_start,
    )


def bank_classes(family: Any, kind: str) -> list[str]:
    """All classes of a model, or with `both` each of them followed by the empty one."""
    names: list[str] = family.class_names
    return names if kind == "classes" else [prompt for name in names for prompt in (name, "")]
