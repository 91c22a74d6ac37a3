"""Training batches from streamed pictures, encoded block by block as they arrive."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from difftuning_control.data.batches import BatchSource, TargetSet, TrainingRows
from difftuning_control.data.examples import Example
from difftuning_control.data.framing import Framing
from difftuning_control.data.latents import LatentMoments
from difftuning_control.data.stream import Stream
from difftuning_control.families.prompts import PromptEmbeddings

if TYPE_CHECKING:
    from difftuning_control.families.family import Family


@dataclass(frozen=True)
class StreamedEmbeddings(PromptEmbeddings):
    """Embeddings of a forward's captions, over those that stay."""

    below: PromptEmbeddings

    def rows(self, prompts: list[str]) -> dict[str, Tensor]:
        holders = [(self if p in self.index else self.below, p) for p in prompts]
        return {n: torch.stack([e.tensors[n][e.index[p]] for e, p in holders]) for n in self.below.tensors}


class StreamSource:
    """Batches like those of `BatchSource`, with target rows that are read, framed and encoded for each forward.

    The next forward's pictures are read and decoded by threads while the model computes.

    Args:
        plain: with the settings, the bank and the embeddings that stay; its own targets are not used.
        check: refuses a picture's caption; where bad ones are skipped, another picture stands in.
    """

    def __init__(self, plain: BatchSource, stream: Stream, framing: Framing, check: Callable[[Example], None]):
        self.plain, self.stream, self.framing, self.check = plain, stream, framing, check
        self._reader, self._decoders = ThreadPoolExecutor(1), ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        self._next: tuple[tuple[int, int], Future] | None = None

    def rows(self, step: int, forward: int = 0) -> TrainingRows:
        """The rows of this process in one of the forwards of optimizer step `step`."""
        place, examples = (step, forward), None
        if self._next is not None and self._next[0] == place:
            examples = self._next[1].result()
        if examples is None:
            examples = self._reader.submit(self._examples, *place).result()
        rows = [*self._target_rows(forward)]
        examples = self.stream.checked(examples, self.check)  # in this thread, as the tokenizer is not for several
        after = (step, forward + 1) if forward + 1 < self.plain.forwards else (step + 1, 0)
        self._next = (after, self._reader.submit(self._examples, *after))
        batch_source = replace(
            self.plain,
            targets=self._targets(examples, self.plain.draws(step).views[rows].tolist()),
            embeddings=self._embeddings([e.caption for e in examples]),
            items={r: i for i, r in enumerate(rows)},
        )
        return batch_source.rows(step, forward)

    def _examples(self, step: int, forward: int) -> list[Example]:
        return self.stream.pictures(step, self._target_rows(forward), self.plain.counts[0], self._decoders.map)

    def _target_rows(self, forward: int) -> range:
        """Which target rows of an optimizer step this process has in one of its forwards."""
        mine = self.plain.mine(forward)
        return range(mine.start, min(mine.stop, self.plain.counts[0]), mine.step)

    def _targets(self, examples: list[Example], views: list[int]) -> TargetSet:
        """The pictures as target rows, only the view that is wanted of each; an empty frame stands last."""
        family, side = self.plain.family, self.framing.resolution
        pixels = [self.framing.pixels(e)[view] for e, view in zip(examples, views)]
        mean, std = family.encode_moments(torch.stack([*pixels, torch.zeros(3, side, side)]))
        kept = [t.cpu().unsqueeze(1).expand(-1, self.framing.views, -1, -1, -1) for t in (mean, std)]
        sizes = None
        if family.takes_sizes:
            empty = torch.tensor([[side, side, 0, 0, side, side]] * self.framing.views)
            sizes = torch.stack([*(self.framing.sizes(e) for e in examples), empty])
        captions, names = [e.caption for e in examples], [e.name for e in examples]
        return TargetSet(LatentMoments(*kept), [*captions, ""], [*names, ""], sizes=sizes)

    def _embeddings(self, captions: list[str]) -> StreamedEmbeddings:
        family, stay = self.plain.family, self.plain.embeddings
        fresh = [c for c in dict.fromkeys(captions) if c not in stay.index]
        encoded: dict[str, Tensor] = {}
        if fresh:
            encode = family.tokenize if family.encodes_in_step else family.encode_prompts
            encoded = {name: tensor.cpu() for name, tensor in encode(fresh).items()}
        return StreamedEmbeddings({c: i for i, c in enumerate(fresh)}, encoded, stay)


def empty_targets(family: Family, framing: Framing) -> TargetSet:
    """What stands for the pictures of a stream where only their shape is asked."""
    mean, std = family.encode_moments(torch.zeros(1, 3, framing.resolution, framing.resolution))
    kept = [t.cpu().unsqueeze(1).expand(-1, framing.views, -1, -1, -1) for t in (mean, std)]
    return TargetSet(LatentMoments(*kept), [""], [""])
