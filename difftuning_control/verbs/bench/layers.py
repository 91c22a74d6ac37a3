"""FLUX.1's layers, timed at two depths and added up: a model of its size by parts."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from difftuning_control.verbs.bench.inputs import pictures
from difftuning_control.verbs.bench.models import FLUX_UNITS, SMALL, flux_sized
from difftuning_control.verbs.bench.sides import Timed, ours

if TYPE_CHECKING:
    from difftuning_control.verbs.bench.parts import Setting

SIDE, DEPTHS = 1024, (1, 2)  # units of blocks that are timed
PICTURES = 4  # of the timed trainings


def flux(setting: Setting) -> dict[str, Any]:
    """A LoRA's step on FLUX.1's layers at two depths, and what all of its layers would take: the difference of the two
    is a unit of one double and two single blocks, and there are 19."""
    bench, side = setting.bench, SIDE // (16 if setting.bench.small else 1)
    data = pictures(setting.work / f"pictures-{side}", PICTURES, side)
    found: dict[int, list[Timed]] = {}
    for number in range(bench.rounds + 1):  # the first round encodes
        for units in DEPTHS:
            model = flux_sized(setting.models / f"flux-{units}{SMALL * bench.small}", units, bench.small)
            more = setting.more | {"model__quantization": bench.quantization}
            work = setting.work / f"flux-runs-{units}"
            command = ours("lora", model, data, work, side, bench.steps + 1, bench.batch_size, **more)
            timed = setting.run(command, f"flux-{units}-{number}")
            found.setdefault(units, []).extend([timed] if number else [])
    seconds = {units: median(median(timed.steps) for timed in runs) for units, runs in found.items()}
    peaks = {units: max(timed.device_peak or timed.peak for timed in runs) for units, runs in found.items()}
    few, more_units = DEPTHS
    return {
        "units": list(DEPTHS),
        "seconds": [seconds[units] for units in DEPTHS],
        "peak": [peaks[units] for units in DEPTHS],
        "of_units": FLUX_UNITS,
        "seconds_a_step": added_up(FLUX_UNITS, few, seconds[few], more_units, seconds[more_units]),
        "peak_in_all": added_up(FLUX_UNITS, few, peaks[few], more_units, peaks[more_units]),
        "quantization": bench.quantization,
    }


def added_up(units: int, few: int, at_few: float, more: int, at_more: float) -> float:
    """What so many units take where `few` take `at_few` and `more` take `at_more`, and all units the same."""
    return at_few + (units - few) * (at_more - at_few) / (more - few)
