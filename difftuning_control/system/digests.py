"""Digests of JSON values and files: short hexadecimal strings that say what an artefact depends on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

DIGEST = "digest"


def digest_of(values: Any) -> str:
    """16 hexadecimal digits of a JSON-able value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while part := file.read(1 << 20):
        digest.update(part)
    return digest.hexdigest()
