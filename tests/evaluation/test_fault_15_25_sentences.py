"""Issue 15, 25: sentences follow from the figures, for planted figures of every shape, or are not there."""

from __future__ import annotations

import math
import re

import pytest

from difftuning_control.evaluation.report import findings
from difftuning_control.evaluation.report.analysis import write_analysis_report
from difftuning_control.evaluation.report.language import load_texts
from support import report_samples as samples
from support.control_runs import CURVES, control_page, control_run, curve_of, ramp
from support.pages import LANGUAGES, Page
from support.report_samples import pilot_report

NAN = float("nan")
SHAPES = {  # means of the gap, half the width of the interval, and the codes that are borne out
    "rising": ([0.28, 0.62, 1.05, 1.40, 1.62], 0.15, ["rising"]),
    "falling": ([1.62, 1.40, 1.05, 0.62, 0.28], 0.15, ["not_monotone"]),
    "falling from end to end": ([4.84, 2.0, 6.0, 5.5, 3.51], 2.3, ["unclear"]),
    "falling, rising between": ([4.84, 2.0, 6.0, 5.5, 3.51], 0.2, ["wide", "not_monotone"]),
    "flat": ([0.6, 0.61, 0.6, 0.59, 0.6], 0.01, ["flat"]),
    "noise": ([0.6, 0.7, 0.55, 0.65, 0.5], 0.2, ["unclear"]),
    "nothing": ([0.01, -0.02, 0.0, 0.02, 0.01], 0.02, ["no_gap"]),
    "few pictures": ([0.3] * 5, 0.75, ["uncertain"]),
    "NaN": ([0.3, NAN, 0.5, 0.7, 0.9], 0.1, None),
    "None": ([0.3, None, 0.5, 0.7, 0.9], 0.1, None),
    "all NaN": ([NAN] * 5, 0.1, []),
}


def gap_of(mean: list, half: float) -> dict:
    low, high = ([NAN if m is None else m + by for m in mean] for by in (-half, half))
    return {"mean": mean, "low": low, "high": high}


def check_whole(page: Page) -> None:
    """No heading without anything below it, no table without a row, no figure that is none."""
    assert not page.open
    parts = re.split(r"<h2[^>]*>", page.source.partition("<main>")[2].partition("</main>")[0])[1:]
    for part in parts:
        title, _, body = part.partition("</h2>")
        below = re.sub(r"<p class=\"part.*?</p>", "", body, flags=re.DOTALL)
        assert re.sub(r"<[^>]+>|\s", "", below), title
    for table in re.findall(r"<table>.*?</table>", page.source, re.DOTALL):
        assert "<td" in table
    for empty in (r"<ol[^>]*>\s*</ol>", r"<dl[^>]*>\s*</dl>", r"<tbody>\s*</tbody>", r"<p[^>]*>\s*</p>"):
        assert re.search(empty, page.source) is None
    assert "nan" not in re.findall(r"[a-z]+", re.sub(r"<svg.*?</svg>", "", page.source, flags=re.DOTALL).lower())


@pytest.mark.sample("all NaN-ja")
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fault_15_25_the_gap_is_described_as_its_table_has_it(tmp_path, language, shape):
    mean, half, codes = SHAPES[shape]
    # whatever the analysis says of itself: an earlier version's advice is not believed either
    planted = samples.analysis() | {"gap": gap_of(mean, half), "advice": ["rising"]}
    found = findings.advice_of(planted)
    assert codes is None or found == codes
    said = load_texts(language)
    pages = [Page(write_analysis_report(planted, tmp_path, language))]
    if language == "en":
        pages.append(Page(pilot_report(samples.pilot() | {"analysis": planted}, tmp_path)))
    for page in pages:
        check_whole(page)
        for code in findings.ADVICE:
            assert (said[f"advice.{code}"] in page.text) == (code in found), code
    grows = [m for m in mean if m is not None and math.isfinite(m)]
    assert "rising" not in found or grows[-1] > grows[0]


@pytest.mark.sample("ja")
@pytest.mark.parametrize("language", LANGUAGES)
def test_fault_15_25_one_band_has_no_shape(tmp_path, language):
    planted = samples.analysis()
    for key in ("u", "target", "bank"):
        planted[key] = planted[key][:1] if key == "u" else {"loss": planted[key]["loss"][:1]}
    planted["gap"] = {k: v[:1] for k, v in planted["gap"].items()}
    planted["schedule"] = {k: v if k == "kind" else v[:1] for k, v in planted["schedule"].items()}
    assert findings.advice_of(planted) == []
    page = Page(write_analysis_report(planted, tmp_path, language))
    check_whole(page)
    said = load_texts(language)
    assert said["card.gap_high"] not in page.text
    assert said["headline.advice.none"] in page.text


@pytest.mark.wide
@pytest.mark.parametrize("language", LANGUAGES)
def test_fault_15_25_a_gap_that_was_not_measured_is_said_to_be_so(tmp_path, language):
    planted = samples.analysis() | {"gap": None}
    page = Page(write_analysis_report(planted, tmp_path, language))
    check_whole(page)
    said = load_texts(language)
    assert said["gap.unmeasured"] in page.text
    assert said["section.gap"] not in page.text
    check_whole(Page(pilot_report(samples.pilot() | {"analysis": planted}, tmp_path, language)))


def test_fault_15_25_what_is_to_learn_is_a_gap_above_nothing():
    rows = lambda gap: findings.gap_bands({"u": samples.U, "gap": gap})  # noqa: E731
    codes = lambda gap: [s["code"] for s in findings.gap_sentences(rows(gap))]  # noqa: E731
    assert codes(gap_of([0.3, 0.4, 0.5, 0.6, 0.7], 0.1)) == ["differs.gap", "differs.learn"]
    assert codes(gap_of([-0.3, 0.4, 0.5, 0.6, 0.7], 0.1)) == ["differs.gap"]
    assert codes(gap_of([0.3, 0.4, 0.5, 0.6, 0.7], 0.4)) == ["differs.gap"]
    assert codes(gap_of([NAN, NAN, NAN, NAN, 0.7], 0.1)) == ["differs.gap_one", "differs.learn"]
    assert codes(gap_of([NAN] * 5, 0.1)) == codes(None) == []


def side_of(changes: list[list[float]]) -> dict:
    """A side whose bank losses change so, one list a seed."""
    u = [(i + 0.5) / len(changes[0]) for i in range(len(changes[0]))]
    runs = [
        {
            "seed": seed,
            "steps": 1,
            "losses": {"bank": {"base": {"u": u, "loss": [1.0] * len(u)}, "tuned": {"loss": [1 + c for c in row]}}},
        }
        for seed, row in enumerate(changes)
    ]
    return {"name": "plain", "best_length": 1, "runs": runs}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ([[0.5, 0.3, 0.1], [0.51, 0.3, 0.1], [0.49, 0.31, 0.1]], "differs.worst"),
        ([[0.1, 0.3, 0.5], [0.1, 0.3, 0.51], [0.1, 0.31, 0.49]], "differs.worst"),
        ([[0.1, 0.1, 0.1], [0.1, 0.11, 0.1], [0.11, 0.1, 0.1]], "differs.within_noise"),
        ([[0.5, 0.3, 0.1], [0.1, 0.3, 0.5], [0.3, 0.31, 0.2]], "differs.within_noise"),
        ([[-0.1, -0.2, -0.3], [-0.1, -0.2, -0.3]], "differs.no_rise"),
        ([[0.5], [0.4]], "differs.one_band"),
        ([[0.5, 0.3, 0.1]], "differs.within_noise"),
        ([[0.5, NAN, NAN], [0.4, NAN, NAN]], "differs.one_band"),
    ],
)
def test_fault_15_25_where_a_side_forgets_most(changes, code):
    change = findings.loss_change(side_of(changes), "bank")
    assert findings.forgetting_sentence(change)["code"] == code


def test_fault_15_25_losses_that_are_no_numbers_say_nothing():
    assert findings.loss_change(side_of([[NAN, NAN]]), "bank") is None
    assert findings.loss_change({"name": "x", "best_length": 1, "runs": [{"steps": 1, "losses": None}]}, "bank") is None
    change = findings.loss_change(side_of([[0.5, NAN, 0.1], [0.5, NAN, 0.11]]), "bank")
    assert findings.mean_change(change) == pytest.approx(0.3025)


@pytest.mark.wide
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("low", "key"), [(0.01, "card.most_forgetting"), (-0.05, "card.no_forgetting")])
def test_fault_15_25_the_most_forgetting_is_more_than_none(tmp_path, language, low, key):
    planted = samples.analysis(run=True)
    planted["forgetting"] |= {"low": [low] * 5, "budget": None}
    page = Page(write_analysis_report(planted, tmp_path, language))
    check_whole(page)
    said = load_texts(language)
    for label in ("card.most_forgetting", "card.no_forgetting"):
        assert (said[label] in page.text) == (label == key)


@pytest.mark.wide
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("rates", [[1e-3], [5e-4, 1e-3]])
def test_fault_15_25_a_pilot_without_a_search_has_no_section_of_one(tmp_path, language, rates):
    """The demo's: one learning rate for all, nothing searched, and no pictures to look at."""
    result = samples.pilot()
    result["settings"]["learning_rates"] = rates
    for side in result["sides"]:
        side["search"] = side["search"][: len(rates)] if len(rates) > 1 else []
    page = Page(pilot_report(result, tmp_path, language))
    check_whole(page)
    said = load_texts(language)
    for key in ("section.search", "search.note", "tried.rates"):
        assert (said[key] in page.text) == (len(rates) > 1), key
    assert said["next.look"] not in page.text
    samples.draw_pictures(tmp_path, result, ["red apple"])
    assert said["next.look"] in Page(pilot_report(result, tmp_path, language)).text


@pytest.mark.sample("kid1-no_plain-ja", "kid0-alone-en", "kid2-unmeasured-ja", "kid3-unmeasured-ja")
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    ("kid", "reason"),
    [
        ({"plain": [0.1] * 3}, "alone"),
        ({"prior": [0.1] * 3, "difftuning_tau1": [0.2] * 3}, "no_plain"),
        ({"plain": [NAN] * 3, "prior": [0.1] * 3}, "unmeasured"),
        ({"plain": [NAN] * 3, "prior": [NAN] * 3}, "unmeasured"),
    ],
)
def test_fault_15_25_what_was_not_compared_is_not_called_a_result(tmp_path, language, kid, reason):
    page = Page(pilot_report(samples.pilot(kid), tmp_path, language))
    check_whole(page)
    said, text = load_texts(language), page.text.replace("‑", "-")
    assert said["headline.pilot.uncompared"] in text
    assert said["headline.pilot.none"] not in text
    assert said["next.seeds"].partition("{")[0] not in text  # more seeds do not help
    assert (said["next.sides"] in text) == (reason != "unmeasured")


@pytest.mark.sample("en")
@pytest.mark.parametrize("language", LANGUAGES)
def test_fault_15_25_a_time_that_is_not_known_is_left_out(tmp_path, language):
    result = samples.pilot()
    for side in result["sides"]:
        for run in side["runs"]:
            run["seconds"] = None
    page = Page(pilot_report(result, tmp_path, language))
    assert load_texts(language)["next.time"].partition("{")[0] not in page.text


@pytest.mark.sample("ja")
@pytest.mark.parametrize("language", LANGUAGES)
def test_fault_15_25_plain_wins_by_what_is_named(tmp_path, language):
    kid = {"plain": [0.03, 0.041, 0.034], "prior": [0.04, 0.05, 0.045], "difftuning_tau1": [0.03, 0.042, 0.033]}
    page = Page(pilot_report(samples.pilot(kid, {"difftuning_tau1": 0.4}), tmp_path, language))
    said = load_texts(language)
    assert said["headline.pilot.plain"] in page.text.replace("‑", "-")
    named = said["verdict.plain_worse"].format(metric="KID", sides=said["side.prior"])
    assert named in page.text
    assert said["verdict.barred"].format(sides=said["side.difftuning_tau1"]) in page.text


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ([0.21, 0.211, 0.209], "budget.price_cost"),
        ([0.19, 0.189, 0.191], "budget.free_cost"),
        ([0.19, 0.22, 0.2], "budget.unclear_cost"),
        ([NAN] * 3, None),
    ],
)
def test_fault_15_25_a_budgets_price_is_one_beyond_noise(target, code):
    sides = [
        {"name": n, "best_length": 1, "runs": [{"seed": i, "steps": 1, "target_loss": v} for i, v in enumerate(values)]}
        for n, values in (("plain", [0.2] * 3), ("difftuning_budget", target))
    ]
    found = findings.budget_cost(sides[1], sides[0], 0.01, 1)
    assert (found["code"] if found else None) == code


@pytest.mark.sample("already-ja")
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("code", CURVES)
def test_fault_15_25_a_control_report_is_whole_for_every_curve(tmp_path, language, code):
    run = control_run(code)
    check_whole(Page(control_page(run, tmp_path, language)))
    run["losses"] = {}
    check_whole(Page(control_page(run, tmp_path, language)))


@pytest.mark.sample("None-en")
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("value", [None, NAN])
def test_fault_15_25_measurements_without_a_figure_are_left_out(tmp_path, language, value):
    run, said = control_run("sudden"), load_texts(language)
    run["fidelity"]["figures"]["f1"][-1] = value
    page = Page(control_page(run, tmp_path, language))
    check_whole(page)
    run["fidelity"]["figures"]["f1"] = [value] * len(run["fidelity"]["steps"])
    page = Page(control_page(run, tmp_path, language))
    check_whole(page)
    assert said["headline.control.unmeasured"] in page.text


@pytest.mark.sample("50-unmeasured-en")
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("every", "key"), [(0, "switched_off"), (50, "unmeasured")])
def test_fault_15_25_why_fidelity_was_not_measured(tmp_path, language, every, key):
    run = control_run("unmeasured")
    run["recipe"]["control"]["fidelity"]["every"] = every
    text = Page(control_page(run, tmp_path, language)).text
    assert load_texts(language)[f"verdict.control.{key}"] in text


def test_fault_15_25_a_share_is_said_of_a_gain_beyond_noise(tmp_path):
    curve = curve_of(ramp(600, 700, low=0.312), without=0.31)  # no rise, the last value a hair better
    curve["figures"]["f1"][-1] = 0.32
    text = Page(control_page(control_run() | {"fidelity": curve}, tmp_path)).text
    assert "of the distance to a perfect match" not in text


@pytest.mark.sample("blank0-en")
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("blank", [[], ["a.png"]])
def test_fault_15_25_supplied_conditions_were_not_found(tmp_path, language, blank):
    run, said = control_run(), load_texts(language)
    run["control"]["spec"] |= {"annotator": "supplied", "params": {}}
    run["control"]["blank"] = blank
    text = Page(control_page(run, tmp_path, language)).text
    key = "control.blank_supplied" if blank else "control.no_blank_supplied"
    assert said[key].format(count=len(blank), pictures=584) in text
