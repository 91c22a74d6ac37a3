"""The table of metrics: every metric has its texts, and everything that has a direction reads it there."""

from __future__ import annotations

import pytest

from difftuning_control.evaluation.comparison import compare_sides
from difftuning_control.evaluation.condition_figures import MAIN
from difftuning_control.evaluation.metric_table import METRICS, is_upper_limit, lower_is_better
from difftuning_control.evaluation.report.chart import is_share
from difftuning_control.evaluation.report.language import languages, load_texts
from difftuning_control.evaluation.report.tables import table_rows
from difftuning_control.recipe.gates import GATES

SHOWN = [name for name in METRICS if name != "retention_loss"]  # which is a gate's alone


@pytest.mark.parametrize("language", languages())
def test_every_metric_has_a_name_and_an_explanation(language):
    texts = load_texts(language)
    for name in SHOWN:
        assert texts[f"metric.{name}"]
        assert texts[f"explain.{name}"]
    assert all(metric.better in texts for metric in METRICS.values())


@pytest.mark.parametrize("name", SHOWN)
def test_a_comparison_knows_which_way_is_better(name):
    sides = [{"name": n, "best_length": 1, "runs": [{"seed": 0, "steps": 1, name: v}]} for n, v in (("a", 1), ("b", 2))]
    assert compare_sides(sides[0], sides[1], name)["better"] == lower_is_better(name)


def test_the_main_figure_of_a_condition_has_the_direction_of_the_table():
    assert MAIN == {
        "edges": ("f1", True),
        "depth": ("rmse", False),
        "normals": ("cosine", True),
        "masks": ("miou", True),
        "similarity": ("ssim", True),
    }


def test_gates_are_limits_on_metrics_of_the_table():
    assert {name: is_upper_limit(name) for name in GATES if name != "fidelity"} == {
        "kid": True,
        "retention_loss": True,
        "memorisation": True,
    }
    assert is_upper_limit("rmse")
    assert not is_upper_limit("f1")


def test_shares_are_drawn_in_per_cent():
    assert [name for name in SHOWN if is_share(name)] == ["domain_hit", "domain_judge", "still_drawn"]
    assert not is_share("mine")


def test_the_table_of_an_evaluation_prints_each_metric_its_own_way():
    value = {"mean": 0.12345, "spread": 0.01, "runs": 3}
    side = {"name": "x", "summary": dict.fromkeys(SHOWN, value), "diversity": 0.5}
    head, row, _ = table_rows({"base": side, "sides": [side]})
    assert head[1:5] == ["kid ×1000", "fid", "domain_hit", "pair_similarity"]
    assert row[1:5] == ["123.5 ±10.0", "0.1 ±0.0", "12% ±1%", "0.123 ±0.010"]
    assert head[-4:] == ["diversity", "bank loss", "apart", "still drawn"]
    assert row[-4:] == ["0.500", "", "", ""]


def test_an_unknown_metric_has_no_direction():
    with pytest.raises(KeyError):
        lower_is_better("mine")
