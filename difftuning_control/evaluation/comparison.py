"""The sides of a pilot compared seed by seed, in numbers and codes; a report puts them into words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, TypeGuard

LOWER_IS_BETTER = frozenset({"kid", "fid", "target_loss", "bank_loss", "rmse"})
PLAIN = "plain"
LEVEL = 0.05
GUARD = 0.05  # a side that hits the domain this much less often than plain fine-tuning cannot win


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
    from scipy.stats import t

    return float(t.ppf(1 - LEVEL / sides, seeds - 1)) if seeds > 1 else math.inf


def compare(side: Mapping[str, Any], plain: Mapping[str, Any], metric: str, sides: int = 1) -> dict[str, Any] | None:
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
        "better": (mean > 0) == (metric in LOWER_IS_BETTER) and mean != 0,
        "clear": error is not None and abs(mean) > needed * error and agree,
        "threshold": needed if math.isfinite(needed) else None,
    }


def verdict(result: Mapping[str, Any]) -> dict[str, Any]:
    """Which side of a pilot won on its primary metric, against plain fine-tuning and the noise of the seeds.

    Returns:
        code: winner (a side is clearly better than plain), plain (plain is clearly better than every other side that
            may win), or none.
        reason: why there is no winner: no_plain, alone, unmeasured, one_seed, barred (only a barred side was clearly
            better), within_noise; None otherwise.
        side: the winner or plain; with none, the best mean of the sides that may win.
        also: other sides that are clearly better than plain, best first.
        barred: sides that hit the domain too seldom to win.
        comparisons: one `compare` for each side but plain, with `barred`.
        retention: `compare` on the bank loss, of the side that may win and forgets least, if that beats plain's.
        base_better: no side that may win has a better mean than the pretrained model.
    """
    metric = result["primary"]
    sides = {s["name"]: s for s in result["sides"]}
    plain = sides.get(PLAIN)
    barred = [n for n, s in sides.items() if plain is not None and n != PLAIN and _misses(s, plain)]
    means = {n: fmean(v.values()) for n, s in sides.items() if n not in barred and (v := seed_values(s, metric))}
    sign = 1 if metric in LOWER_IS_BETTER else -1
    order = sorted(means, key=lambda n: sign * means[n])
    base = result["base"].get(metric)
    found: dict[str, Any] = {
        "code": "none",
        "reason": None,
        "metric": metric,
        "lower": sign > 0,
        "side": order[0] if order else None,
        "also": [],
        "barred": barred,
        "comparisons": [],
        "retention": None,
        "base_better": bool(order) and is_number(base) and sign * base <= sign * means[order[0]],
    }
    if plain is None:
        return found | {"reason": "no_plain"}
    if len(sides) == 1:
        return found | {"reason": "alone"}
    others = [s for n, s in sides.items() if n != PLAIN]
    compared = [c | {"barred": s["name"] in barred} for s in others if (c := compare(s, plain, metric, len(others)))]
    found |= {"comparisons": compared, "retention": _retention(sides, plain, barred)}
    if PLAIN not in means or not compared:
        return found | {"reason": "unmeasured"}
    clear = {c["side"] for c in compared if c["clear"] and c["better"]}
    winners = [n for n in order if n in clear]
    if winners:
        return found | {"code": "winner", "side": winners[0], "also": winners[1:]}
    worse = {c["side"] for c in compared if c["clear"] and not c["better"]}
    if all(n in worse or n in barred for n in sides if n != PLAIN) and not clear:
        return found | {"code": PLAIN, "side": PLAIN}
    if all(c["seeds"] < 2 for c in compared):
        return found | {"reason": "one_seed"}
    return found | {"reason": "barred" if clear else "within_noise"}


def _misses(side: Mapping[str, Any], plain: Mapping[str, Any]) -> bool:
    mine, theirs = seed_values(side, "domain_hit"), seed_values(plain, "domain_hit")
    return bool(mine and theirs) and fmean(theirs.values()) - fmean(mine.values()) > GUARD + 1e-9


def _retention(
    sides: Mapping[str, Mapping[str, Any]], plain: Mapping[str, Any], barred: Sequence[str]
) -> dict[str, Any] | None:
    found = [compare(s, plain, "bank_loss") for n, s in sides.items() if n != PLAIN and n not in barred]
    better = [c for c in found if c is not None and c["better"]]
    return min(better, key=lambda c: c["value"], default=None)
