"""The charts of the reports: figures of pilots, analyses and ControlNets by noise level, side, length or step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from difftuning_control.evaluation.comparison import is_number, mean_spread, seed_values
from difftuning_control.evaluation.fidelity_record import FidelityRecord
from difftuning_control.evaluation.report.chart import (
    BANK,
    BUDGET,
    GRID,
    INK,
    OTHERS,
    SIDE_STYLES,
    SOFT,
    STYLE,
    TARGET,
    Chart,
    Entry,
    Texts,
    cut_text,
    finite_or_nan,
    is_share,
    log_axis,
    percent_axis,
    share_axis,
    text_width,
)
from difftuning_control.evaluation.report.side_names import side_label
from difftuning_control.system.text import harmless


def side_style(name: str) -> tuple[str, str]:
    """Colour and marker of a side, the same in every chart."""
    number = int(hashlib.sha256(name.encode("utf-8", "replace")).hexdigest(), 16)
    return SIDE_STYLES.get(name, (OTHERS[number % len(OTHERS)], "ph*<>"[number // 7 % 5]))


def metric_label(metric: str, t: Texts) -> str:
    return t.get(f"metric.{metric}", metric)


@mpl.rc_context(STYLE)
def gap_chart(analysis: Mapping[str, Any], t: Texts) -> str:
    """The relative transfer gap by noise band, with its interval."""
    (mean, low, high), u = (finite_or_nan(analysis["gap"][k]) for k in ("mean", "low", "high")), analysis["u"]
    chart = Chart(
        [(t["chart.gap"], TARGET, "o", "-"), (t["chart.interval"], TARGET, None, "band")], t["chart.gap_axis"]
    )
    chart.u_axis(t)
    percent_axis(chart.axes)
    chart.axes.axhline(0, color="#9aa5b1", linewidth=0.8)
    chart.axes.fill_between(u, low, high, color=TARGET, alpha=0.16, linewidth=0)
    chart.axes.plot(u, mean, color=TARGET, marker="o", markersize=5)
    return chart.svg(t["chart.gap"])


@mpl.rc_context(STYLE)
def loss_chart(analysis: Mapping[str, Any], t: Texts) -> str:
    """The pretrained model's loss on the target and on the bank, by noise band."""
    roles = (("target", TARGET, "o"), ("bank", BANK, "s"))
    chart = Chart([(t[f"role.{role}"], colour, marker, "-") for role, colour, marker in roles], t["chart.loss_axis"])
    chart.u_axis(t)
    for role, colour, marker in roles:
        chart.axes.plot(analysis["u"], finite_or_nan(analysis[role]["loss"]), color=colour, marker=marker, markersize=5)
    log_axis(chart.axes, [v for role, _, _ in roles for v in finite_or_nan(analysis[role]["loss"])])
    return chart.svg(t["chart.loss"])


@mpl.rc_context(STYLE)
def forgetting_chart(sides: Sequence[Mapping[str, Any]], budget: Sequence[float] | None, t: Texts) -> str:
    """The rise of the bank loss by noise band.

    Args:
        sides: {label, u, mean, low, high} each; low and high may be None, label is a side's name or any words.
        budget: the rise allowed in each band of the first side's u.
    """
    entries: list[Entry] = [(side_label(s["label"], t), *side_style(s["label"]), "-") for s in sides]
    if budget is not None:
        entries.append((t["chart.budget"], BUDGET, None, "--"))
    chart = Chart(entries, t["chart.forgetting_axis"])
    chart.u_axis(t)
    percent_axis(chart.axes)
    chart.axes.axhline(0, color="#9aa5b1", linewidth=0.8)
    for side, (_, colour, marker, _) in zip(sides, entries):
        if side.get("low") is not None and side.get("high") is not None:
            low, high = finite_or_nan(side["low"]), finite_or_nan(side["high"])
            chart.axes.fill_between(side["u"], low, high, color=colour, alpha=0.13, linewidth=0)
        chart.axes.plot(side["u"], finite_or_nan(side["mean"]), color=colour, marker=marker, markersize=5)
    if budget is not None:
        chart.axes.plot(sides[0]["u"], budget, color=BUDGET, linestyle="--", linewidth=1.4)
    return chart.svg(t["chart.forgetting"])


@mpl.rc_context(STYLE)
def schedule_chart(schedules: Sequence[Mapping[str, Any]], t: Texts) -> str:
    """ψ (solid) and ξ (dashed) over u of {label, u, psi, xi}."""
    colours: list[tuple[str, str | None]] = [(TARGET, "o"), ("#8a949e", None), (BANK, "s"), ("#8e5ea2", "^")]
    entries: list[Entry] = [
        (f"{side_label(s['label'], t)}: {symbol}", *colours[i % len(colours)], line)
        for i, s in enumerate(schedules)
        for symbol, line in (("ψ", "-"), ("ξ", "--"))
    ]
    chart = Chart(entries, t["chart.schedule_axis"])
    chart.u_axis(t)
    for i, s in enumerate(schedules):
        colour, marker = colours[i % len(colours)]
        for key, line in (("psi", "-"), ("xi", "--")):
            chart.axes.plot(s["u"], s[key], color=colour, marker=marker, markersize=4, linestyle=line)
    chart.axes.set_ylim(bottom=0)
    return chart.svg(t["chart.schedule"])


@mpl.rc_context(STYLE)
def multipliers_chart(multipliers: Mapping[str, Any], t: Texts) -> str:
    """The multiplier of each noise band over the steps of a run."""
    values = np.array(multipliers["values"], dtype=float).reshape(len(multipliers["step"]), -1)
    count = values.shape[1]
    centres = multipliers.get("u") or [(i + 0.5) / count for i in range(count)]
    shades = [mpl.colors.to_hex(c) for c in mpl.colormaps["viridis"](np.linspace(0.0, 0.85, count))]
    chart = Chart([(f"u = {u:.2g}", c, None, "-") for u, c in zip(centres, shades)], t["chart.multipliers_axis"])
    for i, colour in enumerate(shades):
        chart.axes.plot(multipliers["step"], values[:, i], color=colour)
    chart.x_label(t["chart.steps"])
    chart.axes.set_ylim(bottom=0)
    return chart.svg(t["chart.multipliers"])


@mpl.rc_context(STYLE)
def staged_chart(staged: Mapping[str, Any], t: Texts, metric: str = "kid") -> str:
    """Quality against the noise level u0 at which the tuned model hands over to the pretrained one, or the reverse."""
    ways = (("tuned_above", TARGET, "o", "-"), ("tuned_below", BANK, "s", "--"))
    chart = Chart([(t[f"chart.{way[0]}"], *way[1:]) for way in ways], metric_label(metric, t))
    for way, colour, marker, line in ways:
        chart.axes.plot(
            staged["u0"], finite_or_nan(staged[way][metric]), color=colour, marker=marker, markersize=5, linestyle=line
        )
    share_axis(chart.axes.yaxis, metric)
    chart.u_axis(t, t["chart.u0_axis"])
    return chart.svg(t["chart.staged"])


@mpl.rc_context(STYLE)
def sides_chart(sides: Sequence[Mapping[str, Any]], metric: str, t: Texts, base: float | None = None) -> str:
    """One dot a seed at each side's best length, with mean and spread; the pretrained model's value as a line."""
    labels = [side_label(s["name"], t) for s in sides]
    room = min(max((text_width(harmless(label)) for label in labels), default=0), 190.0)
    entries: list[Entry] = [(t["chart.seed"], SOFT, "o", ""), (t["chart.mean_spread"], INK, "|", "-")]
    every = [v for s in sides for v in seed_values(s, metric).values()]
    low, high = min(every, default=0.0), max(every, default=0.0)
    reach = 1.5 * (high - low)
    far = False
    if is_number(base):
        far = not low - reach <= base <= high + reach  # a line there would squeeze the dots
        value = f"{100 * base:.3g}%" if is_share(metric) else f"{base:.3g}"
        label = t["chart.off_scale"].format(side=side_label("base", t), value=value) if far else side_label("base", t)
        entries.append((label, SIDE_STYLES["base"][0], None, "" if far else "--"))
    chart = Chart(entries, None, height=26.0 * len(sides) + 8, left=room + 18)
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
        axes.axvline(base, color=SIDE_STYLES["base"][0], linestyle="--", linewidth=1.3)
    axes.margins(x=0.06)
    axes.set_ylim(len(sides) - 0.45, -0.55)
    axes.yaxis.set_major_locator(FixedLocator(range(len(sides))))
    axes.set_yticklabels([cut_text(harmless(label), room) for label in labels], color=INK)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.spines["left"].set_visible(False)
    share_axis(axes.xaxis, metric)
    chart.x_label(metric_label(metric, t))
    return chart.svg(metric_label(metric, t))


@mpl.rc_context(STYLE)
def length_chart(sides: Sequence[Mapping[str, Any]], metric: str, t: Texts) -> str:
    """A metric against training steps: a line a side, mean over the seeds with spread."""
    entries = [(side_label(s["name"], t), *side_style(s["name"]), "-") for s in sides]
    chart = Chart(entries, metric_label(metric, t))
    lengths = sorted({r["steps"] for s in sides for r in s["runs"]})
    apart = 0.012 * (lengths[-1] - lengths[0]) if lengths else 0.0
    for i, (side, (_, colour, marker, _)) in enumerate(zip(sides, entries)):
        points = [(n, *mean_spread(list(seed_values(side, metric, n).values()))) for n in lengths]
        marks = [(n + (i - (len(sides) - 1) / 2) * apart, m, s or 0.0) for n, m, s in points if m is not None]
        if marks:
            x, mean, spread = np.array(marks).T
            chart.axes.errorbar(x, mean, spread, color=colour, marker=marker, markersize=5.5, elinewidth=1, capsize=0)
    chart.axes.xaxis.set_major_locator(FixedLocator(lengths))
    share_axis(chart.axes.yaxis, metric)
    chart.x_label(t["chart.steps"])
    return chart.svg(metric_label(metric, t))


@mpl.rc_context(STYLE)
def fidelity_chart(curve: FidelityRecord, metric: str, t: Texts) -> str:
    """A figure of a ControlNet's fidelity over its steps, and of the model without it; on the main figure the rise."""
    points = [(s, v) for s, v in zip(curve.steps, curve.figures[metric]) if is_number(v)]
    marker = "o" if len(points) <= 60 else None  # more would hide the curve
    without, rise = curve.without.get(metric), curve.convergence if metric == curve.main else None
    entries: list[Entry] = [(t["chart.controlled"], TARGET, marker, "-")]
    if is_number(without):
        entries.append((t["chart.uncontrolled"], SIDE_STYLES["base"][0], None, "--"))
    if rise is not None:
        entries.append((t["chart.rise"], BANK, None, "band"))
        entries.append((t["chart.half_step"].format(step=f"{rise.step:.0f}"), INK, None, ":"))
    chart = Chart(entries, metric_label(metric, t))
    axes = chart.axes
    if rise is not None:
        axes.axvspan(rise.start, rise.end, color=BANK, alpha=0.2, linewidth=0)
        axes.axvline(rise.step, color=INK, linestyle=":", linewidth=1.4)
    if is_number(without):
        axes.axhline(without, color=SIDE_STYLES["base"][0], linestyle="--", linewidth=1.4)
    axes.plot([s for s, _ in points], [v for _, v in points], color=TARGET, marker=marker, markersize=4)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f}"))
    chart.x_label(t["chart.steps"])
    return chart.svg(metric_label(metric, t))
