"""`difftune recipes`: the recipes and examples that come with the package, listed or one of them printed."""

from __future__ import annotations

import sys

from difftuning_control.system.shipped import example, examples
from difftuning_control.system.terminal import say


def recipes(name: str | None) -> None:
    """Print one of them to standard output as it is, or without a name one line of each.

    Raises:
        UserError: with near names, if there is none of this name.
    """
    if name is not None:
        sys.stdout.write(example(name).path.read_text(encoding="utf-8"))
        return
    recipes_known = examples()
    width = max(len(one.name) for one in recipes_known)
    for one in recipes_known:
        say(f"{one.name:<{width}}  {one.about}")
    say("\nOne of them into a file of yours: difftune recipes sd15_lora > mine.yaml")
