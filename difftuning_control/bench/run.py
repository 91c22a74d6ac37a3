"""`difftune bench`: every part that is asked for, written down as soon as it is measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from difftuning_control.bench.parts import PARTS, Setting
from difftuning_control.bench.report import table
from difftuning_control.bench.settings import Bench
from difftuning_control.runs.folder import check_folder
from difftuning_control.runs.record import describe_device, versions
from difftuning_control.system.durable import write_json


def bench(settings: Bench, overwrite: bool = False) -> dict[str, Any]:
    """Measure and write bench.json; models, pictures and caches of an earlier benchmark in the folder are used again.

    Raises:
        UserError: if the folder holds a benchmark and `overwrite` is off, or a side fails.
    """
    import torch

    check_folder(settings.output, "bench.json", overwrite)
    work = Path(settings.output)
    work.mkdir(parents=True, exist_ok=True)
    threads = settings.threads if settings.threads is not None else torch.get_num_threads()
    result: dict[str, Any] = {
        "settings": dataclasses.asdict(settings) | {"threads": threads},
        "versions": versions(), "device": describe_device(torch.device("cpu")), "parts": {},
    }  # fmt: skip
    write_json(work / "bench.json", result)
    setting = Setting(settings, work.resolve())
    for part in settings.parts:
        print(f"measuring {part}", flush=True)
        result["parts"][part] = PARTS[part](setting)
        write_json(work / "bench.json", result)
    print(table(result))
    return result
