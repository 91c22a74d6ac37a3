"""A processor with AVX512-BF16, as bitsandbytes sees it: `pytest -p support.avx512bf16` runs a suite on it."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

MODULE = "bitsandbytes.functional"


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != MODULE:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(found for found in others if found is not None)
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            module.has_avx512bf16 = lambda: True

        spec.loader.exec_module = exec_module
        return spec


assert MODULE not in sys.modules, "bitsandbytes was imported before"
sys.meta_path.insert(0, _Finder())
