"""Findings of a report: for each sentence that its figures bear out a key of the language files, and what fills it.

A sentence that its figures do not bear out is not there: every function here leaves out what is missing or not finite,
and tells what is within the noise from what is beyond it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import Any

from difftuning_control.evaluation.band_losses import losses_at_best
from difftuning_control.evaluation.comparison import clear_sign, compare_sides, is_number, mean_spread
from difftuning_control.evaluation.curve import Curve, advice, against_limits
from difftuning_control.evaluation.pilot_figures import PilotBudget

Sentence = dict[str, Any]  # code: a key of the language files; values: what fills it, still numbers

ADVICE = ("uncertain", "no_gap", "wide", "not_monotone", "unclear", "flat", "rising")  # what matters most first

_CONSTANT = ("plain", "prior", "difftuning_measured")
COMPARED = {  # advice to compare in a pilot, and the sides of that
    "rising": _CONSTANT,
    "not_monotone": (*_CONSTANT, "difftuning_tau1"),
    "unclear": (*_CONSTANT, "difftuning_tau1"),
}


def sentence(code: str, **values: Any) -> Sentence:
    return {"code": code, "values": values}


# --- the transfer gap -----------------------------------------------------------------------------------------------


def gap_bands(analysis: Mapping[str, Any]) -> list[dict[str, float]]:
    """u, mean, low and high of every band where the transfer gap was measured."""
    return curve_bands(analysis.get("gap"), analysis.get("u"))


def curve_bands(curve: Mapping[str, Any] | None, u: Sequence[float] | None = None) -> list[dict[str, float]]:
    """u, mean, low and high of every band where all four are numbers."""
    if not curve:
        return []
    columns = {"u": curve.get("u") or u or [], **{k: curve.get(k) or [] for k in ("mean", "low", "high")}}
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    return [row for row in rows if all(map(is_number, row.values()))]


def curve_of(bands: Sequence[Mapping[str, float]]) -> Curve:
    return Curve(*([band[name] for band in bands] for name in ("u", "mean", "low", "high")))


def advice_of(analysis: Mapping[str, Any]) -> list[str]:
    """The codes of `advice` that the figures bear out, what matters most first; whatever the analysis said itself."""
    codes = advice(curve_of(gap_bands(analysis)))
    return [code for code in ADVICE if code in codes]


def compared_already(sides: Collection[str]) -> list[str]:
    """The codes of advice to compare in a pilot what a pilot of these sides has compared."""
    only = ("rising", "not_monotone")  # what else an unclear gap advises stays good advice
    return [code for code in only if set(COMPARED[code]) <= {*sides}]


def gap_sentences(bands: Sequence[Mapping[str, float]]) -> list[Sentence]:
    """The gap at the lowest and at the highest noise, and whether it is clearly something to learn."""
    if not bands:
        return []
    first, last = bands[0], bands[-1]
    if len(bands) == 1:
        said = [sentence("differs.gap_one", low=first["mean"], low_u=first["u"])]
    else:
        said = [
            sentence("differs.gap", low=first["mean"], low_u=first["u"], high=last["mean"], high_u=last["u"]),
        ]
    return [*said, sentence("differs.learn")] if all(band["low"] > 0 for band in (first, last)) else said


def extreme_cards(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a run forgot and learnt most: a label each, which says whether it is beyond the interval, and the band."""
    labels = {
        "forgetting": ("card.no_forgetting", "card.most_forgetting"),
        "learnt": ("card.no_learnt", "card.most_learnt"),
    }
    cards = []
    for name, (within, beyond) in labels.items():
        if bands := curve_bands(analysis.get(name)):
            most = max(bands, key=lambda band: band["mean"])
            cards.append({"label": beyond if most["low"] > 0 else within, **most})
    return cards


# --- forgetting -----------------------------------------------------------------------------------------------------


def loss_change(side: Mapping[str, Any], role: str) -> dict[str, Any] | None:
    """tuned / base − 1 of a role's loss by band at the best length: mean over the seeds and a spread each way.

    `seeds` holds the values of each band, one a seed; a band without any has NaN for a mean.
    """
    rows, u = [], None
    for losses in losses_at_best(side):
        if role in losses:
            base, tuned = losses[role].base, losses[role].tuned
            u = base.centres
            rows.append([_ratio(t, b) for t, b in zip(tuned.losses, base.losses)])
    columns = [[v for v in column if v is not None] for column in zip(*rows)]
    if u is None or not any(columns):
        return None
    stats = [mean_spread(column) for column in columns]
    mean = [float("nan") if m is None else m for m, _ in stats]
    spread = [s for _, s in stats]
    return {
        "label": side["name"],
        "u": u,
        "mean": mean,
        "spread": spread,
        "low": [m - (s or 0) for m, s in zip(mean, spread)],
        "high": [m + (s or 0) for m, s in zip(mean, spread)],
        "seeds": columns,
    }


def _ratio(after: Any, before: Any) -> float | None:
    return after / before - 1 if is_number(after) and is_number(before) and before > 0 else None


def mean_change(change: Mapping[str, Any]) -> float | None:
    """The mean over the bands that were measured."""
    known = [value for value in change["mean"] if is_number(value)]
    return fmean(known) if known else None


def forgetting_sentence(change: Mapping[str, Any]) -> Sentence | None:
    """Where a side forgets most and least, if the seeds bear that out; else the range of its changes."""
    bands = [i for i, value in enumerate(change["mean"]) if is_number(value)]
    if not bands:
        return None
    mean, u, seeds, side = change["mean"], change["u"], change["seeds"], change["label"]
    high, low = max(bands, key=mean.__getitem__), min(bands, key=mean.__getitem__)
    values = {"side": side, "u": u[high], "rise": mean[high], "least_u": u[low], "least": mean[low]}
    if len(bands) == 1:
        return sentence("differs.one_band", **values)
    if mean[high] <= 0:
        return sentence("differs.no_rise", **values)
    pairs = len(bands) * (len(bands) - 1) // 2  # among which the two were picked
    apart = [a - b for a, b in zip(seeds[high], seeds[low])] if len(seeds[high]) == len(seeds[low]) else []
    if clear_sign(apart, pairs) > 0 and clear_sign(seeds[high], len(bands)) > 0:
        return sentence("differs.worst", **values)
    return sentence("differs.within_noise", **values)


# --- the forgetting budget ------------------------------------------------------------------------------------------


def budget_of_run(forgetting: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each band of a run's forgetting with a budget: u, allowed, rise and finding (as `against_limits`)."""
    limits = dict(zip(forgetting["u"], forgetting["budget"]))
    bands = curve_bands(forgetting)
    codes = against_limits(curve_of(bands), [limits[band["u"]] for band in bands])
    return [
        {"u": band["u"], "allowed": limits[band["u"]], "rise": band["mean"], "finding": code}
        for band, code in zip(bands, codes)
    ]


def budget_of_pilot(budget: PilotBudget, side: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Of each band of a pilot's budget: u, allowed, rise and finding, by the noise of the seeds of its side."""
    allowed, rise = budget.allowed, budget.rise
    change = loss_change(side, "bank") if side is not None else None
    seeds = change["seeds"] if change is not None and len(change["seeds"]) == len(allowed) else [[]] * len(allowed)
    rows = []
    for i, (limit, measured, values) in enumerate(zip(allowed, rise, seeds)):
        sign = clear_sign([v - limit for v in values], len(allowed))
        code = "kept" if sign < 0 else "exceeded" if sign > 0 else "unclear"
        row = {"u": (i + 0.5) / len(allowed), "allowed": limit, "rise": measured, "finding": code}
        rows += [row] if is_number(measured) else []
    return rows


def budget_sentences(rows: Sequence[Mapping[str, Any]]) -> list[Sentence]:
    """In how many bands a budget was exceeded, and in how many that is within the noise; kept only if in all."""
    count = {code: sum(row["finding"] == code for row in rows) for code in ("kept", "exceeded", "unclear")}
    if rows and count["kept"] == len(rows):
        return [sentence("budget.kept")]
    codes = {"exceeded": "budget.exceeded", "unclear": "budget.unclear"}
    return [sentence(codes[code], count=count[code], bands=len(rows)) for code in codes if count[code]]


def budget_cost(
    side: Mapping[str, Any] | None, plain: Mapping[str, Any] | None, value: Any, sides: int
) -> Sentence | None:
    """What a budget cost on the target against plain fine-tuning."""
    comparison = compare_sides(side, plain, "target_loss", sides) if side is not None and plain is not None else None
    if comparison is None or not is_number(value):
        return None
    clear = "budget.free_cost" if comparison["better"] else "budget.price_cost"
    return sentence(clear if comparison["clear"] else "budget.unclear_cost", value=value)
