"""Captions that have more tokens than the text encoder takes, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from difftuning_control.data.examples import Example, listed
from difftuning_control.errors import UserError

if TYPE_CHECKING:
    from difftuning_control.families.family import Family
    from difftuning_control.recipe.inputs import DataConfig


def may_cut(family: Family, data: DataConfig) -> bool:
    """Whether captions may lose what the text encoder does not take."""
    return data.truncate_captions and family.cuts_prompts


def check_caption(family: Family, data: DataConfig) -> Callable[[Example], None]:
    """What refuses a caption that the text encoder would cut, unless that is wanted.

    Raises:
        UserError: of what is returned, with the two numbers and without the picture's name.
    """

    def check(example: Example) -> None:
        length, limit = family.prompt_tokens(example.caption)
        if length > limit:
            most = f"the text encoder takes {limit}"
            raise UserError(f"has a caption of {length} tokens, and {most}; shorten it{or_cut(family)}")

    return (lambda example: None) if may_cut(family, data) else check


def refuse_long(family: Family, examples: Iterable[Example]) -> None:
    """Refuse captions that the text encoder would cut.

    Raises:
        UserError: naming the first ten such pictures.
    """
    counted = [(example.name, *family.prompt_tokens(example.caption)) for example in examples]
    long = [(name, length, limit) for name, length, limit in counted if length > limit]
    if not long:
        return
    name, length, limit = long[0]
    if len(long) == 1:
        raise UserError(
            f"the caption of {name} has {length} tokens, the text encoder takes {limit}; shorten it{or_cut(family)}."
        )
    names = listed(f"{name} ({length})" for name, length, _ in long)
    raise UserError(
        f"{len(long)} captions have more tokens than the {limit} that the text encoder takes: those of {names}; "
        f"shorten them{or_cut(family, 'them')}."
    )


def or_cut(family: Family, those: str = "it") -> str:
    """For the end of a sentence that has said to shorten them."""
    return f", or let {those} be cut with --data.truncate_captions true" if family.cuts_prompts else ""
