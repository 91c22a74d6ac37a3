"""Issue 15, 24: nothing within noise is called clear: bars, winners, retention, the base, lengths, budgets, gates."""

from __future__ import annotations

import random

import pytest
import torch

from difftuning_control.evaluation.comparison import clear_sign, domain_bar, improves_to_the_end
from difftuning_control.evaluation.condition_figures import MAIN, fidelity
from difftuning_control.evaluation.curve import Curve, advice, against_limits
from difftuning_control.evaluation.fidelity_record import FidelityRecord
from difftuning_control.evaluation.pilot_figures import PilotBudget
from difftuning_control.evaluation.report import findings
from difftuning_control.evaluation.report.control import control_verdict
from difftuning_control.evaluation.report.language import load_texts
from difftuning_control.recipe.gates import GatesConfig
from difftuning_control.runs.gates import judge
from support import report_samples as samples
from support.pages import LANGUAGES, Page
from support.report_samples import pilot_report, verdict_of

CLOSE = {"plain": [0.1897, 0.1738, 0.2056], "difftuning_measured": [0.1881, 0.1757, 0.2005]}  # the report's own case


def side(name: str, hits: list[float], pictures: int = 16) -> dict:
    runs = [{"seed": i, "steps": 1, "domain_hit": h, "pictures": pictures} for i, h in enumerate(hits)]
    return {"name": name, "best_length": 1, "runs": runs}


def pilot_of(hits: dict[str, list[float]], kid: dict[str, list[float]], pictures: int = 16) -> dict:
    result = samples.pilot(kid)
    for found in result["sides"]:
        for run in found["runs"]:
            run |= {"domain_hit": hits[found["name"]][run["seed"]], "pictures": pictures}
    return result


@pytest.mark.sample("missed2")
@pytest.mark.parametrize("missed", [[1, 1, 1], [1, 2, 1], [0, 0, 3]])
def test_fault_15_24_one_picture_in_sixteen_bars_nothing(tmp_path, missed):
    hits = {"plain": [1.0] * 3, "difftuning_measured": [1 - m / 16 for m in missed]}
    result = pilot_of(hits, CLOSE)
    found = verdict_of(result)
    assert (found["code"], found["reason"], found["barred"]) == ("none", "within_noise", [])
    assert found["doubted"] == ["difftuning_measured"]
    text = Page(pilot_report(result, tmp_path)).text
    assert "Clear result" not in text
    assert "within the noise of pictures or seeds, which bars nothing" in text


def test_fault_15_24_a_side_that_clearly_misses_the_domain_is_barred():
    hits = {"plain": [1.0, 0.94, 1.0], "difftuning_measured": [0.25, 0.31, 0.19]}
    found = verdict_of(pilot_of(hits, {"plain": [0.04, 0.05, 0.045], "difftuning_measured": [0.03, 0.041, 0.034]}))
    assert (found["code"], found["reason"], found["barred"]) == ("none", "barred", ["difftuning_measured"])


@pytest.mark.parametrize(
    ("hits", "pictures", "expected"),
    [
        ([0.9375] * 3, 16, "doubted"),  # equal in all seeds: exact to the seeds, nothing to 48 pictures
        ([0.9375] * 3, 160, "barred"),
        ([0.2, 1.0, 0.9], 1000, "doubted"),  # beyond doubt to 3000 pictures, one seed in three to the seeds
        ([0.5], 1000, "doubted"),  # one seed tells no noise
        ([0.96] * 3, 1000, None),  # clear, but hardly less
    ],
)
def test_fault_15_24_a_bar_needs_both_pictures_and_seeds(hits, pictures, expected):
    plain = side("plain", [1.0] * len(hits), pictures)
    assert domain_bar(side("other", hits, pictures), plain) == expected


def test_fault_15_24_an_unknown_number_of_pictures_bars_nothing():
    other = side("other", [0.1, 0.2, 0.1])
    for run in other["runs"]:
        del run["pictures"]
    assert domain_bar(other, side("plain", [1.0, 0.9, 1.0])) == "doubted"


def test_fault_15_24_bars_among_equal_sides_are_few():
    rng, barred, sides = random.Random(0), 0, 3
    draw = lambda: [sum(rng.random() < 0.8 for _ in range(16)) / 16 for _ in range(3)]  # noqa: E731
    for _ in range(400):
        plain = side("plain", draw())
        barred += any(domain_bar(side(str(i), draw()), plain, sides) == "barred" for i in range(sides))
    assert barred / 400 < 0.05


def test_fault_15_24_retention_is_the_best_of_several_and_tested_as_such():
    """A difference that is clear for one side alone, but not as the best of five."""
    names = ["plain", "prior", "difftuning_tau1", "difftuning_measured", "difftuning_tau0.3", "difftuning_budget"]

    def retention(count: int):
        result = samples.pilot({n: [0.04, 0.05, 0.045] for n in names[: count + 1]})
        for found in result["sides"]:
            for run in found["runs"]:
                better = found["name"] == "prior"
                run["bank_loss"] = 0.1 - (0.01 + 0.004 * (run["seed"] - 1)) * better
        return verdict_of(result)["retention"]

    assert retention(1)["clear"]
    assert retention(5)["side"] == "prior"
    assert not retention(5)["clear"]


@pytest.mark.parametrize(
    ("base", "said"), [([0.001] * 3, "better"), ([0.039, 0.047, 0.044], "unclear"), ([0.2, 0.21, 0.2], None)]
)
def test_fault_15_24_the_pretrained_model_is_compared_seed_by_seed(base, said):
    result = samples.pilot({"plain": [0.04, 0.05, 0.045], "prior": [0.039, 0.052, 0.044]})
    result["base"] |= {"kid": sum(base) / 3, "runs": [{"seed": i, "kid": v} for i, v in enumerate(base)]}
    assert verdict_of(result)["base"] == said


@pytest.mark.wide
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("gain", "clear"), [([0.006, 0.0061, 0.0059], True), ([0.001, -0.002, 0.003], False)])
def test_fault_15_24_a_longer_run_is_advised_where_the_longest_is_clearly_better(tmp_path, language, gain, clear):
    result = samples.pilot({"plain": [0.04, 0.05, 0.045], "prior": [0.04, 0.052, 0.044]})
    for found in result["sides"]:
        last = {r["seed"]: r["kid"] for r in found["runs"] if r["steps"] == 150}
        for run in found["runs"]:
            run["kid"] = last[run["seed"]] + (gain[run["seed"]] if run["steps"] == 75 else 0)
    assert improves_to_the_end(result["sides"][0], "kid") == clear
    text = Page(pilot_report(result, tmp_path, language)).text
    assert (middle_of(language, "next.longer") in text) == clear


def middle_of(language: str, key: str) -> str:
    """The text between the first two things that fill it."""
    return load_texts(language)[key].partition("}")[2].partition("{")[0].strip()


def test_fault_15_24_a_budget_within_noise_is_neither_kept_nor_exceeded():
    tuned = {"name": "difftuning_budget", "best_length": 1, "runs": []}
    for seed, by in enumerate((-0.001, 0.0, 0.001)):
        change = [0.005 + by, 0.0201 + by, 0.04 + by]
        losses = {"base": {"u": [0.2, 0.5, 0.8], "loss": [1.0] * 3}, "tuned": {"loss": [1 + c for c in change]}}
        tuned["runs"].append({"seed": seed, "steps": 1, "losses": {"bank": losses}})
    budget = {"allowed": [0.02] * 3, "rise": [0.005, 0.0201, 0.04]}
    rows = findings.budget_of_pilot(PilotBudget.from_dict(budget), tuned)
    assert [row["finding"] for row in rows] == ["kept", "unclear", "exceeded"]
    assert [said["code"] for said in findings.budget_sentences(rows)] == ["budget.exceeded", "budget.unclear"]
    curve = Curve([0.2, 0.5, 0.8], [0.005, 0.0201, 0.04], [0.0, 0.01, 0.03], [0.01, 0.03, 0.05])
    assert against_limits(curve, [0.02] * 3) == ["kept", "unclear", "exceeded"]


def test_fault_15_24_a_sign_is_clear_beyond_the_seeds_only():
    assert [clear_sign(v) for v in ([0.1, 0.11, 0.09], [-0.1, -0.11, -0.09], [0.1, -0.2, 0.3], [0.1], [])] == [
        1,
        -1,
        0,
        0,
        0,
    ]


def test_fault_15_24_a_gap_without_a_shape_is_seldom_said_to_have_one():
    rng, said, u = random.Random(0), [], [(i + 0.5) / 10 for i in range(10)]
    for _ in range(500):
        mean = [rng.gauss(0.6, 0.1) for _ in u]
        said += advice(Curve(u, mean, [m - 0.196 for m in mean], [m + 0.196 for m in mean]))
    assert {"rising", "not_monotone", "unclear"} >= set(said)
    assert said.count("unclear") / len(said) > 0.7
    assert said.count("rising") / len(said) < 0.15


@pytest.mark.parametrize(("last", "code"), [(0.316, "worse"), (0.30, "worse"), (0.37, "slight"), (0.70, "sudden")])
def test_fault_15_24_a_controlnet_ends_better_only_beyond_noise(last, code):
    steps = list(range(0, 525, 25))
    noise = [0.01 * (-1) ** i for i in range(len(steps))]
    values = [(0.31 if s < 150 else 0.7) + n for s, n in zip(steps, noise)][:-1] + [last]
    rise = {"start": 125, "end": 150, "step": 137.5, "before": 0.31, "after": 0.7, "sudden": True}
    curve = {"main": "f1", "higher_is_better": True, "without": {"f1": 0.31}, "steps": steps, "convergence": rise}
    found = FidelityRecord.from_dict(curve | {"figures": {"f1": values}})
    assert control_verdict(found)["code"] == code


@pytest.mark.parametrize(
    ("mean", "spread", "runs", "clear"), [(0.099, 0.02, 3, False), (0.05, 0.001, 3, True), (0.05, None, 1, None)]
)
def test_fault_15_24_a_gate_says_where_it_is_within_the_noise(mean, spread, runs, clear):
    judged = judge(GatesConfig(kid=0.1), {"summary": {"kid": {"mean": mean, "spread": spread, "runs": runs}}})
    assert judged.passed
    assert judged.figures["kid"].clear is clear
    assert ("(within the noise)" in judged.lines["kid"]) == (clear is False)


@pytest.mark.parametrize(("low", "high", "clear"), [(0.01, 0.05, True), (0.01, 0.2, False), (0.2, 0.3, True)])
def test_fault_15_24_a_gate_on_the_loss_takes_the_interval_of_its_rows(low, high, clear):
    forgetting = {"mean": [(low + high) / 2] * 5, "low": [low] * 5, "high": [high] * 5}
    judged = judge(GatesConfig(retention_loss=0.1), {"summary": {}, "forgetting": forgetting})
    assert judged.figures["retention_loss"].clear is clear


@pytest.mark.parametrize("kind", MAIN)
def test_a_gate_on_fidelity_is_on_the_main_figure_of_each_kind(kind):
    """Of normals too, which have an RMSE beside their cosine."""
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    summary = {
        name: {"mean": float(values.mean()), "spread": None, "runs": 1}
        for name, values in fidelity(kind, picture, picture).items()
    }
    found = judge(GatesConfig(fidelity=0.5), {"summary": summary}).figures["fidelity"]
    main, higher = MAIN[kind]
    assert (found.value, found.at) == (summary[main]["mean"], "least" if higher else "most")
    assert found.passed
