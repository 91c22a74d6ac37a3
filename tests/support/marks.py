"""Conditions on which tests are skipped."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from difftuning_control.system.installed import at_least

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def needs(package: str, version: str) -> pytest.MarkDecorator:
    """Skips a test, or an instance of one, where a package is older than what it tests."""
    return pytest.mark.skipif(not at_least(package, version), reason=f"needs {package} {version} or newer")
