"""The race of a search: of candidates that are all tried with one seed, the best two get the others, and one wins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Candidate = TypeVar("Candidate")
Row = dict[str, Any]
FINALISTS = 2


def race(
    tried: dict[Candidate, list[Row]],
    seeds: Sequence[int],
    figure: Callable[[Sequence[Row]], float],
    more: Callable[[Candidate, int], list[Row] | None],
) -> Candidate | None:
    """The candidate with the lowest figure over all seeds, among those that have all; None if every one fails.

    The lowest of many figures of one seed each is partly luck. So the best two with the first seed are tried with the
    others, and only candidates with the same seeds are compared: some seeds are harder than others for all.

    Args:
        tried: the rows of each candidate so far, each with its `seed`; what is tried here is added.
        seeds: of which every candidate has the first.
        figure: of rows of a candidate.
        more: the rows of a candidate with another seed; None if it fails, and is out of the race and of `tried`.
    """

    def missing(candidate: Candidate) -> list[int]:
        had = {row["seed"] for row in tried[candidate]}
        return [seed for seed in seeds if seed not in had]

    def at_first(candidate: Candidate) -> float:
        return figure([row for row in tried[candidate] if row["seed"] == seeds[0]])

    while tried:
        finalists = sorted(tried, key=at_first)[:FINALISTS]
        lacking = next((candidate for candidate in finalists if missing(candidate)), None)
        if lacking is None:
            return min((c for c in tried if not missing(c)), key=lambda c: figure(tried[c]))
        for seed in missing(lacking):
            rows = more(lacking, seed)
            if rows is None:
                del tried[lacking]
                break
            tried[lacking] += rows
    return None
