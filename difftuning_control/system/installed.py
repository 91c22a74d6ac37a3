"""Versions of the libraries that are installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version


def at_least(package: str, wanted: str) -> bool:
    """Whether a package is installed in this version or a newer one."""
    try:
        return Version(version(package)) >= Version(wanted)
    except PackageNotFoundError:
        return False
