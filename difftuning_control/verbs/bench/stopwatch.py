"""Run a module or a script, and record when each optimizer step ended and how much memory the process took at most.

    python -m difftuning_control.verbs.bench.stopwatch RECORD -m difftuning_control.cli train --config recipe.yaml
    python -m difftuning_control.verbs.bench.stopwatch RECORD train_text_to_image_lora.py --max_train_steps 5

Both sides of a comparison run under it, unchanged, so that they are measured by one watch. RECORD is JSON: `started`
(the process) and `ended` in seconds since the epoch, `steps` a list of [wall, CPU seconds of the process] at the end of
every optimizer step, `peak` the largest resident memory in bytes, `cpu` the CPU seconds of the whole process.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from torch.optim.optimizer import register_optimizer_step_post_hook


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure would begin with that of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    if find_spec("resource") is None:  # Windows
        found = psutil.Process().memory_info()
        return getattr(found, "peak_wset", found.rss)
    resource: Any = import_module("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    record, first, *arguments = sys.argv[1:]
    steps: list[tuple[float, float]] = []
    register_optimizer_step_post_hook(lambda *_: steps.append((time.time(), time.process_time())))
    code = 0
    try:
        if first == "-m":
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *arguments]
            sys.path[0] = os.path.dirname(os.path.abspath(first))
            runpy.run_path(first, run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    times = {"started": psutil.Process().create_time(), "ended": time.time(), "steps": steps}
    Path(record).write_text(json.dumps(times | {"peak": peak_memory(), "cpu": time.process_time()}))
    sys.exit(code)


if __name__ == "__main__":
    main()
