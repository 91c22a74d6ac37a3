"""The history of a run: the figures of its steps, a line each in `metrics.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def read_history(run: Path) -> list[dict[str, Any]]:
    """The figures by step; a last line that is not whole, of a run that was killed, is left out.

    Args:
        run: its folder.

    Raises:
        OSError or ValueError: if the file is not there, or another line cannot be read.
    """
    lines = (run / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
