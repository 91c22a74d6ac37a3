"""The race of a search: candidates of which all are tried with one seed, and the one that is ahead with all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Candidate = TypeVar("Candidate")
Row = dict[str, Any]


def race(
    tried: dict[Candidate, list[Row]],
    seeds: Sequence[int],
    figure: Callable[[Sequence[Row]], float],
    more: Callable[[Candidate, int], list[Row] | None],
) -> Candidate | None:
    """The candidate with the lowest figure over all seeds, among those that no other with fewer seeds is below.

    The lowest of many figures of one seed each is partly luck. So a candidate that is ahead is tried with its other
    seeds; if its figure over all of them falls behind, the next one is.

    Args:
        tried: the rows of each candidate so far, each with its `seed`; what is tried here is added.
        figure: of a candidate's rows.
        more: the rows of a candidate with another seed; None if it fails, and is out of the race and of `tried`.
    """
    while tried:
        ahead = min(tried, key=lambda candidate: figure(tried[candidate]))
        had = {row["seed"] for row in tried[ahead]}
        missing = [seed for seed in seeds if seed not in had]
        if not missing:
            return ahead
        for seed in missing:
            rows = more(ahead, seed)
            if rows is None:
                del tried[ahead]
                break
            tried[ahead] += rows
    return None
