"""Figures of the reports as SVG to set into HTML: no prolog, no font of their own, equal bytes for equal values."""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from difftuning_control.evaluation.comparison import is_number, mean_spread, seed_values
from difftuning_control.system.text import harmless

Words = Mapping[str, str]
Entry = tuple[str, str, str | None, str]  # of a legend: label, colour, marker, line
Placed = tuple[float, str, str, str | None, str]

# Okabe and Ito's colours, which the colour-blind can tell apart, darkened where thin lines need it; and a marker each
SIDES = {
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
SHARES = ("domain_hit", "domain_judge")  # metrics in per cent
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


def side_style(name: str) -> tuple[str, str]:
    """Colour and marker of a side, the same in every chart."""
    number = int(hashlib.sha256(name.encode("utf-8", "replace")).hexdigest(), 16)
    return SIDES.get(name, (OTHERS[number % len(OTHERS)], "ph*<>"[number // 7 % 5]))


def side_label(name: str, t: Words) -> str:
    return t.get(f"side.{name}", name)


def metric_label(metric: str, t: Words) -> str:
    return t.get(f"metric.{metric}", metric)


@mpl.rc_context(STYLE)
def gap_chart(analysis: Mapping[str, Any], t: Words) -> str:
    """The relative transfer gap by noise band, with its interval."""
    gap, u = analysis["gap"], analysis["u"]
    chart = _Chart(
        [(t["chart.gap"], TARGET, "o", "-"), (t["chart.interval"], TARGET, None, "band")], t["chart.gap_axis"]
    )
    chart.u_axis(t)
    _percent(chart.axes)
    chart.axes.axhline(0, color="#9aa5b1", linewidth=0.8)
    chart.axes.fill_between(u, gap["low"], gap["high"], color=TARGET, alpha=0.16, linewidth=0)
    chart.axes.plot(u, gap["mean"], color=TARGET, marker="o", markersize=5)
    return chart.svg(t["chart.gap"])


@mpl.rc_context(STYLE)
def loss_chart(analysis: Mapping[str, Any], t: Words) -> str:
    """The pretrained model's loss on the target and on the bank, by noise band."""
    roles = (("target", TARGET, "o"), ("bank", BANK, "s"))
    chart = _Chart([(t[f"role.{role}"], colour, marker, "-") for role, colour, marker in roles], t["chart.loss_axis"])
    chart.u_axis(t)
    for role, colour, marker in roles:
        chart.axes.plot(analysis["u"], analysis[role]["loss"], color=colour, marker=marker, markersize=5)
    _log_axis(chart.axes, [v for role, _, _ in roles for v in analysis[role]["loss"]])
    return chart.svg(t["chart.loss"])


@mpl.rc_context(STYLE)
def forgetting_chart(sides: Sequence[Mapping[str, Any]], budget: Sequence[float] | None, t: Words) -> str:
    """The rise of the bank loss by noise band.

    Args:
        sides: {label, u, mean, low, high} each; low and high may be None, label is a side's name or any words.
        budget: the rise allowed in each band of the first side's u.
    """
    entries: list[Entry] = [(side_label(s["label"], t), *side_style(s["label"]), "-") for s in sides]
    if budget is not None:
        entries.append((t["chart.budget"], BUDGET, None, "--"))
    chart = _Chart(entries, t["chart.forgetting_axis"])
    chart.u_axis(t)
    _percent(chart.axes)
    chart.axes.axhline(0, color="#9aa5b1", linewidth=0.8)
    for side, (_, colour, marker, _) in zip(sides, entries):
        if side.get("low") is not None and side.get("high") is not None:
            chart.axes.fill_between(side["u"], side["low"], side["high"], color=colour, alpha=0.13, linewidth=0)
        chart.axes.plot(side["u"], side["mean"], color=colour, marker=marker, markersize=5)
    if budget is not None:
        chart.axes.plot(sides[0]["u"], budget, color=BUDGET, linestyle="--", linewidth=1.4)
    return chart.svg(t["chart.forgetting"])


@mpl.rc_context(STYLE)
def schedule_chart(schedules: Sequence[Mapping[str, Any]], t: Words) -> str:
    """ψ (solid) and ξ (dashed) over u of {label, u, psi, xi}."""
    colours: list[tuple[str, str | None]] = [(TARGET, "o"), ("#8a949e", None), (BANK, "s"), ("#8e5ea2", "^")]
    entries: list[Entry] = [
        (f"{side_label(s['label'], t)}: {symbol}", *colours[i % len(colours)], line)
        for i, s in enumerate(schedules)
        for symbol, line in (("ψ", "-"), ("ξ", "--"))
    ]
    chart = _Chart(entries, t["chart.schedule_axis"])
    chart.u_axis(t)
    for i, s in enumerate(schedules):
        colour, marker = colours[i % len(colours)]
        for key, line in (("psi", "-"), ("xi", "--")):
            chart.axes.plot(s["u"], s[key], color=colour, marker=marker, markersize=4, linestyle=line)
    chart.axes.set_ylim(bottom=0)
    return chart.svg(t["chart.schedule"])


@mpl.rc_context(STYLE)
def multipliers_chart(multipliers: Mapping[str, Any], t: Words) -> str:
    """The multiplier of each noise band over the steps of a run."""
    values = np.array(multipliers["values"], dtype=float).reshape(len(multipliers["step"]), -1)
    count = values.shape[1]
    centres = multipliers.get("u") or [(i + 0.5) / count for i in range(count)]
    shades = [mpl.colors.to_hex(c) for c in mpl.colormaps["viridis"](np.linspace(0.0, 0.85, count))]
    chart = _Chart([(f"u = {u:.2g}", c, None, "-") for u, c in zip(centres, shades)], t["chart.multipliers_axis"])
    for i, colour in enumerate(shades):
        chart.axes.plot(multipliers["step"], values[:, i], color=colour)
    chart.x_label(t["chart.steps"])
    chart.axes.set_ylim(bottom=0)
    return chart.svg(t["chart.multipliers"])


@mpl.rc_context(STYLE)
def staged_chart(staged: Mapping[str, Any], t: Words, metric: str = "kid") -> str:
    """Quality against the noise level u0 at which the tuned model hands over to the pretrained one, or the reverse."""
    ways = (("tuned_above", TARGET, "o", "-"), ("tuned_below", BANK, "s", "--"))
    chart = _Chart([(t[f"chart.{way[0]}"], *way[1:]) for way in ways], metric_label(metric, t))
    for way, colour, marker, line in ways:
        values = [np.nan if v is None else v for v in staged[way][metric]]
        chart.axes.plot(staged["u0"], values, color=colour, marker=marker, markersize=5, linestyle=line)
    _share(chart.axes.yaxis, metric)
    chart.u_axis(t, t["chart.u0_axis"])
    return chart.svg(t["chart.staged"])


@mpl.rc_context(STYLE)
def sides_chart(sides: Sequence[Mapping[str, Any]], metric: str, t: Words, base: float | None = None) -> str:
    """One dot a seed at each side's best length, with mean and spread; the pretrained model's value as a line."""
    labels = [side_label(s["name"], t) for s in sides]
    room = min(max((_width(harmless(label)) for label in labels), default=0), 190.0)
    entries: list[Entry] = [(t["chart.seed"], SOFT, "o", ""), (t["chart.mean_spread"], INK, "|", "-")]
    every = [v for s in sides for v in seed_values(s, metric).values()]
    low, high = min(every, default=0.0), max(every, default=0.0)
    reach = 1.5 * (high - low)
    far = False
    if is_number(base):
        far = not low - reach <= base <= high + reach  # a line there would squeeze the dots
        value = f"{100 * base:.3g}%" if metric in SHARES else f"{base:.3g}"
        label = t["chart.off_scale"].format(side=side_label("base", t), value=value) if far else side_label("base", t)
        entries.append((label, SIDES["base"][0], None, "" if far else "--"))
    chart = _Chart(entries, None, height=26.0 * len(sides) + 8, left=room + 18)
    axes = chart.axes
    for row, side in enumerate(sides):
        values = list(seed_values(side, metric).values())
        colour, _ = side_style(side["name"])
        mean, spread = mean_spread(values)
        if mean is None:
            continue
        offsets = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else [0.0]
        axes.plot(values, row + np.array(offsets), "o", color=colour, markersize=6, alpha=0.55, markeredgewidth=0)
        if spread is not None:
            axes.plot([mean - spread, mean + spread], [row, row], color=INK, linewidth=1.3)
        axes.plot([mean], [row], "|", color=INK, markersize=13, markeredgewidth=2.2)
    if is_number(base) and not far:
        axes.axvline(base, color=SIDES["base"][0], linestyle="--", linewidth=1.3)
    axes.margins(x=0.06)
    axes.set_ylim(len(sides) - 0.45, -0.55)
    axes.yaxis.set_major_locator(FixedLocator(range(len(sides))))
    axes.set_yticklabels([_cut(harmless(label), room) for label in labels], color=INK)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.spines["left"].set_visible(False)
    _share(axes.xaxis, metric)
    chart.x_label(metric_label(metric, t))
    return chart.svg(metric_label(metric, t))


@mpl.rc_context(STYLE)
def length_chart(sides: Sequence[Mapping[str, Any]], metric: str, t: Words) -> str:
    """A metric against training steps: a line a side, mean over the seeds with spread."""
    entries = [(side_label(s["name"], t), *side_style(s["name"]), "-") for s in sides]
    chart = _Chart(entries, metric_label(metric, t))
    lengths = sorted({r["steps"] for s in sides for r in s["runs"]})
    apart = 0.012 * (lengths[-1] - lengths[0]) if lengths else 0.0
    for i, (side, (_, colour, marker, _)) in enumerate(zip(sides, entries)):
        points = [(n, *mean_spread(list(seed_values(side, metric, n).values()))) for n in lengths]
        found = [(n + (i - (len(sides) - 1) / 2) * apart, m, s or 0.0) for n, m, s in points if m is not None]
        if found:
            x, mean, spread = np.array(found).T
            chart.axes.errorbar(x, mean, spread, color=colour, marker=marker, markersize=5.5, elinewidth=1, capsize=0)
    chart.axes.xaxis.set_major_locator(FixedLocator(lengths))
    _share(chart.axes.yaxis, metric)
    chart.x_label(t["chart.steps"])
    return chart.svg(metric_label(metric, t))


@mpl.rc_context(STYLE)
def fidelity_chart(curve: Mapping[str, Any], metric: str, t: Words) -> str:
    """A figure of a ControlNet's fidelity over its steps, and of the model without it; on the main figure the rise."""
    points = [(s, v) for s, v in zip(curve["steps"], curve["figures"][metric]) if is_number(v)]
    marker = "o" if len(points) <= 60 else None  # more would hide the curve
    without, rise = curve["without"].get(metric), curve["convergence"] if metric == curve["main"] else None
    entries: list[Entry] = [(t["chart.controlled"], TARGET, marker, "-")]
    if is_number(without):
        entries.append((t["chart.uncontrolled"], SIDES["base"][0], None, "--"))
    if rise is not None:
        entries.append((t["chart.rise"], BANK, None, "band"))
        entries.append((t["chart.half_step"].format(step=f"{rise['step']:.0f}"), INK, None, ":"))
    chart = _Chart(entries, metric_label(metric, t))
    axes = chart.axes
    if rise is not None:
        axes.axvspan(rise["start"], rise["end"], color=BANK, alpha=0.2, linewidth=0)
        axes.axvline(rise["step"], color=INK, linestyle=":", linewidth=1.4)
    if is_number(without):
        axes.axhline(without, color=SIDES["base"][0], linestyle="--", linewidth=1.4)
    axes.plot([s for s, _ in points], [v for _, v in points], color=TARGET, marker=marker, markersize=4)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f}"))
    chart.x_label(t["chart.steps"])
    return chart.svg(metric_label(metric, t))


class _Chart:
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

    def u_axis(self, t: Words, label: str | None = None) -> None:
        self.axes.set_xlim(-0.02, 1.02)
        self.axes.xaxis.set_major_locator(FixedLocator([0, 0.2, 0.4, 0.6, 0.8, 1]))
        self.x_label(label or t["chart.u_axis"])

    def svg(self, title: str) -> str:
        buffer = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # the browser has the glyphs; nothing is measured here
            self.figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        return _clean(buffer.getvalue(), harmless(title))


def _width(text: str) -> float:
    """A generous guess at a text's width in points, the same on every machine."""
    return SIZE * sum(1.0 if unicodedata.east_asian_width(c) in "WFA" else 0.57 for c in text)


def _cut(text: str, width: float) -> str:
    if _width(text) <= width:
        return text
    while text and _width(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _wrap(entries: Sequence[Entry]) -> list[list[Placed]]:
    """The entries of a legend in rows, with the place of each."""
    rows: list[list[Placed]] = []
    x = WIDTH
    for entry in entries:
        label = _cut(harmless(entry[0]), WIDTH - 44)
        needed = _width(label) + 29
        if x + needed > WIDTH - 4:
            rows.append([])
            x = 4.0
        rows[-1].append((x, label, *entry[1:]))
        x += needed + 14
    return rows


def _share(axis: Axis, metric: str) -> None:
    if metric in SHARES:
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{round(100 * v, 6):g}%"))


def _percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{round(100 * v, 6):+g}%" if v else "0%"))


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
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
