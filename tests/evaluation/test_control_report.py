"""The report of a ControlNet's run: what it says of each curve, and that it is one harmless file."""

from __future__ import annotations

import base64
import copy
import html
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from difftuning_control.errors import UserError
from difftuning_control.evaluation.condition_figures import MAIN
from difftuning_control.evaluation.fidelity_record import FidelityRecord
from difftuning_control.evaluation.report import chart, charts
from difftuning_control.evaluation.report.control import control_verdict as verdict_on
from difftuning_control.evaluation.report.language import load_texts
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.identity import write_recipe
from difftuning_control.verbs.parse import parse
from support.control_runs import CURVES, control_page, control_run, curve_of, ramp
from support.pages import EVIL, LANGUAGES, Page, check_self_contained


def draw_grid(folder: Path, step: int, width: int = 700, colour: str = "navy") -> None:
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, width // 2), colour).save(folder / f"samples/step-{step:06d}.png")


def text_of(run: dict[str, Any], folder: Path, language: str = "en") -> str:
    return Page(control_page(run, folder, language)).text.replace("‑", "-")


def control_verdict(curve: dict[str, Any] | None) -> dict[str, Any]:
    return verdict_on(FidelityRecord.from_dict(curve) if curve is not None else None)


def commands(page: Page) -> list[str]:
    return [html.unescape(re.sub("<.*?>", "", c)) for c in re.findall(r"<code>(.*?)</code>", page.source)]


@pytest.mark.wide
@pytest.mark.parametrize("code", CURVES)
def test_the_headline_answers_whether_it_follows(tmp_path, code):
    found = control_verdict(CURVES[code])
    assert found["code"] == code
    curve = CURVES[code]
    rise = (curve or {}).get("convergence") or dict.fromkeys(("start", "end", "step"), 0)
    for language in LANGUAGES:
        said, page = load_texts(language), Page(control_page(control_run(code), tmp_path, language))
        check_self_contained(page)
        heading = re.search(r"<h1>(.*?)</h1>", page.source)
        wanted = said[f"headline.control.{code}"].format(**{k: f"{rise[k]:.0f}" for k in ("start", "end", "step")})
        assert heading is not None
        assert heading[1].replace("‑", "-") == wanted
        assert ('section class="verdict winner"' in page.source) == (code in ("sudden", "gradual", "already"))
        if curve is not None:
            assert f"{curve['figures']['f1'][-1]:.3f}" in page.text
            assert "0.310" in page.text


def test_lower_is_better_for_depth(tmp_path):
    falling = curve_of(ramp(150, 175, low=0.3, high=0.1), "depth", without=0.3)
    assert control_verdict(falling)["code"] == "sudden"
    assert control_verdict(falling)["share"] == pytest.approx(2 / 3, abs=0.05)
    assert control_verdict(curve_of(ramp(150, 175, low=0.1, high=0.3), "depth", without=0.3))["code"] == "none"
    text = text_of(control_run() | {"fidelity": falling}, tmp_path)
    assert "RMSE (lower is better)" in text
    assert f"{control_verdict(falling)['share']:.0%} of the distance" in text


def test_an_end_below_the_start_is_said(tmp_path):
    curve = curve_of(ramp(600, 700, low=0.3), without=0.31)
    assert control_verdict(curve)["code"] == "none"
    assert "no better than without control" in text_of(control_run() | {"fidelity": curve}, tmp_path)
    fallen = curve_of([*ramp(150, 175), (525, 0.36)])
    assert control_verdict(fallen)["code"] == "slight"
    assert control_verdict(curve_of([*ramp(150, 175), (525, 0.30)]))["code"] == "worse"


@pytest.mark.parametrize(("end", "code"), [(450, "sudden"), (475, "rising"), (500, "rising")])
def test_a_plateau_has_more_than_one_measurement(end, code):
    assert control_verdict(curve_of(ramp(end - 50, end, noise=0.001)))["code"] == code


@pytest.mark.sample("ja-normals")
@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_kind_has_words(tmp_path, kind, language):
    run = control_run() | {"fidelity": curve_of(ramp(150, 175), kind, others=())}
    said, text = load_texts(language), text_of(run, tmp_path, language)
    for key in (f"metric.{MAIN[kind][0]}", f"explain.{MAIN[kind][0]}", f"about.control.{kind}"):
        assert said[key] in text


@pytest.mark.wide
def test_figures_cards_and_tables(tmp_path):
    draw_grid(tmp_path, 500)
    for name in ("run.json", "fidelity.json", "recipe.yaml", "metrics.jsonl"):
        (tmp_path / name).write_text("{}")
    run = control_run()
    page = Page(control_page(run, tmp_path))
    for svg in re.findall(r"<svg.*?</svg>", page.source, re.DOTALL):
        ElementTree.fromstring(svg)
    assert page.source.count("<svg") == 2
    wanted = ("0.310 → ", "584", "32 held out · 27 with a blank", "22c6da55331a4c92", "10 min 19 s on cpu", "1.92 st")
    for said in (*wanted, "high_threshold", "bad.png", "is not a picture", "0.0104", "−10.0%", "2.13.0"):
        assert said in page.text, said
    assert {"./run.json", "./fidelity.json", "./recipe.yaml", "./metrics.jsonl"} == set(page.values("href")) - {
        h for h in page.values("href") if h.startswith("#")
    }
    assert "20 of 21 measurements" in page.text
    assert len(re.findall(r'<tr><th scope="row">(\d+)</th>', page.source)) == 20
    early = run | {"steps": 275}
    early["recipe"]["training"]["stop_when"] = "converged"
    assert "stopped early, once settled (at most 500" in text_of(early, tmp_path)
    assert "early stop did not come" in text_of(early | {"steps": 500}, tmp_path)
    changed = run | {"frozen": {"denoiser_before": "a" * 16, "denoiser_after": "b" * 16}}
    assert re.search(r"Pretrained model unchanged</dt><dd class=\"big\">no<", write(changed, tmp_path))


def write(run: dict[str, Any], folder: Path) -> str:
    return control_page(run, folder).read_text(encoding="utf-8")


@pytest.mark.wide
def test_blank_conditions_are_named_up_to_twenty(tmp_path):
    text = text_of(control_run(), tmp_path)
    assert "blank-19.png" in text
    assert "blank-20.png" not in text
    assert "and 7 more" in text
    run = control_run()
    run["control"]["blank"] = ["only.png"]
    text = text_of(run, tmp_path)
    assert "only.png" in text
    assert "and 7 more" not in text
    run["control"]["blank"] = []
    assert "no condition is blank" in text_of(run, tmp_path)


def test_the_last_grid_is_inside_and_made_small(tmp_path):
    assert "<img" not in write(control_run(), tmp_path)
    draw_grid(tmp_path, 9, colour="red")
    draw_grid(tmp_path, 500, 2400)
    page = Page(control_page(control_run(), tmp_path))
    (uri,) = page.values("src")
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        assert picture.size == (1000, 500)
        assert picture.convert("RGB").getpixel((5, 5)) == (0, 0, 128)
    (tmp_path / "samples/step-000600.png").write_bytes(b"no picture")
    (tmp_path / "samples/step-000700.png").symlink_to("/etc/hostname")
    assert Page(control_page(control_run(), tmp_path)).values("src") == [uri]


@pytest.mark.sample("sudden-False-False")
@pytest.mark.parametrize(
    ("code", "longer", "measured"),
    [
        ("rising", True, False),
        ("none", True, False),
        ("short", True, True),
        ("unmeasured", False, True),
        ("sudden", False, False),
    ],
)
def test_the_commands_run(tmp_path, code, longer, measured):
    folder = tmp_path / "my run; rm -rf x"
    folder.mkdir()
    write_recipe(folder, Recipe(method="controlnet", output=str(folder)))
    found = commands(Page(control_page(control_run(code), folder)))
    for command in found:
        verb, values = parse(shlex.split(command)[1:])
        if verb == "sample":
            assert (values.run, values.control, values.prompts) == (str(folder), "photo.png", ["…"])
        else:
            assert values.method == "controlnet"
            assert values.output == "runs/longer"
            assert values.training.max_steps == (1000 if longer else Recipe().training.max_steps)
            assert values.control.fidelity.every == (25 if code == "unmeasured" else 50)
    assert [c.split()[1] for c in found].count("train") == (1 if longer or measured else 0)


def test_supplied_conditions_are_drawn_from_conditions(tmp_path):
    run = control_run()
    run["control"]["spec"] |= {"annotator": "supplied", "params": {}}
    page = Page(control_page(run, tmp_path))
    assert "edges of the drawn picture are compared with those of the true one" in page.text
    assert any("--control condition.png" in c for c in commands(page))


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_bare_run_is_reported(tmp_path, language):
    run = control_run("unmeasured")
    for key in ("fidelity", "losses", "frozen", "timings", "steps_per_second", "versions", "device"):
        del run[key]
    run["data"]["skipped"], run["control"]["blank"] = {}, []
    page = Page(control_page(run, tmp_path, language))
    check_self_contained(page)
    assert "<svg" not in page.source
    assert load_texts(language)["verdict.control.unmeasured"] in page.text


@pytest.mark.wide
def test_a_run_without_a_bank_does_not_speak_of_one(tmp_path):
    said = load_texts("en")
    assert said["explain.bank"] in text_of(control_run(), tmp_path)
    run = control_run()
    del run["losses"]["bank"]
    text = text_of(run, tmp_path)
    assert said["explain.bank"] not in text
    assert said["role.bank"] not in text
    assert said["role.target"] in text
    assert said["section.bands"] not in text_of(run | {"losses": {}}, tmp_path)


@pytest.mark.parametrize("language", LANGUAGES)
def test_outside_text_is_shown_and_not_obeyed(tmp_path, language):
    run = control_run()
    run["recipe"]["model"]["id"] = run["recipe"]["data"]["path"] = run["recipe"][EVIL] = run["device"] = EVIL
    run["control"]["blank"] = [EVIL] * 3
    run["control"]["spec"] |= {"annotator": EVIL, "params": {EVIL: EVIL}}
    run["data"]["skipped"] = {EVIL: EVIL}
    run["versions"]["difftuning-control"] = run["versions"][EVIL] = EVIL
    run["frozen"]["denoiser_before"] = EVIL
    run["fidelity"]["kind"] = EVIL
    folder = tmp_path / "a \x1b[31m\u202e<b>"
    page = Page(control_page(run, folder, language))
    check_self_contained(page)
    assert page.text.count('<img src=x onerror="alert(1)">␛[31m⟨U+202E⟩exe.gnp =cmd|x {{ 7*7 }} $x$') > 10
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page.source)
    assert "<b>" not in page.source
    assert "http" not in page.source.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.sample("ja")
@pytest.mark.parametrize("language", LANGUAGES)
def test_same_input_same_bytes(tmp_path, language):
    draw_grid(tmp_path, 500)
    run = control_run()
    before = copy.deepcopy(run)
    first = control_page(run, tmp_path, language).read_bytes()
    assert run == before
    stored = json.loads(json.dumps(run))
    assert control_page(stored, tmp_path, language).read_bytes() == first


def test_the_chart_marks_the_rise_on_the_main_figure_alone():
    t, curve = load_texts("en"), CURVES["sudden"]
    main, other = (charts.fidelity_chart(FidelityRecord.from_dict(curve), m, t) for m in ("f1", "ssim"))
    step = f"half of it done: step {curve['convergence']['step']:.0f}"
    assert step in main
    assert chart.BANK in main
    assert step not in other
    assert chart.BANK not in other
    for svg in (main, other):
        assert "without control" in svg
        assert ElementTree.fromstring(svg).get("aria-label") in ("F1", "SSIM")
    curves = [FidelityRecord.from_dict(curve_of(ramp(150, 175, count=n))) for n in (21, 31, 400)]
    dots = [charts.fidelity_chart(curve, "f1", t).count("<use") for curve in curves]
    assert dots[1] == dots[0] + 10
    assert dots[2] < dots[0]  # so many dots would hide the curve


def test_what_is_no_finished_controlnet_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"not finished \(its status is 'running␛'\).*go on with difftune resume"):
        control_page({"status": "running\x1b"}, tmp_path)
    lora = control_run()
    lora["recipe"]["method"] = "lora"
    with pytest.raises(UserError, match="the run's method is 'lora'; only"):
        control_page(lora, tmp_path)
    for language in ("xx", "../en", ""):
        with pytest.raises(UserError, match="choose one of en, ja"):
            control_page(control_run(), tmp_path, language)
    assert not list(tmp_path.iterdir())
