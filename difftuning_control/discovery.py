"""How diffusers finds the drop-in classes once this package is imported, before or after diffusers.

`DiffusionPipeline.from_pretrained` looks a class up by name in the module `diffusers`, and `AutoPipelineForText2Image`
in its own tables. Both are filled on the import of the module in question, and the classes are only made when somebody
asks for them: importing this package imports neither diffusers nor torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

PIPELINES = (
    "DiffTuningPipeline",
    "DiffTuningControlNetPipeline",
    "DiffTuningXLPipeline",
    "DiffTuningXLControlNetPipeline",
)


def _add_names(module: ModuleType) -> None:
    """Let `diffusers.DiffTuningPipeline` be found."""
    stock = type(module)

    def __getattr__(self: Any, name: str) -> Any:  # noqa: N807 the method's own name
        if name in PIPELINES:
            return getattr(import_module("difftuning_control.pipelines"), name)
        return stock.__getattr__(self, name)

    module.__class__ = type(stock.__name__, (stock,), {"__getattr__": __getattr__})


def _add_to_tables(module: Any) -> None:
    """Rows of their own in diffusers' tables: text to image is ours, other tasks lead to the stock classes."""
    ours: Any = import_module("difftuning_control.pipelines")
    texts, images, masks = (
        getattr(module, f"AUTO_{task}_PIPELINES_MAPPING") for task in ("TEXT2IMAGE", "IMAGE2IMAGE", "INPAINT")
    )
    rows = {
        "difftuning-sd": (ours.DiffTuningPipeline, "stable-diffusion"),
        "difftuning-sd-controlnet": (ours.DiffTuningControlNetPipeline, "stable-diffusion-controlnet"),
        "difftuning-sdxl": (ours.DiffTuningXLPipeline, "stable-diffusion-xl"),
        "difftuning-sdxl-controlnet": (ours.DiffTuningXLControlNetPipeline, "stable-diffusion-xl-controlnet"),
    }
    for name, (pipeline, stock) in rows.items():
        texts[name], images[name], masks[name] = pipeline, images[stock], masks[stock]


WANTED: dict[str, Callable[[Any], None]] = {
    "diffusers": _add_names,
    "diffusers.pipelines.auto_pipeline": _add_to_tables,
}


class _AfterImport(Loader):
    """Loads as the module's own loader does, then calls a function with the module."""

    def __init__(self, loader: Any, then: Callable[[Any], None]):
        self.loader, self.then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.then(sys.modules[module.__name__])  # diffusers puts another module in its own place


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in WANTED:
            return None
        sys.meta_path.remove(self)  # so that the others are asked
        try:
            spec = find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _AfterImport(spec.loader, WANTED[fullname])
        return spec


def register() -> None:
    """Make the classes known to diffusers, now where it is imported, else as soon as it is."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    for name, then in WANTED.items():
        if name in sys.modules:
            then(sys.modules[name])
    sys.meta_path.insert(0, _Finder())
