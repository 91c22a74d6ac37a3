"""The search for a side's learning rate and length in a pilot."""

from dataclasses import replace
from pathlib import Path

import pytest

from difftuning_control.errors import NonFiniteLossError, UserError
from difftuning_control.recipe.studies import PilotConfig
from difftuning_control.recipe.training import TuningConfig
from difftuning_control.runs.pilot_record import PilotSettings
from difftuning_control.runs.record_sections import PhaseCost
from difftuning_control.verbs.pilot.pilot import Pilot
from difftuning_control.verbs.pilot.settings import Clock, pilot_identity
from difftuning_control.verbs.pilot.side_runs import SideRuns
from difftuning_control.verbs.pilot.side_tuning import beyond


@pytest.mark.parametrize(
    ("best", "rates", "further"),
    [
        (4e-3, [1e-3, 2e-3, 4e-3], [8e-3]),
        (1e-3, [1e-3, 2e-3, 4e-3], [5e-4]),
        (1e-3, [4e-3, 1e-3], [2.5e-4]),
        (2e-3, [1e-3, 2e-3, 4e-3], []),
        (1e-3, [1e-3], []),
    ],
)
def test_the_next_rate_is_as_far_beyond_the_end_as_the_last_two_are_apart(best, rates, further):
    assert beyond(best, rates) == further


class Curve(SideRuns):
    """A pilot's runs whose KID at each learning rate, length and seed is known; rates of 0.1 and more diverge."""

    kid = staticmethod(lambda rate, steps, seed: abs(rate - 8e-3) + abs(steps - 4))

    def train(self, side, rate, seed):
        if rate >= 0.1:
            raise NonFiniteLossError("the loss is infinite")
        return [{"steps": n, "seed": seed, "search": {"kid": self.kid(rate, n, seed)}} for n in self.lengths]


def curve(rates: list[float], widen: int, lengths: tuple[int, ...] = (4,)) -> Curve:
    config, told = PilotConfig(widen=widen, lengths=list(lengths)), []
    return Curve(None, config, Path(), None, None, "kid", rates, list(lengths), Path(), None, told.append)


def seeds_of(tried: dict) -> dict[float, int]:
    return {rate: len({row["seed"] for row in rows}) for rate, rows in tried.items()}


def test_a_search_goes_on_until_its_best_lies_within_or_its_tries_are_used_up():
    assert list(curve([1e-3, 2e-3], 0).search_rates("plain")[1]) == [1e-3, 2e-3]
    assert list(curve([1e-3, 2e-3], 1).search_rates("plain")[1]) == [1e-3, 2e-3, 4e-3]
    assert list(curve([1e-3, 2e-3], 9).search_rates("plain")[1]) == [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    assert list(curve([6.4e-2, 3.2e-2], 9).search_rates("plain")[1]) == [6.4e-2, 3.2e-2, 1.6e-2, 8e-3, 4e-3]


def test_a_rate_that_diverged_is_an_end_that_was_tried():
    search = curve([5e-2, 1e-1], 9)
    search.kid = lambda rate, steps, seed: -rate
    best, tried, diverged = search.search_rates("plain")
    assert (best, seeds_of(tried), diverged) == (5e-2, {5e-2: 3, 2.5e-2: 3}, {0.1: []})


def test_a_side_that_diverges_at_every_rate_is_told():
    with pytest.raises(UserError, match=r"plain diverged at every learning rate \(0\.1, 0\.2\)"):
        curve([0.1, 0.2], 3).search_rates("plain")


def test_a_rate_that_one_seed_favours_alone_does_not_win():
    """4e-3 is the best with the first seed, and behind 2e-3 over all; 1e-3 is not among the best two."""
    search = curve([1e-3, 2e-3, 4e-3], 0)
    figures = {1e-3: (9, 0, 0), 2e-3: (5, 6, 7), 4e-3: (4, 8, 9)}
    search.kid = lambda rate, steps, seed: figures[rate][seed]
    best, tried, _ = search.search_rates("plain")
    assert (best, seeds_of(tried)) == (2e-3, {1e-3: 1, 2e-3: 3, 4e-3: 3})


@pytest.mark.parametrize("harder", [(3, 0, 0), (0, 3, 0), (0, 0, 3)])
def test_a_seed_that_is_harder_for_all_rates_decides_nothing(harder):
    """2e-3 is better over all seeds and 1e-3 with the first, whichever of them is the hard one."""
    search = curve([1e-3, 2e-3], 0)
    figures = {1e-3: (2, 3, 3), 2e-3: (2.5, 1, 1)}
    search.kid = lambda rate, steps, seed: figures[rate][seed] + harder[seed]
    assert search.search_rates("plain")[0] == 2e-3


def test_luck_at_an_end_widens_no_search():
    search = curve([1e-3, 2e-3, 4e-3], 5)
    figures = {1e-3: (5, 5, 5), 2e-3: (4.5, 4.5, 4.5), 4e-3: (4, 8, 8)}
    search.kid = lambda rate, steps, seed: figures[rate][seed]
    assert list(search.search_rates("plain")[1]) == [1e-3, 2e-3, 4e-3]


def test_the_mean_is_taken_at_each_length_and_the_best_of_those_counts():
    """At length 2 the rates are 6 and 5 over the seeds, at 4 both are 7; the best of each seed would say 3 and 5."""
    search = curve([1e-3, 2e-3], 0, (2, 4))
    first = {2: (3, 9, 6), 4: (9, 3, 9)}
    search.kid = lambda rate, steps, seed: first[steps][seed] if rate == 1e-3 else {2: 5, 4: 7}[steps]
    assert search.search_rates("plain")[0] == 2e-3


def test_a_rate_that_diverges_with_a_later_seed_is_out_and_its_runs_are_kept():
    search = curve([1e-3, 2e-3], 0)
    search.kid = lambda rate, steps, seed: rate
    search._try = lambda side, rate, seed: None if (rate, seed) == (1e-3, 2) else search.train(side, rate, seed)
    best, tried, diverged = search.search_rates("plain")
    assert (best, seeds_of(tried), seeds_of(diverged)) == (2e-3, {2e-3: 3}, {1e-3: 2})


def test_the_highest_figure_wins_where_more_is_better():
    search = replace(curve([1e-3, 2e-3], 0), primary="f1")
    search.train = lambda side, rate, seed: [{"steps": 4, "seed": seed, "search": {"f1": rate}}]
    assert search.search_rates("plain")[0] == 2e-3


def test_the_length_is_the_best_over_the_seeds_on_the_prompts_of_the_search():
    search = curve([1e-3], 0, (2, 4, 8))
    rows = [row | {"kid": -row["steps"]} for seed in (0, 1) for row in search.train("plain", 1e-3, seed)]
    assert search.best_length(rows) == 4  # the final figures would say 8


def test_a_pilot_that_is_widened_or_gets_further_sides_or_seeds_goes_on_in_its_folder(recipe):
    config = PilotConfig()
    assert pilot_identity(recipe, replace(config, widen=2)) == pilot_identity(recipe, config)
    assert pilot_identity(recipe, replace(config, sides=["plain", "teacher_own"])) == pilot_identity(recipe, config)
    assert pilot_identity(recipe, replace(config, seeds=[0, 1, 2, 7])) == pilot_identity(recipe, config)
    assert pilot_identity(recipe, replace(config, seeds=[1, 0, 2])) != pilot_identity(recipe, config)
    assert pilot_identity(recipe, replace(config, pictures=9)) != pilot_identity(recipe, config)


def test_a_pilot_or_its_data_that_lies_elsewhere_is_the_same_one(recipe):
    def of_run(place: str) -> str:
        own = replace(recipe, bank=replace(recipe.bank, path=f"{place}/bank"), output=f"{place}/plain/lr-1/seed-0")
        data = replace(recipe.data, path=f"{place}/pictures", validation_path=f"{place}/held-out", holdout=0)
        return pilot_identity(replace(own, data=data), PilotConfig())

    assert of_run("runs/pilot") == of_run(str(Path("runs/pilot").resolve())) == of_run("/elsewhere/pilot")
    general = replace(recipe, bank=replace(recipe.bank, prompts="general"))
    assert pilot_identity(general, PilotConfig()) != pilot_identity(recipe, PilotConfig())


@pytest.mark.parametrize(
    ("training", "sides", "said"),
    [
        ({"batch_size": 4}, ["plain", "prior"], "tuning.retention_ratio 0.2 leaves no row for the bank"),
        ({"validation_prompts": "own"}, ["plain", "difftuning_budget"], "a forgetting budget is kept on the prompts"),
    ],
)
def test_a_side_that_cannot_be_trained_is_refused_before_any_other_is(recipe, training, sides, said):
    tuning = TuningConfig(retention_ratio=0.2, retention_weight=0.1)
    asked = replace(recipe, tuning=tuning, training=replace(recipe.training, **training))
    with pytest.raises(UserError, match=said):
        Pilot(asked, PilotConfig(sides=sides), Path(recipe.output))
    assert not Path(recipe.output).exists()


def test_a_negative_number_of_further_rates_is_refused():
    with pytest.raises(UserError, match=r"pilot\.widen"):
        PilotConfig(widen=-1)


def test_a_bank_too_small_to_judge_by_is_refused_before_any_work(recipe):
    with pytest.raises(UserError, match=r"bank\.size is 4, but .* give at least 5, or auto"):
        Pilot(replace(recipe, bank=replace(recipe.bank, size=4)), PilotConfig(), Path(recipe.output))
    assert not Path(recipe.output).exists()


def test_only_a_pilot_that_goes_on_counts_what_earlier_sessions_took(tmp_path):
    earlier = {"bank": PhaseCost(seconds=9.0, forwards=40)}
    PilotSettings(identity="x", phases=earlier).write(tmp_path)
    clock = Clock(tmp_path)
    assert clock.phases.costs() == {}
    clock.go_on()
    assert clock.phases.costs() == earlier
