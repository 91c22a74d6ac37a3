"""The knowledge bank of a run that trains: whole, or growing while training begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from difftuning_control.data.bank import KnowledgeBank
from difftuning_control.system.terminal import duration, phases_are_shown, say
from difftuning_control.training.phases import Phases
from difftuning_control.training.weights import TrainedWeights


class RunBank:
    """What is still to be drawn of a run's bank, by the pretrained model behind the weights that train.

    Args:
        bank: None of a run without one.
    """

    def __init__(self, bank: KnowledgeBank | None, weights: TrainedWeights, phases: Phases):
        self._growing = bank.growing if bank is not None else None
        self.weights, self.phases, self._shown = weights, phases, 0
        if self._growing is not None:
            self._growing.around = self._drawing

    @property
    def is_growing(self) -> bool:
        return self._growing is not None and not self._growing.is_whole

    @property
    def has_all(self) -> bool:
        """Whether nothing is left to draw."""
        return self._growing is None or self._growing.has_all

    @property
    def seconds(self) -> float:
        """What drawing has taken in this process, all in all."""
        return self._growing.seconds if self._growing is not None else 0.0

    def plan(self) -> None:
        """Say how many forwards the bank is going to take, from those of the items that were drawn already; no line is
        printed for what is drawn from now on, beside the progress of the steps."""
        growing = self._growing
        if growing is None or not self.is_growing:
            return
        growing.show, self._shown = False, growing.drawn
        if growing.drawn:
            done = self.phases.forwards("bank")
            self.phases.plan("bank", done + round(done / growing.drawn * growing.left))

    def remaining(self) -> float:
        """Seconds that it will still take, as far as is known."""
        return (self.phases.remaining("bank") or 0.0) if self.is_growing else 0.0

    def finish(self) -> None:
        """Draw what is left, and make the bank whole."""
        assert self._growing is not None
        with self.phases("bank"):
            self._growing.finish()
        if phases_are_shown() and self._growing.drawn > self._shown:
            say(f"knowledge bank … {len(self._growing.bank)} in {duration(self.seconds)}")

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        with self.phases("bank"), self.weights.pretrained():
            yield
