"""Conditions on which tests are skipped."""

from __future__ import annotations

import inspect
from importlib.util import find_spec

import diffusers
import pytest

from difftuning_control.families.loading import SINCE
from difftuning_control.system.installed import at_least

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


needs_asking = pytest.mark.skipif(
    "trust_remote_code" not in inspect.getsource(diffusers.DiffusionPipeline.from_pretrained),
    reason=f"diffusers {diffusers.__version__} runs code of a directory without being told to",
)


def need_pipeline(name: str) -> None:
    """Skip the rest of a test where the installed diffusers does not have a pipeline as it is needed."""
    since = SINCE.get(name, "0")
    if not hasattr(diffusers, name) or not at_least("diffusers", since):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name} as it is needed; {since} has")


def needs(package: str, version: str) -> pytest.MarkDecorator:
    """Skips a test, or an instance of one, where a package is older than what it tests."""
    return pytest.mark.skipif(not at_least(package, version), reason=f"needs {package} {version} or newer")
