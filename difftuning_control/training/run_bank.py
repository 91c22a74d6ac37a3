"""The knowledge bank of a run that trains: whole, or growing while training begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from difftuning_control.data.bank import KnowledgeBank
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.record import read_run
from difftuning_control.system.signals import deferred
from difftuning_control.system.terminal import activities_are_shown, duration, say
from difftuning_control.training.checkpoint import checkpoints
from difftuning_control.training.phases import Phases
from difftuning_control.training.weights import TrainedWeights


def may_grow(recipe: Recipe, processes: int) -> bool:
    """Whether the bank can be drawn while a run trains: the pretrained model is then still there as it was loaded, one
    process steps alone, and no conditions are made of the samples. A run that goes on from a checkpoint has drawn its
    bank before that."""
    record = read_run(Path(recipe.output)) if recipe.training.resume else None
    begins = record is None or not (record.is_complete or checkpoints(Path(recipe.output)))
    stays = recipe.method != "full" and recipe.tuning.label_space == "own" and not recipe.model.offload
    reads_all = recipe.method == "controlnet" and recipe.control.bank_condition == "own"
    return begins and stays and not reads_all and processes == 1 and recipe.training.compile is None


class RunBank:
    """What is still to be drawn of a run's bank, by the pretrained model behind the weights that train.

    Args:
        bank: None of a run without one.
    """

    def __init__(self, bank: KnowledgeBank | None, weights: TrainedWeights, phases: Phases):
        self._growing = bank.growing if bank is not None else None
        self.weights, self.phases, self._shown, self._is_guarded = weights, phases, 0, False
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

    def guard(self, safe: ExitStack, settle: Callable[[], object], must: bool) -> None:
        """Let signals wait for the end of a step as soon as there is something to go on from, a whole bank first of
        all; until then they end the run at once.

        Args:
            safe: is left after the last step.
            settle: called once a growing bank is whole, on which the run's identity depends.
            must: draw all that is left: at the end, and before a checkpoint.
        """
        if self._is_guarded or (self.is_growing and not must and not self.has_all):
            return
        if self.is_growing:
            self._finish()
            settle()
        self._is_guarded = True
        safe.enter_context(deferred())

    def _finish(self) -> None:
        """Draw what is left, and make the bank whole."""
        assert self._growing is not None
        with self.phases("bank"):
            self._growing.finish()
        if activities_are_shown() and self._growing.drawn > self._shown:
            say(f"knowledge bank … {len(self._growing.bank)} in {duration(self.seconds)}")

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        with self.phases("bank"), self.weights.pretrained():
            yield
