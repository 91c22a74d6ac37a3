"""Effects over targets: what sides of the study of eight targets differ by, with intervals.

Rows are those of targets.json. An effect is the mean over targets of log(KID of a side / KID of another), each a mean
over seeds; its interval is Student's over the targets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import mean, stdev
from typing import Any, NamedTuple


def cell_of(row: Mapping[str, Any]) -> tuple[str, int, str]:
    """Target, number of pictures and adapter of a row: the pilot that it is of."""
    return row["target"], row["n_images"], row["adapter"]


def by_target(rows: Sequence[Mapping[str, Any]], method: str, figure: str) -> dict[tuple, dict[int, float]]:
    """A side's figure by target, number of pictures and adapter, and by seed, where it was measured."""
    values: dict[tuple, dict[int, float]] = {}
    for row in rows:
        if row["method"] == method and row[figure] is not None:
            values.setdefault(cell_of(row), {})[row["seed"]] = row[figure]
    return values


def effect(
    rows: Sequence[Mapping[str, Any]], method: str, against: str, figure: str = "kid", ratio: bool = True
) -> tuple[float, float, float]:
    """Mean over targets of a side's relative (or absolute) difference to another, and its 95 % interval.

    The relative one is exp(mean over targets of log(mean over seeds / mean over seeds)) − 1. The interval is Student's
    over the targets, each the mean of its cells, which share its pictures: middle ± t(0.975, n − 1) · s / √n. Their
    spread has that of the seeds in it. Of one or two targets there is no interval, but NaN: it would say nothing.
    """
    from scipy.stats import t

    ours, theirs = (by_target(rows, name, figure) for name in (method, against))
    found: dict[str, list[float]] = {}
    for cell in sorted(set(ours) & set(theirs)):
        seeds = sorted(set(ours[cell]) & set(theirs[cell]))
        mine, other = (mean(side[cell][seed] for seed in seeds) for side in (ours, theirs))
        logs = (math.log(max(value, 1e-6)) for value in (mine, other))
        difference = next(logs) - next(logs) if ratio else mine - other
        found.setdefault(cell[0], []).append(difference)
    if not found:
        return math.nan, math.nan, math.nan
    values = [mean(cells) for cells in found.values()]
    middle, count = mean(values), len(values)
    half = float(t.ppf(0.975, count - 1)) * stdev(values) / math.sqrt(count) if count > 2 else math.nan
    ends = (middle, middle - half, middle + half)
    return tuple(math.expm1(v) for v in ends) if ratio else ends


def by_way(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the KID of each way of guidance at its best scale; `plain, ordinary` is what a stock pipeline draws."""
    return [
        {**row, "method": f"{row['method']}, {way}", "kid": kid}
        for row in rows
        for way, kid in row.get("kid_by_way", {}).items()
    ]


def at_end(rows: Sequence[Mapping[str, Any]], method: str, scale: float) -> tuple[int, int, int]:
    """In how many cells a side was best at the longest length, and at a scale of guidance; and of how many.

    At the ends of what was tried more might be better.
    """
    found = {cell_of(r): r for r in rows if r["method"] == method}
    longest = sum(r["steps"] == max(map(int, r["kid_by_length"])) for r in found.values())
    return longest, sum(r["guidance"] == scale for r in found.values()), len(found)


def seeds_needed(rows: Sequence[Mapping[str, Any]], difference: float = 0.1) -> float:
    """Pairs of runs after which a relative difference in KID is told from chance (5 %, power 80 %).

    From the spread over the seeds of log(KID / KID of plain), pooled over cells and sides: 7.85 s² / difference².
    """
    plain, spread = by_target(rows, "plain", "kid"), []
    for method in {row["method"] for row in rows} - {"plain", "base"}:
        for cell, seeds in by_target(rows, method, "kid").items():
            logs = [math.log(kid / plain[cell][seed]) for seed, kid in seeds.items() if seed in plain.get(cell, {})]
            spread += [stdev(logs) ** 2] if len(logs) > 1 else []
    return (1.96 + 0.84) ** 2 * mean(spread) / difference**2 if spread else math.nan


class Foresight(NamedTuple):
    """Mean relative difference in KID to plain fine-tuning, over cells.

    Args:
        foreseen: of the side that the transfer gap called for, by a threshold found without the cell's target.
        always: of the one side everywhere.
        hindsight: of the better of both in each cell.
    """

    foreseen: float
    always: float
    hindsight: float


def foresight(rows: Sequence[Mapping[str, Any]], method: str = "difftuning") -> Foresight | None:
    """Does the transfer gap of the pretrained model, measured before any training, say where a side beats plain?

    A threshold on the mean gap over the noise bands, on one side of which the method is taken and else plain
    fine-tuning; each target is judged by the threshold that is best for all others. None where no gap was measured.
    """
    ours, plain = by_target(rows, method, "kid"), by_target(rows, "plain", "kid")
    gaps = {cell_of(r): r.get("gap") for r in rows}
    gain = {
        c: math.log(mean(ours[c].values()) / mean(plain[c].values()))
        for c in set(ours) & set(plain)
        if gaps[c] is not None
    }
    if not gain:
        return None

    def total(cells: Sequence[tuple], rule: tuple[float, bool]) -> float:
        threshold, beyond = rule
        return sum(gain[c] for c in cells if (gaps[c] >= threshold) == beyond)

    cells, found = sorted(gain), 0.0
    for target in {c[0] for c in cells}:
        others, own = [c for c in cells if c[0] != target], [c for c in cells if c[0] == target]
        values = sorted(gaps[c] for c in others)
        thresholds = [-math.inf, *((a + b) / 2 for a, b in pairwise(values))]  # with which "never" is one of the rules
        rules = [(threshold, beyond) for threshold in thresholds for beyond in (True, False)]
        found += total(own, min(rules, key=lambda rule: total(others, rule)))
    sums = (found, sum(gain.values()), sum(min(v, 0.0) for v in gain.values()))
    return Foresight(*(math.expm1(v / len(cells)) for v in sums))
