"""The conditions of many pictures, annotated once over several workers and kept on disk.

A file is keyed by the pictures, how they are framed, and the fingerprint of the spec that conditions are made by.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from difftuning_control.cache import Framing, kept
from difftuning_control.control import SUPPLIED, Conditioner
from difftuning_control.data import Example, ImageData
from difftuning_control.fingerprint import digest_of, digest_of_tensors
from difftuning_control.pictures import to_arrays

if TYPE_CHECKING:
    from difftuning_control.bank import KnowledgeBank
    from difftuning_control.families.family import Family

FORMAT = 1
SHARD = 256
DECODE = 16


@dataclass(frozen=True)
class Conditions:
    """Conditions of N pictures in all their views, uint8 shards of (n, views, C, H, W); C is 1 where all are grey.

    Where a ControlNet reads latents, the shards are what `Family.encode_control` makes of these, and `empty` is what it
    makes of a black one.
    """

    shards: list[Tensor]
    empty: Tensor | None = None

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def row(self, item: int, view: int = 0) -> Tensor:
        """One condition, (3, H, W) uint8, or encoded."""
        found = self.shards[item // SHARD][item % SHARD, view]
        return found.expand(3, -1, -1) if self.empty is None else found

    @property
    def blank_row(self) -> Tensor:
        """A condition that shows nothing: black."""
        return torch.zeros_like(self.row(0)) if self.empty is None else self.empty

    def rows(self, items: Iterable[int]) -> Tensor:
        """The first view of these pictures, (B, 3, H, W) uint8."""
        return torch.stack([self.row(i) for i in items])

    @property
    def blank(self) -> list[int]:
        """Numbers of the pictures on which nothing was found: every view is of one colour."""
        flat = torch.cat([(s.flatten(3).amax(3) == s.flatten(3).amin(3)).flatten(1).all(1) for s in self.shards])
        return flat.nonzero().flatten().tolist()


def cached_conditions(
    conditioner: Conditioner,
    data: ImageData,
    framing: Framing,
    folder: Path,
    advance: Callable[[int], object],
    workers: int | None = None,
) -> Conditions:
    """The condition of every view of every picture, framed as `cached_moments` frames the pictures themselves."""
    names = [f"{e.digest} {e.condition_digest or ''}" for e in data.examples]
    identity = [conditioner.fingerprint, vars(framing.settled())]
    return _make(lambda i: _views(conditioner, data.examples[i], framing), identity, names, folder, advance, workers)


def encoded_conditions(family: Family, conditions: Conditions, folder: Path) -> Conditions:
    """Conditions as the family's ControlNet reads them: latents, made once, where it reads latents."""
    if not family.encodes_control:
        return conditions
    shards, identity = [], [family.control_fingerprint, FORMAT]
    tensors: dict[str, Tensor] | None = None
    for shard in conditions.shards:
        path = folder / f"control-{digest_of([digest_of_tensors({'conditions': shard}), identity])}.safetensors"
        tensors = kept(path, partial(_encode, family, shard), lambda: None)
        shards.append(tensors["control"])
    return Conditions(shards, tensors["empty"] if tensors is not None else None)


def _encode(family: Family, shard: Tensor) -> dict[str, Tensor]:
    rows = [*shard.flatten(0, 1).split(DECODE), torch.zeros_like(shard[0, :1])]
    *made, empty = [family.encode_control(part.expand(-1, 3, -1, -1)).float().cpu() for part in rows]
    return {"control": torch.cat(made).unflatten(0, shard.shape[:2]), "empty": empty[0]}


def conditions_of(
    conditioner: Conditioner, data: ImageData, resolution: int, advance: Callable[[int], object]
) -> Tensor:
    """The condition of every picture in the middle of its frame, (N, 3, H, W) uint8, without a cache."""
    rows = []
    for example in data.examples:
        rows.append(torch.from_numpy(_views(conditioner, example, Framing(resolution))[0]).permute(2, 0, 1))
        advance(1)
    return torch.stack(rows)


def _views(conditioner: Conditioner, example: Example, framing: Framing) -> np.ndarray:
    """The conditions of all views of a picture, (views, H, W, 3) uint8."""
    if conditioner.spec.annotator != SUPPLIED:
        return np.stack([conditioner.condition(view) for view in framing.pictures(example)])
    assert example.load_condition is not None
    supplied, side = example.load_condition(), framing.resolution
    return framing.arrange(example, lambda place: conditioner.frame_condition(supplied, side, side, place))


def bank_conditions(
    conditioner: Conditioner,
    family: Family,
    bank: KnowledgeBank,
    folder: Path,
    advance: Callable[[int], object],
    workers: int | None = None,
) -> Conditions:
    """The condition of every bank item: its latents decoded once, and annotated like any other picture."""
    decoded: dict[int, np.ndarray] = {}

    def make(i: int) -> np.ndarray:
        return conditioner.condition(decoded.pop(i))[None]

    def fetch(start: int, stop: int) -> None:
        for first in range(start, stop, DECODE):
            rows = slice(first, min(first + DECODE, stop))
            decoded.update(enumerate(to_arrays(family.decode(bank.latents[rows])), first))

    identity = [conditioner.fingerprint, bank.fingerprint, family.fingerprints["vae"], str(family.dtype)]
    names = [f"bank {i}" for i in range(len(bank))]
    return _make(make, identity, names, folder, advance, workers, fetch)


def _make(
    make: Callable[[int], np.ndarray],
    identity: list[Any],
    names: list[str],
    folder: Path,
    advance: Callable[[int], object],
    workers: int | None,
    fetch: Callable[[int, int], None] = lambda start, stop: None,
) -> Conditions:
    """Conditions by shard, from the cache where it has them.

    Args:
        make: from a picture's number to its conditions, (views, H, W, 3) uint8.
        identity, names: what they depend on, altogether and one by one.
        workers: threads; as many as there are CPU cores when None, at most 8.
        fetch: told ahead of the numbers start … stop − 1 that will be made.
    """
    shards = []
    count = workers or min(8, os.cpu_count() or 1)
    for start in range(0, len(names), SHARD):
        part = names[start : start + SHARD]
        path = folder / f"conditions-{digest_of([FORMAT, identity, part])}.safetensors"

        def annotate(numbers: range = range(start, start + len(part))) -> dict[str, Tensor]:
            fetch(numbers.start, numbers.stop)
            made = _ahead(make, numbers, count, advance)
            pixels = torch.stack([torch.from_numpy(array) for array in made]).permute(0, 1, 4, 2, 3)
            grey = bool((pixels[:, :, :1] == pixels).all())
            return {"conditions": pixels[:, :, :1] if grey else pixels}

        shards.append(kept(path, annotate, partial(advance, len(part)))["conditions"])
    return Conditions(shards)


def _ahead(
    make: Callable[[int], np.ndarray], numbers: range, workers: int, advance: Callable[[int], object]
) -> Iterator[np.ndarray]:
    """Results in order, a few of them made ahead."""
    with ThreadPoolExecutor(workers) as pool:
        rest = iter(numbers)
        waiting = [pool.submit(make, i) for i in islice(rest, 2 * workers)]
        try:
            while waiting:
                yield waiting.pop(0).result()
                advance(1)
                waiting += [pool.submit(make, i) for i in islice(rest, 1)]
        finally:
            pool.shutdown(cancel_futures=True)  # interrupted, it ends with the pictures that are under way
