"""The benchmark's result as Markdown."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from difftuning_control.families.hub import best_device
from difftuning_control.runs.folder import check_folder
from difftuning_control.runs.identity import describe_device, versions
from difftuning_control.system.durable import write_json
from difftuning_control.verbs.bench.parts import PARTS, Setting
from difftuning_control.verbs.bench.price import lines as price_lines
from difftuning_control.verbs.bench.settings import Bench
from difftuning_control.verbs.bench.total import lines as total_lines


def bench(settings: Bench, overwrite: bool = False) -> dict[str, Any]:
    """Measure and write bench.json; models, pictures and caches of an earlier benchmark in the folder are used again.

    Raises:
        UserError: if the folder holds a benchmark and `overwrite` is off, or a side fails.
    """
    check_folder(settings.output, "bench.json", overwrite)
    work = Path(settings.output)
    work.mkdir(parents=True, exist_ok=True)
    threads = settings.threads if settings.threads is not None else torch.get_num_threads()
    result: dict[str, Any] = {
        "settings": dataclasses.asdict(settings) | {"threads": threads},
        "versions": versions(),
        "device": describe_device(best_device()),
        "parts": {},
    }
    write_json(work / "bench.json", result)
    setting = Setting(settings, work.resolve())
    for part in settings.parts:
        print(f"measuring {part}", flush=True)
        result["parts"][part] = PARTS[part](setting)
        write_json(work / "bench.json", result)
    print(table(result))
    return result


GIB = 2**30


def _shown(found: dict[str, float]) -> str:
    return f"{found['ratio']:.2f} ({found['least']:.2f} to {found['most']:.2f})"


def _by_clock(found: dict[str, Any]) -> str:
    """The two columns of times, of which the part has one."""
    return f"{_shown(found)} | " if found["clock"] == "cpu" else f" | {_shown(found)}"


def table(result: dict[str, Any]) -> str:
    """A row for each comparison: the ratio by CPU time and by wall time, median with least and most over the rounds."""
    lines = ["| what | ratio, CPU time | ratio, wall time | peak memory |", "|---|---|---|---|"]
    parts = result["parts"]
    for name in ("lora", "controlnet"):
        if name in parts:
            part = parts[name]
            peaks = part["device_peak"] if part.get("device_peak", {}).get("ours") else part["peak"]
            peak = " against ".join(f"{peaks[side] / GIB:.1f} GiB" for side in ("ours", "peer"))
            shown = f"{_shown(part['cpu'])} | {_shown(part['wall'])} | {peak}"
            lines.append(f"| {name}: steps/s against diffusers' script | {shown} |")
    if "difftuning" in parts:
        lines.append(f"| Diff-Tuning: steps/s against plain tuning | {_by_clock(parts['difftuning'])} | |")
    if "bank" in parts:
        for name in ("loop of 1", "loop of 4"):
            shown = _by_clock(parts["bank"][name] | {"clock": parts["bank"]["clock"]})
            lines.append(f"| bank: pictures/s against a {name} | {shown} | |")
    more = []
    for name in ("lora", "controlnet"):
        if name in parts:
            filled = parts[name]["caching"]
            more.append(f"{name}: caches of {filled['pictures']} pictures took {filled['seconds']:.1f} s to fill.")
    if "startup" in parts:
        part = parts["startup"]
        more.append(
            f"First step {part['seconds']:.1f} s after the command ({part['least']:.1f} to {part['most']:.1f})."
        )
    if "flux" in parts:
        part = parts["flux"]
        how = part["quantization"] or "unquantised"
        more.append(
            f"A LoRA's step on FLUX.1's layers ({how}), added up from {' and '.join(map(str, part['units']))} of "
            f"{part['of_units']} units: {part['seconds_a_step']:.2f} s, {part['peak_in_all'] / GIB:.1f} GiB."
        )
    if "profile" in parts:
        shares = (f"{name} {share:.1%}" for name, share in parts["profile"].items() if name != "seconds_a_step")
        more.append(f"A step of {parts['profile']['seconds_a_step']:.2f} CPU seconds: {', '.join(shares)}.")
    if "total" in parts:
        one_thread = result["settings"]["threads"] == 1  # CPU time then, which other jobs disturb less
        more += total_lines(parts["total"], "cpu" if one_thread else "wall")
    if "price" in parts:
        more += price_lines(parts["price"])
    for command, peaks in parts.get("memory", {}).items():
        shown = ", ".join(f"{peak / GIB:.2f} GiB on {count} pictures" for count, peak in peaks.items())
        more.append(f"Peak memory of `{command}`: {shown}.")
    return "\n".join([*(lines if len(lines) > 2 else []), *([""] if more else []), *more])
