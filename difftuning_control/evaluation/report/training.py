"""The report of a run while it trains and after: pictures, losses, settings and seconds on one page."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from difftuning_control.evaluation.band_losses import BandLosses
from difftuning_control.evaluation.drawing import grid_cells
from difftuning_control.evaluation.report.language import load_texts
from difftuning_control.evaluation.report.lines import Line, line_chart
from difftuning_control.evaluation.report.page import write_page
from difftuning_control.system.terminal import duration, sample_command

ROLES = {"target": "your pictures", "bank": "knowledge bank"}
MOST_STEPS, MOST_POINTS = 8, 240  # rows of pictures, points of a line
QUALITY = 88  # of the pictures' JPEG
WIDE, NARROW = 1300, 380  # of a chart, in pixels: across a page, and on a telephone
BAND = re.compile(r"validation/(target|bank)_(\d\.\d)")
HEADING = ("model.id", "data.path", "output", "method")  # settings that the page names elsewhere


@dataclass(frozen=True)
class RunFacts:
    """What the page says of a run beside what lies in its folder.

    Args:
        status: running, stopped (it was interrupted), complete or failed.
        step, end: the steps that are done, and all.
        remaining: seconds until the end, where they can be told.
        error: what ended a failed run.
        base: the pretrained model's losses by role.
        phases: seconds by phase, with those of the sessions before.
        pictures: to tune on; None of a stream.
        prompts, side: of the sample grids, and their pictures' side in pixels.
        first_row: what a grid shows above the base's pictures.
        settings: the recipe by dotted key.
    """

    status: str
    step: int
    end: int
    remaining: float | None
    error: str | None
    base: Mapping[str, BandLosses]
    phases: Mapping[str, float]
    model: str
    family: str
    method: str
    pictures: int | None
    held_out: int
    bank: int
    prompts: Sequence[str]
    side: int
    first_row: str | None
    device: str
    settings: Sequence[tuple[str, Any]]


def write_training_report(folder: Path, facts: RunFacts) -> Path:
    """`report.html` of a run in its folder, whole or not at all, from `metrics.jsonl` and the sample grids there."""
    rows = _read_metrics(folder)
    bands = {role: _validations(rows, role) for role in facts.base}
    longest = max(facts.phases.values(), default=0.0) or 1.0
    settings = dict(facts.settings)
    return write_page(
        folder,
        "training.html.j2",
        "en",
        load_texts("en"),
        facts=facts,
        name=folder.name,
        place=shlex.quote(str(folder)),
        sample=sample_command(str(folder), facts.prompts),
        percent=100 * facts.step / max(1, facts.end),
        remaining=duration(facts.remaining) if facts.remaining is not None else None,
        total=duration(sum(facts.phases.values())),
        pictures=_picture_rows(folder, facts),
        losses=[("wide", loss_chart(folder, WIDE)), ("narrow", loss_chart(folder, NARROW))],
        latest=_latest(rows),
        bands=[_band_chart(role, facts.base[role], steps) for role, steps in bands.items()],
        table=_band_table(facts.base, bands),
        phases=[(n, duration(s), 100 * s / longest) for n, s in facts.phases.items()],
        settings=[(k, v) for k, v in facts.settings if k not in HEADING and v not in (None, [], {})],
        headline=[(k, settings.get(k)) for k in ("training.learning_rate", "training.batch_size")],
        roles=ROLES,
    )


def _read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log that can be read; the last may be half written."""
    path, rows = folder / "metrics.jsonl", []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return [row for row in rows if isinstance(row, dict) and "step" in row]


# --- losses ---------------------------------------------------------------------------------------------------------


def loss_chart(folder: Path, width: int) -> str:
    """The training loss of a run by role, a smoothed line over the means of neighbouring steps, as SVG for a page that
    is so many pixels wide; empty where no step is told of."""
    lines, shown = [], []
    for role in ROLES:
        steps = [(r["step"], r[f"{role}_loss"]) for r in _read_metrics(folder) if f"{role}_loss" in r]
        if not steps:
            continue
        x, y = _thinned(steps)
        smooth = _smoothed(y)
        lines += [Line(role, x, y, role, faint=True), Line(role, x, smooth, role)]
        shown += [v for v in (*smooth, *_middle(y)) if math.isfinite(v)]
    span = (min(shown), max(shown)) if shown else None
    return line_chart("training loss by role", lines, "step", span, width, 300 if width > NARROW else 260)


def _thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Means of as many neighbours as leave at most MOST_POINTS."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [g[-1][0] for g in groups], [sum(y for _, y in g) / len(g) for g in groups]


def _smoothed(values: Sequence[float]) -> list[float]:
    """Means over a tenth of the values around each."""
    half = max(1, len(values) // 20)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(w) / len(w) for w in windows]


def _middle(values: Sequence[float]) -> list[float]:
    """The values without the twentieth part at either end, which would squeeze the rest."""
    ordered = sorted(v for v in values if math.isfinite(v))
    cut = len(ordered) // 20
    return ordered[cut : len(ordered) - cut]


def _latest(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of the last twentieth of the steps by role."""
    means = {}
    for role in ROLES:
        values = [r[f"{role}_loss"] for r in rows if f"{role}_loss" in r]
        last = values[-max(1, len(values) // 20) :]
        if last:
            means[role] = sum(last) / len(last)
    return means


# --- validation -----------------------------------------------------------------------------------------------------


def _validations(rows: Sequence[Mapping[str, Any]], role: str) -> dict[int, list[float]]:
    """The losses on held-out rows by step, each band by band."""
    by_step = {}
    for row in rows:
        bands = {m[2]: v for k, v in row.items() if (m := BAND.fullmatch(k)) and m[1] == role}
        if bands:
            by_step[row["step"]] = [bands[u] for u in sorted(bands)]
    return by_step


def _band_chart(role: str, base: BandLosses, by_step: Mapping[int, Sequence[float]]) -> dict[str, Any]:
    """The losses by noise level: the base dashed, earlier steps faint, the last one full."""
    u, steps = base.centres, list(by_step)
    lines = [Line("pretrained", u, base.losses, "base", dashed=True, marked=True)]
    lines += [Line(f"step {step}", u, by_step[step], role, faint=True) for step in steps[:-1]]
    lines += [Line(f"step {step}", u, by_step[step], role, marked=True) for step in steps[-1:]]
    title, u_axis = f"loss by noise level on {ROLES[role]}", "noise level u"
    charts = [
        ("wide", line_chart(title, lines, u_axis)),
        ("narrow", line_chart(title, lines, u_axis, None, NARROW, 220)),
    ]
    return {"role": role, "charts": charts, "last": f"step {steps[-1]}" if steps else ""}


def _band_table(
    base: Mapping[str, BandLosses], by_role: Mapping[str, Mapping[int, Sequence[float]]]
) -> list[dict[str, Any]]:
    """The mean loss by step and role, with its change against the pretrained model."""
    steps = sorted({step for by_step in by_role.values() for step in by_step})
    rows: list[dict[str, Any]] = []
    if base:
        rows.append({"step": 0, **{role: (b.mean, None) for role, b in base.items()}})
    for step in steps[-12:]:
        row: dict[str, Any] = {"step": step}
        for role, by_step in by_role.items():
            if step in by_step:
                before, after = base[role].mean, _mean(by_step[step])
                row[role] = (after, after / before - 1 if before else None)
        rows.append(row)
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# --- pictures -------------------------------------------------------------------------------------------------------


def _picture_rows(folder: Path, facts: RunFacts) -> list[dict[str, Any]]:
    """What is shown of the sample grids: the condition, the base, and at most MOST_STEPS steps, the last one first."""
    grids = {int(p.stem[5:]): p for p in folder.glob("samples/step-*.png") if re.fullmatch(r"step-\d+", p.stem)}
    grids = {step: path for step, path in sorted(grids.items()) if step <= max(facts.step, 1)}
    steps = list(grids)
    if len(steps) > MOST_STEPS:
        steps = [steps[round(i * (len(steps) - 1) / (MOST_STEPS - 1))] for i in range(MOST_STEPS)]
    count = 3 if facts.first_row else 2
    rows: list[dict[str, Any]] = []
    for step in reversed(steps):
        try:
            with Image.open(grids[step]) as sheet:
                cells = grid_cells(sheet.convert("RGB"), count, len(facts.prompts), facts.side)
        except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
            continue  # a report without these pictures is better than none
        if not rows:
            names = [facts.first_row or "", "pretrained"][2 - (count - 1) :]
            above = [{"name": n, "kind": "base", "uris": _uris(row)} for n, row in zip(names, cells)]
        rows.append({"name": f"step {step}", "kind": "tuned", "uris": _uris(cells[-1])})
    return [*above, *rows] if rows else []


def _uris(pictures: Sequence[Image.Image]) -> list[str]:
    uris = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=QUALITY)
        uris.append("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
    return uris
