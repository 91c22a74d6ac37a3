"""What a whole run takes at a real model's size, added up by counts from its parts: a picture encoded, a forward of the
bank, a row of a step plain and with retention.

Every part is measured in this process, on a CPU, where a batch takes what its rows take. A whole command of that size
would take days there, and `total`, which runs a few steps of whole commands, an hour.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from difftuning_control.errors import UserError
from difftuning_control.families.loading import DTYPES, load_family
from difftuning_control.recipe.inputs import BankConfig
from difftuning_control.training.loop import TrainingLoop
from difftuning_control.verbs.bench.total import PICTURES, RETENTION, bank_forwards, job_steps

if TYPE_CHECKING:
    from difftuning_control.verbs.bench.parts import Setting

SAMPLES = (1, 2)  # of the bank that are drawn at once, of two forwards each
LEAST_ROWS = 2  # of a step that is timed: one of the data and one of the bank
DRAWN = {"bank.size": 2, "bank.steps": 1, "bank.guidance_scale": 1.0}  # of the step's bank, whose time is not counted


def price(setting: Setting) -> dict[str, Any]:
    """Seconds of each part, and of a whole run from them, plain and with Diff-Tuning; without start-up, validation and
    saving.

    Raises:
        UserError: on a GPU, where a batch does not take what its rows take.
    """
    if setting.device.type != "cpu":
        raise UserError("price adds up what a CPU takes; on a GPU measure total.")
    if setting.bench.threads is not None:
        torch.set_num_threads(setting.bench.threads)
    steps, _, rows = job_steps(setting.bench)
    picture, forwards = _encoding_and_drawing(setting)
    timed = max(setting.bench.batch_size, LEAST_ROWS)
    row = {side: _row(setting, timed, side != "plain") for side in ("plain", "Diff-Tuning")}
    drawn = bank_forwards(steps, rows)
    cheapest = min(forwards.values())  # of a bank, which draws more at once than was timed
    whole = added_up(steps * rows, row, PICTURES * picture, drawn * cheapest)
    return {
        "clock": setting.clock_name,
        "steps": steps,
        "rows": rows,
        "pictures": PICTURES,
        "timed_rows": timed,
        "seconds": {"picture": picture, "forward": forwards, "row": row},
        "bank_forwards": drawn,
        "whole": whole,
        "ratio": whole["Diff-Tuning"] / whole["plain"],
    }


def added_up(rows: int, row: dict[str, float], encoding: float, bank: float) -> dict[str, float]:
    """Seconds of a whole run of each side; only Diff-Tuning's has a bank."""
    return {side: encoding + rows * each + (0.0 if side == "plain" else bank) for side, each in row.items()}


def _encoding_and_drawing(setting: Setting) -> tuple[float, dict[str, float]]:
    """Seconds to encode a picture, and of a forward of the bank by the rows of the batch that it is in."""
    family = load_family(str(setting.model), DTYPES[setting.bench.mixed_precision])
    blank, guidance = torch.zeros(1, 3, setting.side, setting.side), BankConfig().guidance_scale

    def encode() -> None:
        with torch.no_grad():
            family.encode_moments(blank)

    def draw(samples: int) -> None:
        seeds = [torch.Generator().manual_seed(i) for i in range(samples)]
        family.sample([""] * samples, seeds, steps=1, guidance_scale=guidance, resolution=setting.side)

    rounds = setting.bench.rounds
    picture = _timed(setting, encode, rounds)
    return picture, {str(2 * n): _timed(setting, partial(draw, n), rounds) / (2 * n) for n in SAMPLES}


def _timed(setting: Setting, work: Callable[[], object], times: int) -> float:
    """The median of what so many calls take, in seconds."""
    found = []
    for _ in range(times):
        begun = setting.clock()
        work()
        found.append(setting.clock() - begun)
    return median(found)


def _row(setting: Setting, rows: int, tuned: bool) -> float:
    """Seconds of a row of a LoRA's step, of whose rows with retention at least one is the bank's."""
    command = setting.ours("lora", 1, rows)
    if tuned:
        retention = {"tuning.retention_ratio": max(RETENTION, 1 / rows), "tuning.retention_weight": 0.1}
        more = retention | DRAWN | {"bank.path": setting.work / "price-bank"}
        kept = [flag for flag in command if not flag.startswith("--tuning.")]
        command = [*kept, *(f"--{name}={value}" for name, value in more.items())]
    gc.collect()  # what was loaded before: a model of this size twice would not fit everywhere
    loop = setting.loop(command, TrainingLoop)
    loop.denoiser.train()
    steps = iter(range(setting.bench.steps))  # so long that the first needs no other before it
    return _timed(setting, lambda: loop.step(next(steps)), setting.bench.steps) / rows


def lines(part: dict[str, Any]) -> list[str]:
    """The result in words."""
    seconds = part["seconds"]
    forwards = ", ".join(f"{each:.2f} s in a batch of {rows}" for rows, each in seconds["forward"].items())
    row = " and ".join(f"{each:.2f} s {side}" for side, each in seconds["row"].items())
    whole = ", ".join(f"{side} {found:,.0f} s" for side, found in part["whole"].items())
    return [
        f"Added up from parts, {part['clock']} time, without start-up, validation and saving: "
        f"{part['pictures']} pictures, {part['steps']} steps of {part['rows']} rows, {part['bank_forwards']} forwards "
        f"of the bank: {whole}, {part['ratio']:.3f} times.",
        f"Parts: a picture encoded {seconds['picture']:.2f} s; a row's forward {forwards}; a row of a step {row}, in "
        f"steps of {part['timed_rows']} rows.",
    ]
