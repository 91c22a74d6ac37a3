"""Drop-ins for diffusers' pipelines, which know the pretrained model behind a tuned one and how conditions are made.

The classes of the table are imported on first use: the table itself needs neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from difftuning_control.pipelines.registry import BY_NAME, CLASSES

HOME = {"DomainGuidance": "guider", "add_control": "controlled", "attach": "attached", "detach": "attached"}
__all__ = ["DomainGuidance", "add_control", "attach", "detach", *CLASSES]


def __getattr__(name: str) -> Any:
    """A public name's object."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = HOME[name] if name in HOME else BY_NAME[name].module
    try:
        return getattr(import_module(f"{__name__}.{module}"), name)
    except ImportError as error:
        if name in BY_NAME and BY_NAME[name].stock in str(error):  # an older diffusers, which says so itself
            raise AttributeError(f"{name} is made of a class that there is not: {error}") from None
        raise


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
