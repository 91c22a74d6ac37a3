"""Seeds and permutations that depend on a step alone, so that a resumed run draws what an undisturbed one draws."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def step_seed(*numbers: int) -> int:
    """A seed below 2⁶³ from numbers such as (seed, step, row)."""
    # SeedSequence pads with zeros, so (s, 3) and (s, 3, 0) would be the same without their length
    return int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@lru_cache(maxsize=4)
def _permutation(seed: int, stream: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, stream, epoch]).permutation(size)


def shuffled(seed: int, stream: int, start: int, count: int, size: int) -> list[int]:
    """Entries start … start + count − 1 of the endless concatenation of random orders of 0 … size − 1."""
    places = range(start, start + count)
    return [int(_permutation(seed, stream, place // size, size)[place % size]) for place in places]
