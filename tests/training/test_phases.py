"""What a run takes, counted by phase: seconds that add up, and every row that goes through the denoiser."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.record_sections import PhaseCost
from difftuning_control.training.phases import Phases, added, planned_line, spent_line
from difftuning_control.verbs.train import train
from support.trainings import interrupted_after, resumed


class Clock:
    """Stands at `now`."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_an_inner_phase_takes_is_not_the_outer_ones():
    clock = Clock()
    phases = Phases(clock)
    clock.now += 50  # of no phase
    with phases("training"):
        clock.now += 3
        with phases("validation"):
            clock.now += 5
        clock.now += 4
    clock.now += 50
    found = {name: cost.seconds for name, cost in phases.costs().items()}
    assert found == {"validation": 5, "training": 7}


def test_every_row_through_the_denoiser_counts_in_the_phase_that_is_open():
    class Denoiser(nn.Module):
        def forward(self, sample):
            return (sample,)

    denoiser, phases = Denoiser(), Phases(Clock())
    with phases.counting(denoiser):
        with phases("bank"):
            denoiser(torch.zeros(3, 2))
            with phases("validation"):
                denoiser(torch.zeros(4, 2))
                copy.deepcopy(denoiser)(torch.zeros(10, 2))
            denoiser(sample=torch.zeros(1, 2))
        denoiser(torch.zeros(7, 2))  # of no phase
    with phases("bank"):
        denoiser(torch.zeros(7, 2))  # counted no more
    assert {name: phases.forwards(name) for name in ("bank", "validation")} == {"bank": 4, "validation": 14}


def test_a_phase_of_no_such_name_is_refused():
    with pytest.raises(KeyError), Phases()("training_"):
        pass


def test_what_is_to_come_follows_from_the_speed_of_the_first_forwards():
    class Denoiser(nn.Module):
        def forward(self, sample):
            clock.now += 0.5 * len(sample)
            return (sample,)

    clock = Clock()
    denoiser, phases = Denoiser(), Phases(clock)
    assert phases.remaining("bank") is None
    phases.plan("training", 100)
    assert phases.remaining("training") is None  # no forward was timed yet
    assert planned_line(phases) is None
    phases.plan("bank", 20)
    with phases.counting(denoiser), phases("bank"):
        denoiser(torch.zeros(4, 1))
    assert phases.remaining("bank") == pytest.approx(16 * 0.5)
    assert phases.remaining("training") == pytest.approx(100 * 0.5 * 3)  # forward and backward
    assert planned_line(phases) == "still to come, about 2 min 38 s: bank 8.0 s, training 2 min 30 s"
    with phases.counting(denoiser), phases("training"):
        denoiser(torch.zeros(10, 1))
    assert phases.remaining("training") == pytest.approx(90 * 0.5)  # its own speed, once it is known
    phases.plan("bank", 4)
    assert phases.remaining("bank") == 0


def test_phases_of_several_runs_add_up_and_are_said_longest_first():
    one = {"bank": PhaseCost(seconds=2.5, forwards=10)}
    two = {"bank": PhaseCost(seconds=1.0, forwards=5), "load": PhaseCost(seconds=80.0)}
    found = added(one, two)
    assert found == {"load": PhaseCost(seconds=80.0), "bank": PhaseCost(seconds=3.5, forwards=15)}
    found["saving"] = PhaseCost(seconds=0.04)
    assert spent_line(found) == "1 min 24 s in all: load 1 min 20 s, bank 3.5 s (15 forwards)"


def test_a_run_counts_its_forwards_and_goes_on_counting_when_it_is_resumed(recipe: Recipe, tmp_path: Path):
    """Bank: 10 items × 2 steps × 2 branches. Validation: 4 held-out rows × 5 bands, before, after 3 steps, after."""
    recipe = replace(recipe, training=replace(recipe.training, validate_every=3))
    told: list[str] = []
    run = train(recipe, tell=told.append).record
    assert run.phases is not None
    assert run.timings is not None
    found = {name: cost.forwards for name, cost in run.phases.items()}
    held = run.data.held_out + 2
    assert found["bank"] == 10 * 2 * 2
    assert found["validation"] == 3 * held * 5
    assert found["training"] == 6 * 5
    assert found["load"] == found["encode"] == 0
    assert "sampling" not in found  # sample_every is 0
    seconds = sum(cost.seconds for cost in run.phases.values())
    assert seconds <= run.timings.preparation + run.timings.training + 0.01
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["phases"]
    assert kept == {name: {"seconds": cost.seconds, "forwards": cost.forwards} for name, cost in run.phases.items()}
    page = (tmp_path / "run" / "report.html").read_text()
    named = re.findall(r'<div class="phase"><span>([^<]*)</span>', page)
    assert named == list(run.phases)  # the page has the same phases, which are all that take time
    coming = [line for line in told if line.startswith("still to come")]
    assert len(coming) == 1
    assert re.fullmatch(r"still to come, about [^:]*: bank [^,]*, validation [^,]*, training [^,]*", coming[0])

    other = replace(recipe, output=str(tmp_path / "broken"))
    with interrupted_after(5), pytest.raises(KeyboardInterrupt):
        train(other)
    again = train(resumed(other)).record
    counted = {name: cost.forwards for name, cost in again.phases.items()}
    assert counted["bank"] == 0  # it was there
    assert counted["training"] == 6 * 5  # 4 steps from the checkpoint, and the last 2
    assert counted["validation"] == 4 * held * 5  # the pretrained model is measured again


def test_a_finished_run_that_goes_on_has_what_both_sessions_took_once(recipe: Recipe):
    run = train(recipe).record
    longer = train(resumed(recipe, max_steps=8)).record
    assert run.phases is not None
    assert longer.phases is not None
    held = run.data.held_out + 2
    assert longer.phases["bank"].forwards == run.phases["bank"].forwards
    assert longer.phases["training"].forwards == 8 * 5
    assert longer.phases["validation"].forwards == run.phases["validation"].forwards + 2 * held * 5
    assert run.phases["load"].seconds < longer.phases["load"].seconds
