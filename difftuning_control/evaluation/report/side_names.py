"""The name of a side in a reader's language, and a sentence on what it does."""

from __future__ import annotations

from collections.abc import Mapping

from difftuning_control.recipe.studies import SCHEDULED


def side_label(name: str, texts: Mapping[str, str]) -> str:
    """A side's name: of one with numbers in it τ and λ, and its own word where the texts have none."""
    if (label := texts.get(f"side.{name}")) is not None:
        return label
    if (match := SCHEDULED.fullmatch(name)) is None:
        return name
    kind, tau, weight = match.groups()
    own = name.removesuffix(f"_lambda{weight}")
    key = own if f"side.{own}" in texts else f"{kind}_tau"
    label = texts[f"side.{key}"].format(tau=tau)
    return label if weight is None else texts["side.weighted"].format(side=label, weight=weight)


def side_about(name: str, texts: Mapping[str, str]) -> str | None:
    """What a side does; None of one that the texts do not know."""
    match = SCHEDULED.fullmatch(name)
    own = name.removesuffix(f"_lambda{match[3]}") if match is not None else name
    general = f"{match[1]}_tau" if match is not None else ""
    return texts.get(f"about.{own}", texts.get(f"about.{general}"))
