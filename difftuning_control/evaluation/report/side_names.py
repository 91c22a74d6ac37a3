"""The name of a side in a reader's language, and a sentence on what it does."""

from __future__ import annotations

from collections.abc import Mapping

from difftuning_control.recipe.studies import scheduled_side


def side_label(name: str, texts: Mapping[str, str]) -> str:
    """A side's name, with τ, general prompts and λ where its own says them; its own where the texts have none."""
    if (label := texts.get(f"side.{name}")) is not None:
        return label
    if (side := scheduled_side(name)) is None:
        return name
    label = texts.get(f"side.{side.plain}") or texts[f"side.{side.kind}_tau"].format(tau=side.tau)
    label = label if side.general is None else texts["side.general"].format(side=label)
    return label if side.weight is None else texts["side.weighted"].format(side=label, weight=side.weight)


def side_about(name: str, texts: Mapping[str, str]) -> str | None:
    """What a side does; None of one that the texts do not know."""
    if (side := scheduled_side(name)) is None:
        return texts.get(f"about.{name}")
    about = texts.get(f"about.{side.plain}") or texts[f"about.{side.kind}_tau"]
    return about if side.general is None else f"{about} {texts['about.general']}"
