"""Line charts as SVG whose colours the page's style gives, so that they follow its light and dark form.

A chart costs a millisecond and needs no matplotlib, since a run draws its own while it trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from difftuning_control.system.text import harmless

LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 40


@dataclass(frozen=True)
class Line:
    """Points of one line; `kind` is its class in the page's style: base, target or bank. `faint` ones lie below."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    kind: str
    faint: bool = False
    dashed: bool = False
    marked: bool = False


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, 1, 2 or 5 times a power of ten apart."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(f for f in (1, 2, 5, 10) if span / (step * f) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, int(math.floor(high / step + 1e-9)) + 1)]


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_range: tuple[float, float] | None = None,
    width: int = 640,
    height: int = 260,
) -> str:
    """The chart as one <svg>; points that are not finite are left out.

    Args:
        title: for who cannot see it.
        y_range: what is shown of the y axis; all of it when None. Lines are cut there.
        width: in the pixels of its text, which is as large as the page's where the chart is as wide as this.
    """
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y) if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return ""
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = y_range or (min(y for _, y in points), max(y for _, y in points))
    x_high = x_high if x_high > x_low else x_low + 1
    room = 0.06 * (y_high - y_low) or abs(y_high) * 0.1 or 1.0
    y_low, y_high = y_low - room, y_high + room

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (width - LEFT - RIGHT)
        up = TOP + (y_high - min(max(y, y_low), y_high)) / (y_high - y_low) * (height - TOP - BOTTOM)
        return round(across, 1), round(up, 1)

    parts = []
    for tick in ticks(y_low, y_high):
        _, y = place(x_low, tick)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{width - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{tick:.6g}</text>')
    for tick in ticks(x_low, x_high, 7):
        x, _ = place(tick, y_low)
        parts.append(f'<text class="tick" x="{x}" y="{height - BOTTOM + 18}" text-anchor="middle">{tick:.6g}</text>')
    middle = LEFT + (width - LEFT - RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{height - 5}" text-anchor="middle">{_safe(x_label)}</text>')
    for line in lines:
        dots = [place(x, y) for x, y in zip(line.x, line.y) if math.isfinite(x) and math.isfinite(y)]
        style = f"line {line.kind}{' faint' if line.faint else ''}{' dashed' if line.dashed else ''}"
        if len(dots) > 1:
            path = " ".join(f"{x},{y}" for x, y in dots)
            parts.append(f'<polyline class="{style}" points="{path}"><title>{_safe(line.name)}</title></polyline>')
        if line.marked or len(dots) == 1:
            parts += [f'<circle class="dot {line.kind}" cx="{x}" cy="{y}" r="3.2"/>' for x, y in dots]
    inside = "".join(parts)
    return f'<svg class="lines" viewBox="0 0 {width} {height}" role="img" aria-label="{_safe(title)}">{inside}</svg>'


def _safe(text: str) -> str:
    return escape(harmless(text))
