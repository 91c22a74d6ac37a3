"""The conditions of many pictures, annotated once over several workers and kept on disk.

A file is keyed by the pictures, how they are framed, and the fingerprint of the spec that conditions are made by.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from difftuning_control.data.control_spec import SUPPLIED, Conditioner
from difftuning_control.data.examples import Example, ImageData
from difftuning_control.data.framing import Framing
from difftuning_control.data.images import to_arrays
from difftuning_control.system.digests import digest_of
from difftuning_control.system.processes import ALONE, Share, files_together
from difftuning_control.system.rows import Rows
from difftuning_control.system.tensors import digest_of_tensors

if TYPE_CHECKING:
    from difftuning_control.data.bank import KnowledgeBank
    from difftuning_control.families.family import Family

FORMAT = 1
SHARD = 256
DECODE = 16


@dataclass(frozen=True)
class Conditions:
    """Conditions of N pictures in all their views, uint8 shards of (n, views, C, H, W), in memory or left on disk; C
    is 1 where all of a shard are grey.

    Where a ControlNet reads latents, the shards are what `Family.encode_control` makes of these, and `empty` is what it
    makes of a black one.
    """

    shards: Sequence[Tensor | Rows]
    empty: Tensor | None = None

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def row(self, item: int, view: int = 0) -> Tensor:
        """One condition, (3, H, W) uint8, or encoded."""
        condition = self.shards[item // SHARD][item % SHARD, view]
        return condition.expand(3, -1, -1) if self.empty is None else condition

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
        views = (picture.flatten(2) for shard in self.shards for picture in shard)  # a picture at a time
        return [i for i, flat in enumerate(views) if bool((flat.amax(2) == flat.amin(2)).all())]


def cached_conditions(
    conditioner: Conditioner,
    data: ImageData,
    framing: Framing,
    folder: Path,
    advance: Callable[[int], object],
    workers: int | None = None,
    share: Share = ALONE,
) -> Conditions:
    """The condition of every view of every picture, framed as `cached_moments` frames the pictures themselves."""
    names = [f"{e.digest} {e.condition_digest or ''}" for e in data.examples]
    identity = [conditioner.fingerprint, framing.identity]
    return _make(
        lambda i: _views(conditioner, data.examples[i], framing), identity, names, folder, advance, workers, share
    )


def encoded_conditions(family: Family, conditions: Conditions, folder: Path, share: Share = ALONE) -> Conditions:
    """Conditions as the family's ControlNet reads them: latents, made once, where it reads latents."""
    if not family.encodes_control:
        return conditions
    identity = [family.control_fingerprint, FORMAT]
    keys = [digest_of([_digest(shard), identity]) for shard in conditions.shards]

    def make(i: int) -> dict[str, Tensor]:
        shard = conditions.shards[i][:]
        rows = [*shard.flatten(0, 1).split(DECODE), torch.zeros_like(shard[0, :1])]
        *made, empty = [family.encode_control(part.expand(-1, 3, -1, -1)).float().cpu() for part in rows]
        return {"control": torch.cat(made).unflatten(0, shard.shape[:2]), "empty": empty[0]}

    made = files_together([folder / f"control-{key}.safetensors" for key in keys], make, share, lead=2)
    return Conditions(made.each("control"), made.read(len(made) - 1, "empty", ()) if len(made) else None)


def _digest(shard: Tensor | Rows) -> str:
    """Of what is on disk it is known: the file was read through when it was opened."""
    return shard.digest if isinstance(shard, Rows) else digest_of_tensors({"conditions": shard})


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
    supplied, size = example.load_condition(), (framing.height, framing.width)
    return framing.arrange(example, lambda place: conditioner.frame_condition(supplied, *size, place))


def bank_conditions(
    conditioner: Conditioner,
    family: Family,
    bank: KnowledgeBank,
    folder: Path,
    advance: Callable[[int], object],
    workers: int | None = None,
    share: Share = ALONE,
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
    return _make(make, identity, names, folder, advance, workers, share, fetch)


def _make(
    make: Callable[[int], np.ndarray],
    identity: list[Any],
    names: list[str],
    folder: Path,
    advance: Callable[[int], object],
    workers: int | None,
    share: Share,
    fetch: Callable[[int, int], None] = lambda start, stop: None,
) -> Conditions:
    """Conditions by shard, from the cache where it has them.

    Args:
        make: from a picture's number to its conditions, (views, H, W, 3) uint8.
        identity, names: what they depend on, altogether and one by one.
        workers: threads; as many as there are CPU cores when None, at most 8.
        fetch: told ahead of the numbers start … stop − 1 that will be made.
    """
    count = workers or min(8, os.cpu_count() or 1)
    parts = [range(start, min(start + SHARD, len(names))) for start in range(0, len(names), SHARD)]
    keys = [digest_of([FORMAT, identity, [names[i] for i in part]]) for part in parts]

    def make_part(number: int) -> dict[str, Tensor]:
        part = parts[number]
        fetch(part.start, part.stop)
        made = _ahead(make, part, count, advance)
        pixels = torch.stack([torch.from_numpy(array) for array in made]).permute(0, 1, 4, 2, 3)
        grey = bool((pixels[:, :, :1] == pixels).all())
        return {"conditions": pixels[:, :, :1] if grey else pixels}

    paths = [folder / f"conditions-{key}.safetensors" for key in keys]
    files = files_together(paths, make_part, share, lambda i: advance(len(parts[i])), lead=2)
    return Conditions(files.each("conditions"))


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
