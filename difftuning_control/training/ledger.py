"""The figures of the last steps, which stay on the device until they are read together.

A read waits until the device has computed everything before it, so on a GPU it is done once for several steps. A loss
or a gradient that is not finite is noted on the device, from where it keeps the optimizer from this step and all later
ones; whoever reads next is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from difftuning_control.errors import NonFiniteLossError


@dataclass(frozen=True)
class _Forward:
    """What is kept of a forward: figures (4,) of all processes, and of this one's rows which are finite."""

    step: int
    figures: Tensor
    counts: tuple[int, int]
    names: list[str]
    finite: Tensor


class Ledger:
    """Keeps figures forward by forward.

    Args:
        retention: the name of the mean loss of retention rows.
        masks: whether the optimizer heeds `stop`, so that reading may wait; else `check` is asked before its step.
        every: steps between reads.
    """

    def __init__(self, retention: str, masks: bool, every: int = 1):
        self.retention, self.masks, self.every = retention, masks, every
        self.stop: Tensor | None = None  # 1 from the first step on whose loss or gradient is not finite, () float
        self._kept: list[_Forward] = []
        self._watched: dict[int, dict[str, float]] = {}

    def note(self, step: int, figures: Tensor, counts: tuple[int, int], names: list[str], finite: Tensor) -> None:
        """Keep the figures of a forward.

        Args:
            figures: the objective, the sums of ℓ over target and over retention rows, and how many are not finite, over
                all processes, (4,).
            counts: how many target and retention rows the step has.
            names, finite: of the rows of this process, and whether the loss of each is finite, (B,) bool.
        """
        self._kept.append(_Forward(step, figures, counts, names, finite))
        self._stop_if(figures[3])

    def note_gradient(self, norm: Tensor) -> None:
        """Keep whether the gradient of the last forward's step is finite, by its norm."""
        figures, bad = self._kept[-1].figures, (~torch.isfinite(norm)).float().reshape(1)
        self._kept[-1] = replace(self._kept[-1], figures=torch.cat([figures[:3], figures[3:] + bad]))
        self._stop_if(bad[0])

    def _stop_if(self, bad: Tensor) -> None:
        is_bad = (bad > 0).float()
        self.stop = is_bad if self.stop is None else torch.maximum(self.stop, is_bad)

    def check(self) -> None:
        """Stop before the optimizer's step if anything is not finite, where it would not heed that.

        Raises:
            NonFiniteLossError: see `read`.
        """
        if self.masks:
            return
        self.bring()
        if any(kept.figures[3] > 0 for kept in self._kept):
            for _ in self.read():
                pass

    def bring(self, more: Tensor | None = None) -> Tensor | None:
        """Bring the figures that are not read yet from the device, and more values with them, in one read."""
        parts = [kept.figures for kept in self._kept] + ([more.flatten()] if more is not None else [])
        figures = torch.cat(parts).cpu()
        for i, kept in enumerate(self._kept):
            self._kept[i] = replace(kept, figures=figures[4 * i : 4 * i + 4])
        return figures[4 * len(self._kept) :].view_as(more) if more is not None else None

    def watch(self, step: int, values: dict[str, float]) -> None:
        """Values that are known here, to be logged beside the figures of a step."""
        self._watched[step] = values

    @property
    def is_behind(self) -> bool:
        """Whether there are figures that were not read."""
        return bool(self._kept)

    @property
    def is_due(self) -> bool:
        """Whether as many steps have gathered as are read at once."""
        return len({kept.step for kept in self._kept}) >= self.every

    def read(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Every step since the last read with its figures, in order: one read of the device.

        Raises:
            NonFiniteLossError: naming the first step at which something is not finite, and its rows.
        """
        kept, self._kept = self._kept, []
        values = torch.stack([forward.figures for forward in kept]).tolist() if kept else []
        for step, forwards in groupby(zip(kept, values), key=lambda pair: pair[0].step):
            means: dict[str, float] = {}
            for forward, figures in forwards:
                if figures[3] > 0:
                    raise _not_finite(forward)
                for name, value in self._means(figures, forward.counts).items():
                    means[name] = means.get(name, 0.0) + value
            yield step, means | self._watched.pop(step, {})

    def _means(self, figures: list[float], counts: tuple[int, int]) -> dict[str, float]:
        """The objective and the unweighted mean ℓ of target and retention rows."""
        total, target, retained, _ = figures
        means = {"loss": total, "target_loss": target / counts[0]}
        return means | {self.retention: retained / counts[1]} if counts[1] else means


def _not_finite(forward: _Forward) -> NonFiniteLossError:
    finite: list[Any] = forward.finite.tolist()
    rows = [name for name, ok in zip(forward.names, finite) if not ok]
    if rows:
        which = ", ".join(rows[:8])
    else:
        which = "of another process" if not torch.isfinite(forward.figures[:1]).all() else "the gradient"
    return NonFiniteLossError(
        f"the loss is not finite at step {forward.step + 1} (rows: {which}); the weights were not touched. "
        "Lower training.learning_rate, or use --training.mixed_precision bf16 instead of fp16."
    )
