"""Run a module or a script, and record when each optimizer step ended and how much memory the process took at most.

    python -m difftuning_control.verbs.bench.stopwatch RECORD -m difftuning_control.cli train --config recipe.yaml
    python -m difftuning_control.verbs.bench.stopwatch RECORD train_text_to_image_lora.py --max_train_steps 5

Both sides of a comparison run under it, unchanged, so that they are measured by one watch. RECORD is JSON: `started`
(the process) and `ended` in seconds since the epoch, `steps` a list of [wall, CPU seconds of the process] at the end of
every optimizer step, `peak` the largest resident memory in bytes, `cpu` the CPU seconds of the whole process,
`device_peak` the most memory of tensors on a GPU, in bytes. On a GPU a step ends when the GPU has done it: the times
are those of events, for which nobody waits before the end.
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
import torch
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
    events: list[torch.cuda.Event] = []

    def note(*_: Any) -> None:
        steps.append((time.time(), time.process_time()))
        if torch.cuda.is_initialized():
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
            if len(events) == 1:
                torch.cuda.synchronize()  # the first step's wall time, which the others are told from
                steps[0] = (time.time(), steps[0][1])

    register_optimizer_step_post_hook(note)
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
    ended, device_peak = time.time(), 0
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        device_peak = torch.cuda.max_memory_allocated()
    if len(events) == len(steps):
        steps = [(steps[0][0] + events[0].elapsed_time(e) / 1000, cpu) for e, (_, cpu) in zip(events, steps)]
    times = {"started": psutil.Process().create_time(), "ended": ended, "steps": steps}
    more = {"peak": peak_memory(), "cpu": time.process_time(), "device_peak": device_peak}
    Path(record).write_text(json.dumps(times | more))
    sys.exit(code)


if __name__ == "__main__":
    main()
