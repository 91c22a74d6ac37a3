"""A pytest plugin for diffusers' own pipeline tests: it puts classes of ours in the place of the stock ones.

--side drop-in     the drop-in classes, without a setting
--side attached    subclasses whose objects are attached with a setting that acts and changes nothing: Domain
                   Guidance by a copy of the denoiser
"""

from __future__ import annotations

import copy
import gc
import inspect
from typing import Any

import diffusers  # before the tests' own conftest, which would put another one in its place
import pytest

import difftuning_control
from difftuning_control.pipelines.guiding import BY_CLASS, guiding_of
from difftuning_control.pipelines.registry import BY_STOCK

SIDES = ("stock", "drop-in", "attached")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--side", choices=SIDES, default="stock")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gc.collect()
    gc.freeze()  # each of their tests collects garbage up to six times, over all that was imported
    side = config.getoption("--side")
    made = {name: klass for name in BY_CLASS if (klass := class_of(side, name)) is not None}
    for module in {item.module for item in items}:
        for name in vars(module).keys() & made.keys():
            setattr(module, name, made[name])
    for klass in {k for item in items if item.cls is not None for k in item.cls.__mro__}:
        stock = vars(klass).get("pipeline_class")
        if isinstance(stock, type) and stock.__name__ in made:
            klass.pipeline_class = made[stock.__name__]


def class_of(side: str, name: str) -> Any:
    """What a side has in the place of a stock class; None for nothing."""
    stock = getattr(diffusers, name, None)
    if stock is None or side == "stock":
        return None
    if side == "drop-in":
        return getattr(difftuning_control, BY_STOCK[name].name) if name in BY_STOCK else None
    return attached(stock)


def attached(stock: Any) -> Any:
    """A subclass of the same name, whose objects are attached when they are made."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 it becomes one
        stock.__init__(self, *args, **kwargs)
        guiding = guiding_of(self)
        denoiser = getattr(self, guiding.component)
        if guiding.scale is None:
            difftuning_control.attach(self, hand_over=0.0, source=copy.deepcopy(denoiser))
        else:
            difftuning_control.attach(self, domain_guidance=True, source=copy.deepcopy(denoiser))

    kept = {key: getattr(stock, key) for key in ("__module__", "__qualname__", "__doc__")}
    __init__.__signature__ = inspect.signature(stock.__init__)  # type: ignore[attr-defined]
    return type(stock.__name__, (stock,), {**kept, "__init__": __init__})
