"""Charts: well-formed, without ids in common, equal for equal input, and drawn where the values are."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import combinations, pairwise
from xml.etree import ElementTree

import pytest

from difftuning_control.evaluation.report import charts
from difftuning_control.evaluation.report.chart import WIDTH, text_width
from difftuning_control.evaluation.report.language import load_texts
from support import report_samples as samples

SVG = "{http://www.w3.org/2000/svg}"
EVIL = "<b>&\"'\x1b[31m\u202e$x_1$ =1+1 " + "長" * 200
T = {language: load_texts(language) for language in ("en", "ja")}


def every_chart(t, result=None, analysis=None) -> dict[str, str]:
    result = result or samples.pilot()
    analysis = analysis or samples.analysis(run=True)
    item = {"label": "plain", "u": samples.U, "mean": [0.5, 0.4, 0.3, 0.2, 0.1], "low": None, "high": None}
    return {
        "gap": charts.gap_chart(analysis, t),
        "loss": charts.loss_chart(analysis, t),
        "forgetting": charts.forgetting_chart([item, item | {"label": "prior"}], [0.02] * 5, t),
        "schedule": charts.schedule_chart([{**analysis["schedule"], "label": "measured"}], t),
        "multipliers": charts.multipliers_chart(analysis["multipliers"], t),
        "staged": charts.staged_chart(analysis["staged"], t),
        "sides": charts.sides_chart(result["sides"], "kid", t, 0.04),
        "length": charts.length_chart(result["sides"], "kid", t),
    }


def texts(svg: str) -> list[str]:
    return ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.sample("ja")
@pytest.mark.parametrize("language", T)
def test_bare_well_formed_svg(language):
    for name, svg in every_chart(T[language]).items():
        root = ElementTree.fromstring(svg)
        assert root.tag == f"{SVG}svg"
        assert root.get("viewBox"), name
        assert svg.startswith("<svg")
        for unwanted in ("<?xml", "<!DOCTYPE", "<style", "metadata", "xlink", "font-family", 'width="2'):
            assert unwanted not in svg, (name, unwanted)
        assert T[language][f"chart.{'gap_axis' if name == 'gap' else 'u_axis'}"] in texts(svg) or name in (
            "multipliers",
            "staged",
            "sides",
            "length",
        )


@pytest.mark.wide
def test_no_ids_in_common_and_none_missing():
    found = {name: set(re.findall(r' id="([^"]+)"', svg)) for name, svg in every_chart(T["en"]).items()}
    assert any(found.values())
    for (_, a), (_, b) in combinations(found.items(), 2):
        assert not a & b
    for name, svg in every_chart(T["en"]).items():
        assert set(re.findall(r'(?:href="|url\()#([\w.-]+)', svg)) <= found[name]


@pytest.mark.wide
@pytest.mark.parametrize("language", T)
def test_equal_input_equal_bytes(language):
    assert every_chart(T[language]) == every_chart(T[language])


def test_a_side_has_one_colour_everywhere():
    assert len({charts.side_style(n)[0] for n in samples.SIDES}) == len(samples.SIDES)
    assert len({charts.side_style(n)[1] for n in samples.SIDES}) == len(samples.SIDES)
    assert charts.side_style("mine") == charts.side_style("mine")
    found = every_chart(T["en"])
    for name in ("forgetting", "sides", "length"):
        assert charts.side_style("plain")[0] in found[name]


def test_marks_lie_at_their_values():
    analysis = samples.analysis()
    analysis["gap"] = {key: [0.0, 1.0, 2.0, 3.0, 4.0] for key in ("mean", "low", "high")}
    root = ElementTree.fromstring(charts.gap_chart(analysis, T["en"]))
    colour = f"fill: {charts.TARGET}"
    marks = [(float(e.get("x")), float(e.get("y"))) for e in root.iter(f"{SVG}use") if colour in e.get("style", "")]
    points = sorted(m for m in marks if m[1] > 40)[-5:]
    steps = {round(b[0] - a[0], 1) for a, b in pairwise(points)}
    falls = {round(a[1] - b[1], 1) for a, b in pairwise(points)}
    assert len(points) == 5
    assert len(steps) == len(falls) == 1
    assert min(falls) > 10


def test_one_dot_a_seed():
    result = samples.pilot({"plain": [0.1, 0.2, 0.3], "prior": [0.2, float("nan"), 0.3]})
    root = ElementTree.fromstring(charts.sides_chart(result["sides"], "kid", T["en"]))

    def dots(name: str) -> int:
        colour = charts.side_style(name)[0]
        return sum(f"fill: {colour}" in e.get("style", "") for e in root.iter(f"{SVG}use"))

    assert (dots("plain"), dots("prior")) == (3, 2)


def test_a_distant_base_is_named_and_does_not_squeeze_the_dots():
    sides = samples.pilot()["sides"]
    near, far = (charts.sides_chart(sides, "kid", T["en"], value) for value in (0.04, 5.0))
    assert "Pretrained model" in texts(near)
    assert "Pretrained model: 5 (off the scale)" in texts(far)
    assert not [t for t in texts(far) if re.fullmatch(r"[1-5]\.?0?", t)]


@pytest.mark.sample("en")
@pytest.mark.parametrize("language", T)
def test_outside_text_stays_text(language):
    result = samples.pilot({"plain": [0.1] * 3, EVIL: [0.2] * 3})
    item = {"label": EVIL, "u": samples.U, "mean": [0.1] * 5, "low": [0.0] * 5, "high": [0.2] * 5}
    t = T[language]
    found = [
        charts.sides_chart(result["sides"], "kid", t),
        charts.length_chart(result["sides"], "kid", t),
        charts.forgetting_chart([item], None, t),
        charts.schedule_chart([item | {"psi": [1] * 5, "xi": [0] * 5}], t),
    ]
    for svg in found:
        labels = [x for x in texts(svg) if x.startswith("<b>&\"'␛[31m⟨U+202E⟩")]
        assert labels
        assert all(x.endswith("…") for x in labels)
        assert "<b>" not in svg


@pytest.mark.wide
def test_legends_fit():
    for t in T.values():
        for svg in every_chart(t).values():
            root = ElementTree.fromstring(svg)
            width = float(root.get("viewBox").split()[2])
            assert width == WIDTH
            for e in root.iter(f"{SVG}text"):
                x, text = float(e.get("x")), "".join(e.itertext())
                size = text_width(text)
                anchor = re.search(r"text-anchor: (\w+)", e.get("style", ""))
                shift = {"middle": size / 2, "end": size}.get(anchor[1] if anchor else "", 0)
                assert x - shift > -6, text
                assert x - shift + size < width + 6, text


def test_odd_values_do_not_stop_a_chart():
    t = T["en"]
    analysis = samples.analysis(run=True)
    analysis["target"]["loss"][0] = 0.0
    analysis["gap"]["mean"][1] = float("nan")
    analysis["staged"]["tuned_above"]["kid"][2] = None
    one = samples.pilot({"plain": [0.1]}, seeds=(0,))
    one["sides"][0]["runs"] = [r for r in one["sides"][0]["runs"] if r["steps"] == 150]
    for svg in every_chart(t, one, analysis).values():
        ElementTree.fromstring(svg)
    assert charts.multipliers_chart({"step": [1], "values": [[0.1, 0.2]]}, t).count("u = ") == 2


@pytest.mark.wide
def test_matplotlib_is_not_imported_with_the_package():
    code = "import sys, difftuning_control; sys.exit('matplotlib' in sys.modules or 'jinja2.ext' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    code = "import sys, difftuning_control.evaluation.report.pilot; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_global_settings_of_matplotlib_are_left_alone():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    every_chart(T["en"])
    assert dict(mpl.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
