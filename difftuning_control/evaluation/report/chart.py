"""One chart of a report as SVG to set into HTML: no prolog, no font of its own, equal bytes for equal values."""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from difftuning_control.evaluation.comparison import is_number
from difftuning_control.evaluation.metric_table import METRICS
from difftuning_control.system.text import harmless

Texts = Mapping[str, str]
Entry = tuple[str, str, str | None, str]  # of a legend: label, colour, marker, line
Placed = tuple[float, str, str, str | None, str]

# Okabe and Ito's colours, which the colour-blind can tell apart, darkened where thin lines need it; and a marker each
SIDE_STYLES = {
    "base": ("#6b7680", "s"),
    "tuned": ("#0072b2", "o"),
    "plain": ("#d1495b", "D"),
    "prior": ("#d98e04", "v"),
    "difftuning_tau1": ("#0072b2", "o"),
    "difftuning_measured": ("#00876c", "^"),
    "difftuning_tau0.3": ("#56a3d9", "P"),
    "difftuning_budget": ("#8e5ea2", "X"),
}
OTHERS = ("#7a5230", "#2f4b7c", "#5c7f00", "#b0578d", "#00838f")
INK, SOFT, GRID = "#1f2a37", "#566270", "#e3e7ec"
TARGET, BANK, BUDGET = "#0072b2", "#d98e04", "#1f2a37"
LINKS = ("href", "clip-path")  # attributes that name an id
WIDTH, SIZE = 400.0, 10.5  # points
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "difftuning-control",
    "text.parse_math": False,
    "font.size": SIZE,
    "path.simplify": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.linewidth": 0.8,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "axes.unicode_minus": True,
    "lines.linewidth": 1.8,
}


class Chart:
    """One plot with its legend and the name of its y axis above it, laid out without measuring any font, in STYLE.

    Args:
        entries: (label, colour, marker, line) of the legend; the line "band" is a filled patch.
        y_label: above the axis.
        height: of the plot itself, in points.
        left: room for the labels of the y axis, in points.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        y_label: str | None,
        height: float = 190.0,
        left: float = 48.0,
    ):
        rows = _wrap(entries)
        top = 18.0 * len(rows) + (20.0 if y_label else 8.0)
        self.height = top + height + 44.0
        self.figure = Figure(figsize=(WIDTH / 72, self.height / 72), facecolor="none")
        FigureCanvasSVG(self.figure)
        box = (left / WIDTH, 44.0 / self.height, (WIDTH - left - 12) / WIDTH, height / self.height)
        self.axes: Axes = self.figure.add_axes(box, facecolor="none")
        self.axes.spines[["top", "right"]].set_visible(False)
        self.axes.grid(axis="y", color=GRID, linewidth=0.8)
        self.axes.set_axisbelow(True)
        self.axes.tick_params(length=3)
        self.axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        for number, row in enumerate(rows):
            self._legend(row, self.height - 18.0 * number - 11.0)
        if y_label:
            self._text(4, self.height - 18.0 * len(rows) - 12.0, harmless(y_label), color=SOFT, size=SIZE - 0.5)

    def _text(self, x: float, y: float, text: str, **style: Any) -> None:
        self.figure.text(x / WIDTH, y / self.height, text, va="center_baseline", **style)

    def _legend(self, row: Sequence[Placed], y: float) -> None:
        for x, label, colour, marker, line in row:
            band = line == "band"
            style = {"linestyle": "-", "linewidth": 9, "alpha": 0.2} if band else {"linestyle": line}
            ends, level = [x / WIDTH, (x + 24) / WIDTH], y / self.height
            shape = Line2D(ends, [level, level], color=colour, solid_capstyle="butt", **style)
            self.figure.add_artist(shape)
            if marker:
                middle = Line2D([(x + 12) / WIDTH], [level], color=colour, marker=marker, markersize=5)
                self.figure.add_artist(middle)
            self._text(x + (29 if line or marker else 0), y, label, color=INK)

    def x_label(self, text: str) -> None:
        """The name of the x axis, in the middle below it."""
        box = self.axes.get_position()
        self.figure.text((box.x0 + box.x1) / 2, 10 / self.height, harmless(text), ha="center", color=SOFT)

    def u_axis(self, t: Texts, label: str | None = None) -> None:
        self.axes.set_xlim(-0.02, 1.02)
        self.axes.xaxis.set_major_locator(FixedLocator([0, 0.2, 0.4, 0.6, 0.8, 1]))
        self.x_label(label or t["chart.u_axis"])

    def svg(self, title: str) -> str:
        buffer = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # the browser has the glyphs; nothing is measured here
            self.figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        return _clean(buffer.getvalue(), harmless(title))


def finite_or_nan(values: Sequence[float | None]) -> list[float]:
    """The values, with NaN, which is not drawn, for those that are none."""
    return [v if is_number(v) else np.nan for v in values]


def text_width(text: str) -> float:
    """A generous guess at a text's width in points, the same on every machine."""
    return SIZE * sum(1.0 if unicodedata.east_asian_width(c) in "WFA" else 0.57 for c in text)


def cut_text(text: str, width: float) -> str:
    if text_width(text) <= width:
        return text
    while text and text_width(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _wrap(entries: Sequence[Entry]) -> list[list[Placed]]:
    """The entries of a legend in rows, with the place of each."""
    rows: list[list[Placed]] = []
    x = WIDTH
    for entry in entries:
        label = cut_text(harmless(entry[0]), WIDTH - 44)
        needed = text_width(label) + 29
        if x + needed > WIDTH - 4:
            rows.append([])
            x = 4.0
        rows[-1].append((x, label, *entry[1:]))
        x += needed + 14
    return rows


def is_share(metric: str) -> bool:
    return metric in METRICS and METRICS[metric].is_share


def share_axis(axis: Axis, metric: str) -> None:
    if is_share(metric):
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{round(100 * v, 6):g}%"))


def percent_axis(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{round(100 * v, 6):+g}%" if v else "0%"))


def log_axis(axes: Axes, values: Sequence[float]) -> None:
    if not any(v > 0 for v in values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def _clean(text: str, title: str) -> str:
    """The bare <svg>: scales with the page, takes its font, and shares no id with another chart."""
    root = ElementTree.fromstring(re.sub(r"<!DOCTYPE[^>]*>", "", text))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # matplotlib's style would reach the whole page
                parent.remove(child)
    elements = list(root.iter())
    for e in elements:
        e.tag = e.tag.rpartition("}")[2]
        e.attrib = {k.rpartition("}")[2]: re.sub(r"\s+", " ", v).strip() for k, v in e.attrib.items()}
        e.text, e.tail = (e.text or None) if e.tag == "text" else None, None
        if "style" in e.attrib:
            e.set("style", re.sub(r"font-family:[^;]*;? ?", "", re.sub(r"(\d+\.\d{3})\d+", r"\1", e.attrib["style"])))
    used = set(
        re.findall(r"#([\w.-]+)\)?", " ".join(v for e in elements for k, v in e.items() if k in ("href", "clip-path")))
    )
    prefix = "c" + hashlib.sha256(text.encode() + title.encode()).hexdigest()[:10] + "-"
    for e in elements:
        if e.get("id") in used:
            e.set("id", prefix + e.attrib["id"])
        else:
            e.attrib.pop("id", None)
        for key in LINKS:
            if key in e.attrib:
                e.set(key, e.attrib[key].replace("#", "#" + prefix))
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg",
        "class": "chart",
        "role": "img",
        "aria-label": title,
        "viewBox": root.attrib["viewBox"],
        "stroke-linejoin": "round",
    }
    return ElementTree.tostring(root, encoding="unicode")
