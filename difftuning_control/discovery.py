"""How diffusers finds the drop-in classes once this package is imported, before or after diffusers.

`DiffusionPipeline.from_pretrained` looks a class up by name in the module `diffusers`, other tools of diffusers in
`diffusers.pipelines`, and `AutoPipelineForText2Image` in its own tables. All are filled on the import of the module in
question, and the classes are only made when somebody asks for them: importing this package imports neither diffusers
nor torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from difftuning_control.pipelines.registry import CLASSES, DROP_INS

TABLES = "diffusers.pipelines.auto_pipeline"


def _add_names(module: Any) -> None:
    """Let `diffusers.DiffTuningPipeline` be found."""

    def __getattr__(name: str) -> Any:  # noqa: N807 a module's own, asked before its class is
        if name in CLASSES:
            return getattr(import_module("difftuning_control.pipelines"), name)
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

    module.__getattr__ = __getattr__
    if TABLES in sys.modules:
        _add_to_tables(sys.modules[TABLES])


def _add_to_tables(module: Any) -> None:
    """Rows of their own in diffusers' tables: text to image is ours, other tasks lead to the stock classes."""
    if "__getattr__" not in vars(sys.modules["diffusers"]):
        return  # it is still being imported, all at once (DIFFUSERS_SLOW_IMPORT), and comes back here at its end
    ours: Any = import_module("difftuning_control.pipelines")
    texts, images, masks = (
        getattr(module, f"AUTO_{task}_PIPELINES_MAPPING") for task in ("TEXT2IMAGE", "IMAGE2IMAGE", "INPAINT")
    )
    for row in DROP_INS:
        if row.auto not in texts:  # an older diffusers has not all of the stock classes
            continue
        texts[row.auto_name] = getattr(ours, row.name)
        for others in (images, masks):
            if row.auto in others:  # SD3's ControlNets have no image-to-image pipeline
                others[row.auto_name] = others[row.auto]


WANTED: dict[str, Callable[[Any], None]] = {
    "diffusers": _add_names,
    "diffusers.pipelines": _add_names,  # where diffusers' own tools look for a class's source
    TABLES: _add_to_tables,
}


class _AfterImport(Loader):
    """Loads as the module's own loader does, then calls a function with the module."""

    def __init__(self, loader: Any, then: Callable[[Any], None]):
        self.loader, self.then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader  # whoever asks it for sources and files finds it
        self.loader.exec_module(module)
        self.then(sys.modules[module.__name__])  # diffusers puts another module in its own place


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in WANTED:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (other.find_spec(fullname, path, target) for other in others)
        spec = next((s for s in specs if s is not None), None)
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
