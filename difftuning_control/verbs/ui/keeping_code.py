"""A `difftune` process that leaves its exit code in a file, so that a page that did not start it knows how it ended.

python -m difftuning_control.verbs.ui.keeping_code FILE train --config recipe.yaml
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from difftuning_control.system.durable import write_text


def run(kept: Path, arguments: list[str]) -> None:
    """`difftune` with some arguments; the file has its exit code, 1 after a crash."""
    sys.argv = ["difftune", *arguments]
    code = 1
    try:
        runpy.run_module("difftuning_control.cli", run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        write_text(kept, str(code))


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:])
