"""A step that nobody waits for: rows read ahead, figures read together, and a loss that is not finite kept from the
weights until somebody reads."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from difftuning_control.errors import NonFiniteLossError
from difftuning_control.objective.rows import sums_by_role
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.training import TuningConfig
from difftuning_control.training.checkpoint import checkpoints
from difftuning_control.training.ledger import Ledger
from difftuning_control.training.loop import TrainingLoop
from difftuning_control.training.reader import RowReader
from difftuning_control.training.weights import TrainedWeights
from difftuning_control.verbs.bench.step_profile import loop_of
from difftuning_control.verbs.train import train
from support.trainings import record, rows


@pytest.fixture
def loop(recipe: Recipe) -> TrainingLoop:
    return loop_of(recipe, TrainingLoop)


# --- reading ahead --------------------------------------------------------------------------------------------------


class Slow:
    """A source whose rows of a later step wait until the step before computes."""

    def __init__(self, source: Any):
        self.source, self.computing, self.asked = source, threading.Event(), []

    def rows(self, step: int, forward: int = 0) -> Any:
        self.asked.append((step, forward))
        if step > 0:
            assert self.computing.wait(20), "nobody computed while this was read"
        return self.source.rows(step, forward)


def test_rows_of_the_next_step_are_read_while_this_one_computes(loop: TrainingLoop):
    slow = Slow(loop.source)
    reader = RowReader(slow)
    reader.rows(0)  # returns although the rows of step 1, which are being read, wait for the computing
    slow.computing.set()
    reader.rows(1, more=False)
    assert slow.asked == [(0, 0), (1, 0)]


def test_what_is_read_ahead_is_what_the_source_gives_in_any_order(loop: TrainingLoop):
    reader = RowReader(loop.source, forwards=2)
    for step, forward in [(0, 0), (0, 1), (1, 0), (3, 0), (3, 1), (2, 1), (4, 0)]:
        found, expected = reader.rows(step, forward), loop.source.rows(step, forward)
        torch.testing.assert_close(found.batch.latents, expected.batch.latents, atol=0, rtol=0)
        torch.testing.assert_close(found.noise, expected.noise, atol=0, rtol=0)
        assert found.batch.ids == expected.batch.ids
        assert found.levels.tolist() == expected.levels.tolist()


def test_what_cannot_be_read_is_said_when_it_is_needed():
    class Broken:
        def rows(self, step: int, forward: int = 0) -> Any:
            if step == 1:
                raise ValueError("changed while it was in use")
            return step

    reader = RowReader(Broken())  # type: ignore[arg-type]
    assert reader.rows(0) == 0
    with pytest.raises(ValueError, match="changed while it was in use"):
        reader.rows(1)


# --- reading together -----------------------------------------------------------------------------------------------


def unreadable(loop: TrainingLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put what trains on a device whose values cannot be read: any read raises."""
    loop.family.denoiser.to("meta")
    monkeypatch.setattr(type(loop.accelerator), "device", torch.device("meta"))
    parameters = [p for p in loop.family.denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    loop.weights.masks = False  # which that of a GPU does
    loop.weights.parameters = {str(i): p for i, p in enumerate(parameters)}
    loop.weights._plain_optimizer = optimizer
    loop.optimizer = optimizer
    loop.weights.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    loop.ledger = Ledger("bank_loss", masks=True, every=8)


@pytest.mark.sample("teacher")
@pytest.mark.parametrize(
    "tuning",
    [
        {},
        {"estimator": "weight", "min_snr_gamma": 5.0},
        {"retention": "teacher"},
        {"retention": "teacher", "retention_rows": "pictures"},
    ],
    ids=["samples", "weighed", "teacher", "teacher on pictures"],
)
def test_a_step_reads_nothing_from_the_device_until_its_figures_are_wanted(recipe, tuning, monkeypatch):
    loop = loop_of(replace(recipe, tuning=TuningConfig(**tuning)), TrainingLoop)
    unreadable(loop, monkeypatch)
    for step in range(3):
        loop.advance(step)
    assert not loop.ledger.is_due
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        list(loop.ledger.read())


def test_the_figures_of_several_steps_are_those_of_each(loop: TrainingLoop):
    alone = [loop.step(step) for step in range(3)]
    together = loop_of(replace(loop.recipe, output=loop.recipe.output + "-2"), TrainingLoop)
    for step in range(3):
        together.advance(step)
    assert together.ledger.is_behind
    assert [figures for _, figures in together.ledger.read()] == alone
    assert not together.ledger.is_behind
    assert list(together.ledger.read()) == []
    assert set(alone[0]) == {"loss", "target_loss", "bank_loss", "learning_rate"}


def test_one_read_brings_all_figures_and_what_else_is_wanted(monkeypatch):
    ledger, reads = Ledger("bank_loss", masks=True, every=8), []
    for step in range(3):
        figures = torch.tensor([step + 0.5, 6.0, 4.0, 0.0])
        ledger.note(step, figures, (3, 2), ["a"], torch.tensor([True]))
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: reads.append(1) or original(self))
    more = torch.arange(6.0).view(2, 3)
    assert ledger.bring(more).tolist() == more.tolist()
    assert len(reads) == 1
    expected = [(s, {"loss": s + 0.5, "target_loss": 2.0, "bank_loss": 2.0}) for s in range(3)]
    assert list(ledger.read()) == expected


def test_sums_by_role_are_those_of_the_rows_of_each():
    values, roles = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([True, False, True])
    assert [float(s) for s in sums_by_role(values, roles)] == [2.0, 5.0]
    values.requires_grad_(True)
    _, banks = sums_by_role(values * torch.tensor([1.0, torch.inf, 1.0]), roles)
    banks.backward()
    assert values.grad.tolist()[::2] == [1.0, 1.0]  # what is infinite in another role is not in this one


# --- what is not finite ---------------------------------------------------------------------------------------------


class Broken:
    """Gives a reader's rows with one that is not finite."""

    pinned = False

    def __init__(self, reader: RowReader):
        self.reader = reader

    def rows(self, step: int, forward: int = 0, more: bool = True) -> Any:
        found = self.reader.rows(step, forward, more)
        latents = found.batch.latents.clone()
        latents[1] = torch.nan
        return replace(found, batch=replace(found.batch, latents=latents))


@pytest.mark.parametrize("bad", [3, 8])
def test_a_step_that_is_not_finite_moves_nothing_and_neither_do_those_after_it(recipe, monkeypatch, bad):
    """With a fused optimizer, which heeds the mark on the device, and figures that are read every eighth step."""
    recipe = replace(recipe, training=replace(recipe.training, max_steps=20, checkpoint_every=100, validate_every=0))
    seen: dict[int, dict[str, torch.Tensor]] = {}
    original, advance = TrainedWeights.__init__, TrainingLoop.advance

    def masking(self: TrainedWeights, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        fused = torch.optim.AdamW(self.tuning.groups(self.config), fused=True)
        self._plain_optimizer.__dict__.update(fused.__dict__)
        for group in self._plain_optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.masks = True

    def watched(self: TrainingLoop, step: int, more: bool = True) -> None:
        reader = self.reader
        if step == bad:
            self.reader = Broken(reader)  # type: ignore[assignment]
        advance(self, step, more)
        self.reader = reader
        seen[step] = {n: p.detach().clone() for n, p in self.parameters.items()}

    monkeypatch.setattr(TrainedWeights, "__init__", masking)
    monkeypatch.setattr(TrainingLoop, "advance", watched)
    with pytest.raises(NonFiniteLossError, match=rf"at step {bad + 1} \(rows: .*\); the weights were not touched"):
        train(recipe)
    last = max(seen)
    assert last == 7 if bad < 8 else last == 15  # nobody read before
    for step in range(bad, last + 1):
        torch.testing.assert_close(seen[step], seen[bad - 1], atol=0, rtol=0)
    assert any(not torch.equal(seen[bad - 1][n], seen[bad - 2][n]) for n in seen[0])
    assert [row["step"] for row in rows(recipe) if "loss" in row] == list(range(1, bad + 1))
    assert record(recipe)["status"] == "failed"
    assert checkpoints(Path(recipe.output)) == []
