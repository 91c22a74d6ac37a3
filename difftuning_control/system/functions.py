"""Functions of the user's that a recipe names, `package.module:function`: code, which runs when it is imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from difftuning_control.errors import UserError


def named_function(name: str, what: str) -> Callable[..., Any]:
    """The function of a name, on Python's path.

    Args:
        what: it is named for, in messages.

    Raises:
        UserError: if it cannot be imported, is none, or is of Python's own library.
    """
    module, _, attribute = name.partition(":")
    if module.partition(".")[0] in sys.stdlib_module_names:  # a recipe from elsewhere could name os:system
        raise UserError(f"the {what} {name} is of Python's own library, which has none; name a function of yours.")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module may raise anything when it is imported
        raise UserError(
            f"the {what} {name} cannot be imported ({error}); expected package.module:function, on Python's path."
        ) from None
    if not callable(function):
        raise UserError(f"the {what} {name} is a {type(function).__name__}; expected a function.")
    return function
