"""The report of a ControlNet's training: does it follow the condition, since when, and what to do next."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from difftuning_control.data.control_spec import SUPPLIED
from difftuning_control.errors import UserError
from difftuning_control.evaluation.band_losses import LossChanges
from difftuning_control.evaluation.comparison import is_number, mean_spread, threshold
from difftuning_control.evaluation.convergence import LEAST
from difftuning_control.evaluation.fidelity_record import FidelityRecord
from difftuning_control.evaluation.metric_table import METRICS
from difftuning_control.evaluation.report.language import load_texts
from difftuning_control.evaluation.report.loss_tables import loss_tables
from difftuning_control.evaluation.report.page import flatten, quoted, write_page
from difftuning_control.evaluation.report.pictures import data_uri
from difftuning_control.evaluation.report.training import loss_chart

SLIGHT = 0.1  # of the distance from the model without control to a perfect match
ROWS, NAMES = 20, 20  # most rows of the table of measurements, most names of pictures
GRID = 1000  # side of the sample grid in the report, in pixels
FILES = ("run.json", "fidelity.json", "recipe.yaml", "metrics.jsonl")


class ControlRun(Protocol):
    """What the report tells of a run: its record, which a lower room keeps."""

    status: str
    recipe_values: dict[str, Any]
    data: Any
    control: Any
    versions: dict[str, str]
    device: str
    losses: LossChanges
    steps_per_second: float | None
    steps: int
    fidelity: FidelityRecord | None
    frozen: Any
    timings: Any
    gates: Any


def write_control_report(run: ControlRun, folder: Path, language: str = "en") -> Path:
    """`report.html` of a ControlNet's finished run in its folder.

    Raises:
        UserError: if the run is not finished or trained no ControlNet, or the language is unknown.
    """
    texts = load_texts(language)
    if run.status != "complete":
        raise UserError(
            f"the run is not finished (its status is {quoted(run.status)}), so there is nothing to report; go "
            "on with difftune resume."
        )
    recipe, method = run.recipe_values, run.recipe_values.get("method")
    if method != "controlnet" or run.control is None:
        raise UserError(f"the run's method is {quoted(method)}; only a run of controlnet has this report.")
    from difftuning_control.evaluation.report import charts  # brings matplotlib, which nothing else here needs

    curve, told = run.fidelity, control_verdict(run.fidelity)
    drawn, rows, grid = [], [], _last_grid(folder)
    if curve is not None and told["code"] != "unmeasured":
        figures = sorted((m for m in curve.figures if m in METRICS), key=lambda m: m != curve.main)
        drawn = [(charts.fidelity_chart(curve, m, texts), m) for m in figures]
        rows = [
            {"step": curve.steps[i], **{m: curve.figures[m][i] for m in figures}}
            for i in _spread_out(len(curve.steps), ROWS)
        ]
    timings = [run.timings.preparation, run.timings.training] if run.timings is not None else []
    timings = [seconds for seconds in timings if is_number(seconds)]
    return write_page(
        folder,
        "control.html.j2",
        language,
        texts,
        run=run,
        verdict=told,
        curve=curve,
        charts=drawn,
        rows=rows,
        grid=grid,
        losses=loss_chart(folder, 760),
        bands=loss_tables({"tuned": [run.losses]}),
        steps=_next_steps(run, told, folder, grid is not None),
        every=recipe["control"]["fidelity"]["every"],
        seconds=sum(timings) if timings else None,
        names=NAMES,
        least=LEAST,
        supplied=run.control.annotator == SUPPLIED,
        settings=flatten(recipe),
        files=[name for name in FILES if (folder / name).is_file()],
    )


def control_verdict(curve: FidelityRecord | None) -> dict[str, Any]:
    """Whether pictures follow their conditions, by a fidelity curve.

    The code is unmeasured; short (too few measurements); none (no rise beyond noise); worse (at the end not better than
    without control by more than the noise between measurements); rising (at most one measurement after the rise);
    slight (better by less than `SLIGHT` of what a perfect match would be); already (better from the first measurement
    on); sudden or gradual.

    `better` says that the last figure is better than without control beyond noise, `no_better` that it is not even so
    within it. Measurements that are not finite are left out.
    """
    points = _points(curve)
    if curve is None or not points or not is_number(curve.without.get(curve.main)):
        return {"code": "unmeasured", "good": False}
    higher, rise = curve.higher_is_better, curve.convergence
    steps, values = zip(*points)
    without = curve.without[curve.main]
    gains = [(v - without) * (1 if higher else -1) for v in values]
    distance = abs((1.0 if higher else 0.0) - without)
    share = gains[-1] / distance if distance else None
    mean, spread = mean_spread(gains)
    settled = rise is None or rise.end <= steps[-min(3, len(steps))]  # one measurement after a rise is no plateau
    already = rise is None and min(gains) > 0 and (mean or 0) > 3 * (spread or 0)
    better = already or (rise is not None and gains[-1] > _noise(values))
    if len(values) < LEAST:
        code = "short"
    elif rise is None and not already:
        code = "none"
    elif not better:
        code = "worse"
    elif not settled:
        code = "rising"
    elif share is not None and share < SLIGHT:
        code = "slight"
    elif rise is None:
        code = "already"
    else:
        code = "sudden" if rise.sudden else "gradual"
    return {
        "code": code,
        "good": code in ("sudden", "gradual", "already"),
        "better": better and code != "short",
        "no_better": gains[-1] <= 0,
        "share": share,
        "value": values[-1],
        "without": without,
        "count": len(values),
        "settled": settled,
        "rise": None if rise is None else {k: f"{getattr(rise, k):.0f}" for k in ("start", "end", "step")},
    }


def _points(curve: FidelityRecord | None) -> list[tuple[int, float]]:
    """Steps and values of the main figure, where it is a number."""
    return [] if curve is None else [(s, v) for s, v in zip(curve.steps, curve.values) if is_number(v)]


def _noise(values: Sequence[float]) -> float:
    """What one measurement must gain on the one without control, which is as noisy, to be better beyond chance.

    The noise is that of the change from one measurement to the next, by its median: neither a sudden rise nor a last
    measurement that fell out of the curve widens it.
    """
    if len(values) <= 4:
        return math.inf
    deviation = 1.4826 * median(abs(later - earlier) for earlier, later in pairwise(values))  # of a normal one
    return threshold(len(values) - 3, 1) * deviation


def _next_steps(run: ControlRun, told: Mapping[str, Any], folder: Path, has_grid: bool) -> list[dict[str, Any]]:
    """What to do after a run: a key of the language files, and a command or None."""
    recipe, done = run.recipe_values, run.steps
    place, code = str(folder), told["code"]
    photo = "condition.png" if run.control.annotator == SUPPLIED else "photo.png"
    draw = f"difftune sample --run {shlex.quote(place)} --control {photo} --prompts '[\"…\"]'"
    again = f"difftune train --config {shlex.quote(str(folder / 'recipe.yaml'))} --output runs/longer"
    longer = f"{again} --training.max_steps {2 * max(done, recipe['training']['max_steps'])}"
    steps: list[tuple[str, str | None]] = []
    if code == "unmeasured":
        every = f" --control.fidelity.every {max(1, done // 20)}"
        held_out = "" if run.data.held_out else " --data.holdout 0.1"
        steps.append(("do.control.measure", again + every + held_out))
    elif code == "short":
        steps.append(("do.control.more", f"{longer} --control.fidelity.every {max(1, done // 10)}"))
    elif code == "none" or not told["settled"]:
        steps.append(("do.control.longer", longer))
    if code in ("none", "worse", "slight"):
        steps += [("do.control.rate", None), *([("do.control.conditions", None)] if has_grid else [])]
    if run.control.blank:
        steps.append(("do.control.blank", None))
    steps += [("do.control.sample_supplied" if photo == "condition.png" else "do.control.sample", draw)]
    return [{"code": c, "command": command} for c, command in [*steps, ("do.control.keep", None)]]


def _last_grid(folder: Path) -> dict[str, Any] | None:
    """The sample grid of the last step, as a data URI; None where there is none that can be shown."""
    grids = [
        (int(m[1]), p.name) for p in folder.glob("samples/step-*.png") if (m := re.fullmatch(r"step-(\d+)", p.stem))
    ]
    for step, name in sorted(grids, reverse=True):
        try:
            return {"step": step, "uri": data_uri(folder, f"samples/{name}", GRID)}
        except UserError:  # a report without pictures is better than none
            continue
    return None


def _spread_out(count: int, most: int) -> list[int]:
    """At most so many of `count` indices, evenly, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
