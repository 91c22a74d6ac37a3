"""Scripts beside the package, as modules."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

EMOJI = Path(__file__).parents[2] / "examples" / "emoji"


def loaded(path: Path) -> ModuleType:
    """The script as a module of its folder's and its own name."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def emoji_script(patch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """A script of examples/emoji, read anew, and what it imports of that folder too."""
    patch.syspath_prepend(str(EMOJI))
    for path in EMOJI.glob("*.py"):
        patch.delitem(sys.modules, path.stem, raising=False)
    return importlib.import_module(name)
