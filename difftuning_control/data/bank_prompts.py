"""The prompts that a knowledge bank is drawn for: captions, general ones, classes, none, or the lines of a file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from difftuning_control.data.labels import bank_classes
from difftuning_control.errors import UserError
from difftuning_control.families.loading import embedded_model
from difftuning_control.recipe.inputs import BankConfig
from difftuning_control.system.untrusted import read_text

if TYPE_CHECKING:
    from difftuning_control.families.family import Family

OUTSIDE = 32  # general prompts that are kept for asking what a tuned model still draws


def spread_prompts(prompts: Sequence[str], size: int) -> tuple[str, ...]:
    """As many prompts as a bank has items, evenly from all of them where there are more."""
    count = min(len(prompts), size)
    return tuple(prompts[i * len(prompts) // count] for i in range(count))


def general_prompts(family: Family) -> list[str]:
    """Prompts across subjects and styles in words that the model knows; for the last OUTSIDE no bank is drawn."""
    name = "embedded" if str(family.pipe.name_or_path) == str(embedded_model()) else "general"
    file = resources.files("difftuning_control") / "assets" / "prompts" / f"{name}.txt"
    return file.read_text(encoding="utf-8").splitlines()


def outside_prompts(family: Family) -> list[str]:
    """The last OUTSIDE of them, by which it is asked what is still drawn."""
    return general_prompts(family)[-OUTSIDE:]


def bank_prompts(family: Family, config: BankConfig, captions: list[str]) -> list[str]:
    """The prompts that a bank is drawn for.

    Raises:
        UserError: if the prompt file is missing, empty or not UTF-8.
    """
    if config.prompts == "captions":
        return list(dict.fromkeys(captions))
    if config.prompts == "empty":
        return [""]
    if config.prompts == "general":
        return general_prompts(family)[:-OUTSIDE]
    if config.prompts in ("classes", "both"):
        return bank_classes(family, config.prompts)
    path = Path(config.prompts).expanduser()
    try:
        lines = [line.strip() for line in read_text(path).split("\n")]
    except OSError:
        expected = "captions, empty, " + ("classes, both" if family.class_conditional else "general")
        raise UserError(
            f"bank.prompts is {config.prompts}; expected {expected}, or a text file with one prompt a line."
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"the prompt file {path} is not UTF-8 text; save it as UTF-8.") from None
    if not any(lines):
        raise UserError(f"the prompt file {path} has no prompt; write one a line.")
    return [line for line in lines if line]
