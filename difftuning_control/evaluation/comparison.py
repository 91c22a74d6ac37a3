"""Comparisons of a pilot's sides, seed by seed: a difference, the noise of the seeds, and what is clear beyond it.

The verdict is made of numbers and codes; a report puts them into words. A domain hit rate is a count of pictures, so a
bar because of it takes two tests, and both must reject chance:

- Student's t over the seeds, the test of every other figure: it knows how much one training differs from the next, but
  takes rates that happen to agree in all seeds (15 of 16 pictures in each) for exact;
- Fisher's exact test on the pictures of all seeds: it knows how little a few pictures say, at any number of them, but
  takes pictures of one training for independent.

A permutation of the seeds is no third way: with 3 pairs its p-value cannot fall below 1/8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, Protocol, TypeGuard

from difftuning_control.evaluation.metric_table import lower_is_better

PLAIN = "plain"
LEVEL = 0.05
GUARD = 0.05  # a side that hits the domain clearly, and by more than this, less often than plain cannot win


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def seed_values(side: Mapping[str, Any], metric: str, length: int | None = None) -> dict[int, float]:
    """A metric by seed at a length, the side's best one by default; seeds without a finite value are left out."""
    length = side["best_length"] if length is None else length
    return {r["seed"]: r[metric] for r in side["runs"] if r["steps"] == length and is_number(r.get(metric))}


def mean_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None for what too few values do not have."""
    return (fmean(values) if values else None), (stdev(values) if len(values) > 1 else None)


def threshold(seeds: int, sides: int) -> float:
    """How many standard errors a difference over so many seeds must have, if one of `sides` such is to be called clear.

    The one-sided 5 % quantile of Student's t with seeds − 1 degrees of freedom, shared out among the sides
    (Bonferroni): without it, one pilot in five without any effect would name a winner.
    """
    from scipy.stats import t  # takes a second to import

    return float(t.ppf(1 - LEVEL / sides, seeds - 1)) if seeds > 1 else math.inf


def compare_sides(
    side: Mapping[str, Any], plain: Mapping[str, Any], metric: str, sides: int = 1
) -> dict[str, Any] | None:
    """plain − side at each one's best length: by seed where both have the same seeds, else of the means.

    It is clear if the mean is more standard errors from 0 than `threshold` and all seeds agree in sign; without pairs,
    if all of one side lie on one side of all of the other. None where a side has no value.
    """
    mine, theirs = seed_values(side, metric), seed_values(plain, metric)
    if not mine or not theirs:
        return None
    ours, base = fmean(mine.values()), fmean(theirs.values())
    spread: float | None
    error: float | None = None
    paired = set(mine) == set(theirs)
    if paired:
        differences = [theirs[s] - mine[s] for s in sorted(mine)]
        mean, spread = fmean(differences), mean_spread(differences)[1]
        error = None if spread is None else spread / math.sqrt(len(differences))
        agree = all(d > 0 for d in differences) or all(d < 0 for d in differences)
    else:
        mean, spread = base - ours, None
        if len(mine) > 1 and len(theirs) > 1:
            error = math.hypot(*(stdev(v) / math.sqrt(len(v)) for v in (list(mine.values()), list(theirs.values()))))
        agree = max(mine.values()) < min(theirs.values()) or min(mine.values()) > max(theirs.values())
    needed = threshold(min(len(mine), len(theirs)), sides)
    return {
        "side": side["name"],
        "value": ours,
        "plain": base,
        "difference": mean,
        "spread": spread,
        "standard_error": error,
        "change": (ours - base) / base if base > 0 else None,
        "seeds": min(len(mine), len(theirs)),
        "paired": paired,
        "agree": agree,
        "better": (mean > 0) == lower_is_better(metric) and mean != 0,
        "clear": error is not None and abs(mean) > needed * error and agree,
        "threshold": needed if math.isfinite(needed) else None,
    }


class Compared(Protocol):
    """What a verdict is on: of a pilot's record its primary figure, its sides and the base."""

    primary: str
    sides: list[dict[str, Any]]
    base: dict[str, Any]


def verdict(pilot: Compared) -> dict[str, Any]:
    """Which side of a pilot won on its primary metric, against plain fine-tuning and the noise of the seeds.

    Returns:
        code: winner (a side is clearly better than plain), plain (every other side is clearly worse than plain or
            barred), or none.
        reason: why there is no winner: no_plain, alone, unmeasured, one_seed, barred (only a barred side was clearly
            better), within_noise; None otherwise.
        side: the winner or plain; with none, the best mean of the sides that may win.
        also: other sides that are clearly better than plain, best first.
        barred: sides that clearly hit the domain too seldom to win.
        doubted: sides that hit it too seldom on average, but within the noise of seeds or pictures; they may win.
        comparisons: one `compare_sides` for each side but plain, with `barred`.
        retention: `compare_sides` on the bank loss, of the side that may win and forgets least, if that beats plain's.
        base: the pretrained model against the sides that may win: better (clearly, than each of them), unclear (none
            of them is clearly better than it), or None.
        base_better: whether `base` says anything.
    """
    metric = pilot.primary
    sides = {s["name"]: s for s in pilot.sides}
    plain = sides.get(PLAIN)
    bars = {n: domain_bar(s, plain, len(sides) - 1) for n, s in sides.items() if plain is not None and n != PLAIN}
    barred, doubted = ([n for n, bar in bars.items() if bar == kind] for kind in ("barred", "doubted"))
    means = {n: fmean(v.values()) for n, s in sides.items() if n not in barred and (v := seed_values(s, metric))}
    sign = 1 if lower_is_better(metric) else -1
    order = sorted(means, key=lambda n: sign * means[n])
    against_base = _against_base([sides[n] for n in order], pilot.base, metric)
    judged: dict[str, Any] = {
        "code": "none",
        "reason": None,
        "metric": metric,
        "lower": sign > 0,
        "side": order[0] if order else None,
        "also": [],
        "barred": barred,
        "doubted": doubted,
        "comparisons": [],
        "retention": None,
        "base": against_base,
        "base_better": against_base is not None,
    }
    if plain is None:
        return judged | {"reason": "no_plain"}
    if len(sides) == 1:
        return judged | {"reason": "alone"}
    others = [s for n, s in sides.items() if n != PLAIN]
    compared = [
        c | {"barred": s["name"] in barred} for s in others if (c := compare_sides(s, plain, metric, len(others)))
    ]
    judged |= {"comparisons": compared, "retention": _retention(others, plain, barred)}
    if PLAIN not in means or not compared:
        return judged | {"reason": "unmeasured"}
    clear = {c["side"] for c in compared if c["clear"] and c["better"]}
    winners = [n for n in order if n in clear]
    if winners:
        return judged | {"code": "winner", "side": winners[0], "also": winners[1:]}
    worse = {c["side"] for c in compared if c["clear"] and not c["better"]}
    if all(n in worse or n in barred for n in sides if n != PLAIN) and not clear:
        return judged | {"code": PLAIN, "side": PLAIN}
    if all(c["seeds"] < 2 for c in compared):
        return judged | {"reason": "one_seed"}
    return judged | {"reason": "barred" if clear else "within_noise"}


def domain_bar(side: Mapping[str, Any], plain: Mapping[str, Any], sides: int = 1) -> str | None:
    """Whether a side misses the domain: barred (by more than GUARD, and beyond both kinds of noise), doubted (by more
    than GUARD on average, but within one of them), or None.

    Args:
        sides: among how many the level is shared out.
    """
    compared = compare_sides(side, plain, "domain_hit", sides)
    if compared is None or compared["difference"] <= GUARD + 1e-9:
        return None
    return "barred" if compared["clear"] and _chance_of_fewer_hits(side, plain) < LEVEL / sides else "doubted"


def _chance_of_fewer_hits(side: Mapping[str, Any], plain: Mapping[str, Any]) -> float:
    """One-sided p of Fisher's exact test on the pictures of all seeds; 1 where their number is not known."""
    from scipy.stats import fisher_exact  # scipy.stats takes a second to import

    counts = [_hits_and_misses(s) for s in (side, plain)]
    return float(fisher_exact(counts, alternative="less").pvalue) if all(map(sum, counts)) else 1.0


def _hits_and_misses(side: Mapping[str, Any]) -> tuple[int, int]:
    rates = seed_values(side, "domain_hit")
    drawn = seed_values(side, "pictures")
    hits = sum(round(rate * drawn.get(seed, 0)) for seed, rate in rates.items())
    return hits, round(sum(drawn.get(seed, 0) for seed in rates)) - hits


def _retention(
    others: Sequence[Mapping[str, Any]], plain: Mapping[str, Any], barred: Sequence[str]
) -> dict[str, Any] | None:
    comparisons = [compare_sides(s, plain, "bank_loss", len(others)) for s in others if s["name"] not in barred]
    better = [c for c in comparisons if c is not None and c["better"]]
    return min(better, key=lambda c: c["value"], default=None)


def _against_base(sides: Sequence[Mapping[str, Any]], base: Mapping[str, Any], metric: str) -> str | None:
    """better, unclear or None, as `verdict` has it. A base without runs of its own counts as the same at every seed."""
    if not is_number(base.get(metric)) or not sides:
        return None
    compared = []
    for side in sides:
        rows = base.get("runs") or [{"seed": seed, metric: base[metric]} for seed in seed_values(side, metric)]
        model = {"name": "base", "best_length": None, "runs": [{**row, "steps": None} for row in rows]}
        compared.append(compare_sides(side, model, metric, len(sides)))
    if any(c is None or (c["clear"] and c["better"]) for c in compared):
        return None
    return "better" if all(c is not None and c["clear"] for c in compared) else "unclear"


def improves_to_the_end(side: Mapping[str, Any], metric: str) -> bool:
    """Whether a side's longest runs are its best, and clearly better than those of the length before."""
    lengths = sorted({r["steps"] for r in side["runs"]})
    if len(lengths) < 2 or side["best_length"] != lengths[-1]:
        return False
    comparison = compare_sides(side, {**side, "best_length": lengths[-2]}, metric)
    return comparison is not None and comparison["clear"] and comparison["better"]


def clear_sign(values: Sequence[float], tests: int = 1) -> int:
    """The sign of a mean over the seeds that is more standard errors from 0 than `threshold`, or 0 within the noise."""
    mean, spread = mean_spread(values)
    if mean is None or spread is None:
        return 0
    return int(math.copysign(1, mean)) if abs(mean) > threshold(len(values), tests) * spread / len(values) ** 0.5 else 0
