"""The reports: what they say, what they refuse, and that they are one harmless file."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
from html import unescape
from xml.etree import ElementTree

import pytest
from PIL import Image

from difftuning_control.errors import UserError
from difftuning_control.evaluation.metric_table import METRICS
from difftuning_control.evaluation.report.analysis import write_analysis_report
from difftuning_control.evaluation.report.language import FOLDER, languages, load_texts, placeholders
from difftuning_control.evaluation.report.side_names import side_about, side_label
from difftuning_control.system.text import harmless
from difftuning_control.verbs.parse import parse
from support import report_samples as samples
from support.pages import EVIL, LANGUAGES, Page, check_self_contained
from support.report_samples import pilot_report, verdict_of


@pytest.fixture(scope="module")
def pilot_page(tmp_path_factory) -> Page:
    folder = tmp_path_factory.mktemp("pilot")
    result = samples.pilot()
    samples.draw_pictures(folder, result, ["red apple", "dog face"])
    return Page(pilot_report(result, folder))


@pytest.mark.sample("analysis of a run-ja", "analysis-en")
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("kind", ["pilot", "analysis", "analysis of a run"])
def test_one_self_contained_file(tmp_path, language, kind):
    result = samples.pilot()
    samples.draw_pictures(tmp_path, result, ["red apple", "dog face"])
    if kind == "pilot":
        page = Page(pilot_report(result, tmp_path, language))
    else:
        page = Page(write_analysis_report(samples.analysis(kind != "analysis"), tmp_path, language))
    check_self_contained(page)
    assert (load_texts(language)["learnt.tuned_on"] in page.text) == (kind == "analysis of a run")
    assert page.tags[0] == ("html", {"lang": language})
    for svg in re.findall(r"<svg.*?</svg>", page.source, re.DOTALL):
        ElementTree.fromstring(svg)
    assert [p.name for p in tmp_path.glob(".report*")] == []


@pytest.mark.wide
def test_every_figure_is_there(pilot_page):
    result = samples.pilot()
    for side in result["sides"]:
        for run in side["runs"]:
            for metric, row in METRICS.items():
                if run.get(metric) is not None:
                    assert row.form.format(run[metric]) in pilot_page.text
            for role in ("target", "bank"):
                for loss in run["losses"][role]["base"]["loss"]:
                    assert f"{loss:.4f}" in pilot_page.text
        for row in side["search"]:
            assert f"{row['kid']:.4f}" in pilot_page.text
    for metric, row in METRICS.items():
        if result["base"].get(metric) is not None:
            assert row.form.format(result["base"][metric]) in pilot_page.text
    for key in (*result["settings"], *result["versions"], "adapter.rank", "tuning.forgetting_budget"):
        assert key in pilot_page.text
    for a in result["analysis"]["schedule"]["psi"]:
        assert f"{a:.3f}" in pilot_page.text
    assert "36 training runs" in pilot_page.text
    assert "1 h 15 min" in pilot_page.text
    assert {"./pilot.json", "./plain/seed-0", "./difftuning_budget/seed-2"} <= set(pilot_page.values("href"))


def test_ways_of_guidance_are_compared_side_by_side(pilot_page):
    page = pilot_page.text
    assert "at the scales 1.5; 3." in page
    rows = re.findall(r"Domain Guidance</td>.*?</tr>", pilot_page.source, re.DOTALL)
    assert len(rows) == len(samples.SIDES)
    assert all("better" in row for row in rows)


@pytest.mark.wide
def test_mean_and_spread_are_of_the_seeds(tmp_path):
    result = samples.pilot({"plain": [0.1, 0.2, 0.3], "prior": [0.1, 0.2, 0.3]})
    page = Page(pilot_report(result, tmp_path))
    assert "0.2000 ± 0.1000" in page.text


@pytest.mark.wide
def test_pictures_are_inside_and_large_ones_made_small(tmp_path):
    result = samples.pilot({"plain": [0.1] * 3, "prior": [0.1] * 3})
    samples.draw_pictures(tmp_path, result, [f"name {i}" for i in range(9)], size=700)
    page = Page(pilot_report(result, tmp_path))
    assert len(page.values("src")) == 9 * 4
    assert "name 8" in page.text
    assert len(page.source) < 2_000_000


@pytest.mark.wide
def test_outside_text_is_shown_and_not_obeyed(tmp_path):
    result = samples.pilot()
    samples.draw_pictures(tmp_path, result, [EVIL, "x" * 500])
    result["model"] = result["data"]["path"] = result["command"] = EVIL
    result["cost"]["device"] = EVIL
    result["settings"]["note"] = result["recipe"][EVIL] = result["versions"]["x"] = EVIL
    result["analysis"]["model"] = EVIL
    for side in result["sides"][1:]:
        side["name"] += EVIL
        for run in side["runs"]:
            run["folder"] = f"javascript:alert(1)//{EVIL}"
    page = Page(pilot_report(result, tmp_path))
    check_self_contained(page)
    analysis = {**samples.analysis(True), "model": EVIL, "run": EVIL, "data": {"path": EVIL}}
    other = Page(write_analysis_report(analysis, tmp_path))
    check_self_contained(other)
    for found in (page, other):
        assert not [a for t, a in found.tags if a.get("src") == "x"]
        assert '<img src=x onerror="alert(1)">␛[31m⟨U+202E⟩exe.gnp =cmd|x {{ 7*7 }} $x$' in found.text
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", found.source)


@pytest.mark.wide
@pytest.mark.parametrize("language", LANGUAGES)
def test_same_input_same_bytes(tmp_path, language):
    pages = []
    for _ in range(2):
        result = samples.pilot()
        samples.draw_pictures(tmp_path, result, ["red apple"])
        pages.append(pilot_report(result, tmp_path, language).read_bytes())
        pages.append(write_analysis_report(samples.analysis(True), tmp_path, language).read_bytes())
    assert pages[:2] == pages[2:]


@pytest.mark.wide
def test_the_result_is_left_as_it_was(tmp_path):
    result, analysis = samples.pilot(), samples.analysis(True)
    before = copy.deepcopy([result, analysis])
    pilot_report(result, tmp_path)
    write_analysis_report(analysis, tmp_path)
    assert [result, analysis] == before


def test_the_search_names_what_diverged_and_marks_one_length_of_the_chosen_rate(tmp_path):
    result = samples.pilot()
    result["sides"][0]["diverged"] = [4e-3]
    page = pilot_report(result, tmp_path).read_text(encoding="utf-8")
    assert "diverged at 0.004" in page
    best = re.findall(r'<tr class="best">.*?<td class="r">0\.001</td><td class="r">(\d+)</td>', page)
    assert best == ["150"] * len(result["sides"])
    assert "the best two of them" in page
    for side in result["sides"]:
        for row in side["search"]:
            del row["seeds"]  # as earlier versions left it
    assert "the best two of them" not in pilot_report(result, tmp_path).read_text(encoding="utf-8")


def test_a_bare_pilot_is_reported(tmp_path):
    result = samples.pilot({"plain": [0.1], "mine": [0.1]}, seeds=(7,))
    for key in ("analysis", "budget", "pictures"):
        result[key] = None
    for side in result["sides"]:
        side["search"] = []
        for run in side["runs"]:
            run["losses"] = {}
            run["pair_similarity"] = run["fid"] = float("nan")
    result["base"] |= {"kid": None, "fid": None, "bank_loss": None}
    page = Page(pilot_report(result, tmp_path))
    check_self_contained(page)
    assert "mine" in page.text
    assert "nan" not in page.text


# ---- what is refused


def test_half_finished_pilots_are_refused(tmp_path):
    running = samples.pilot() | {"status": "running"}
    with pytest.raises(
        UserError,
        match=r"not finished \(its status is 'running'\); run the same command again, .* where it stopped\.$",
    ):
        pilot_report(running, tmp_path)
    empty = samples.pilot()
    empty["sides"][2]["runs"] = []
    with pytest.raises(UserError, match=r"the side 'difftuning_tau1' has no finished run.*run the same command again"):
        pilot_report(empty, tmp_path)
    short = samples.pilot()
    short["sides"][1]["runs"] = [r for r in short["sides"][1]["runs"] if r["seed"] != 2]
    with pytest.raises(
        UserError, match=r"the side 'prior' lacks seed 2 at 75 steps and 1 more.*run the same command again"
    ):
        pilot_report(short, tmp_path)
    with pytest.raises(UserError, match="no side"):
        pilot_report(samples.pilot() | {"sides": []}, tmp_path)
    with pytest.raises(UserError, match="analysis is not finished"):
        write_analysis_report(samples.analysis() | {"status": "running"}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.wide
@pytest.mark.parametrize(
    ("file", "match"), [("absent.png", "missing or damaged"), ("bad.png", "damaged"), ("../x.png", "outside")]
)
def test_pictures_that_cannot_be_shown_are_named(tmp_path, file, match):
    folder = tmp_path / "pilot"
    result = samples.pilot()
    samples.draw_pictures(folder, result, ["red apple"])
    (folder / "bad.png").write_bytes(b"no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    result["pictures"]["rows"][1]["files"] = [file]
    with pytest.raises(UserError, match=match):
        pilot_report(result, folder)


# ---- languages


def test_languages_have_equal_keys_and_placeholders():
    assert set(LANGUAGES) <= set(languages())
    model = load_texts("en")
    for language in languages():
        raw = json.loads((FOLDER / f"{language}.json").read_text(encoding="utf-8"))
        assert list(raw) == list(model)
        for key, text in raw.items():
            assert placeholders(text) == placeholders(model[key]), key


@pytest.mark.wide
def test_every_word_is_used_and_every_used_word_exists():
    package = FOLDER.parent
    files = [package.parent / "metric_table.py", *package.glob("*.py"), *(package / "templates").glob("*.j2")]
    code = "\n".join(f.read_text(encoding="utf-8") for f in files)
    made = ("metric.", "explain.", "side.", "about.", "advice.", "do.", "role.", "headline.", "verdict.", "way.")
    made += ("chart.tuned",)
    for key in load_texts("en"):
        assert key.startswith(made) or f'"{key}"' in code or f"t.{key}" in code, key
    for found in re.findall(r'\b(?:t|texts)\["([\w.]+)"\]|"([\w.]+)"\|say|heading\(count, "([\w.]+)"\)', code):
        assert "".join(found) in load_texts("en")


@pytest.mark.parametrize(
    ("name", "label", "about"),
    [
        ("prior", "Prior preservation", "about.prior"),
        ("prior_lambda0.3", "Prior preservation, λ = 0.3", "about.prior"),
        ("difftuning_tau0.3", "Diff-Tuning, τ = 0.3", "about.difftuning_tau0.3"),
        ("difftuning_tau0.3_lambda2", "Diff-Tuning, τ = 0.3, λ = 2", "about.difftuning_tau0.3"),
        ("difftuning_tau0.7", "Diff-Tuning, τ = 0.7", "about.difftuning_tau"),
        ("retention_tau1_lambda0.5", "Retention at low noise, τ = 1, λ = 0.5", "about.retention_tau"),
    ],
)
def test_a_side_with_numbers_of_its_own_is_named_and_explained(name, label, about):
    texts = load_texts("en")
    general = name.replace("_lambda", "_general_lambda") if "_lambda" in name else f"{name}_general"
    assert "general prompts" in side_label(general, texts)
    assert side_about(general, texts) == f"{texts[about]} {texts['about.general']}"
    assert (side_label(name, texts).replace("\u00a0", " "), side_about(name, texts)) == (label, texts[about])
    for word in ("somebody's", "tuned", "plain_general"):
        assert side_about(word, texts) is None
    assert side_label("somebody's", texts) == "somebody's"


def test_a_new_language_is_one_new_file(tmp_path):
    for name in ("en.json", "ja.json"):
        shutil.copy(FOLDER / name, tmp_path)
    mine = load_texts("en") | {"yes": "oui"}
    (tmp_path / "fr.json").write_text(json.dumps(mine), encoding="utf-8")
    assert languages(tmp_path) == ["en", "fr", "ja"]
    assert load_texts("fr", tmp_path)["yes"] == "oui"
    with pytest.raises(UserError, match="'de' is unknown; choose one of en, fr, ja"):
        load_texts("de", tmp_path)
    (tmp_path / "fr.json").write_text(json.dumps({k: v for k, v in mine.items() if k != "card.best"}))
    with pytest.raises(UserError, match=r"fr\.json lacks 'card\.best'"):
        load_texts("fr", tmp_path)
    (tmp_path / "fr.json").write_text(json.dumps(mine | {"steps": "{m} pas"}))
    with pytest.raises(UserError, match=r"other placeholders in 'steps' than en\.json \(n\)"):
        load_texts("fr", tmp_path)
    (tmp_path / "fr.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_texts("fr", tmp_path)


def test_an_unknown_language_is_refused_before_anything_is_written(tmp_path):
    for language in ("xx", "../en", ""):
        with pytest.raises(UserError, match="choose one of en, ja"):
            pilot_report(samples.pilot(), tmp_path, language)
    assert not list(tmp_path.iterdir())


GAPS = {
    "rising": [0.28, 0.62, 1.05, 1.40, 1.62],
    "flat": [0.6, 0.61, 0.6, 0.59, 0.6],
    "not_monotone": [1.62, 1.4, 1.05, 0.62, 0.28],
    "unclear": [0.6, 0.7, 0.55, 0.65, 0.5],
    "wide": [2.3, 2.4, 2.3, 2.4, 2.3],
    "no_gap": [-0.2, -0.1, 0.0, -0.1, -0.2],
    "uncertain": [0.1, 0.12, 0.1, 0.12, 0.1],
}


@pytest.mark.sample("en-not_monotone")
@pytest.mark.parametrize("code", GAPS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_advice_has_words(tmp_path, code, language):
    half = {"flat": 0.01, "uncertain": 0.3, "no_gap": 0.04}.get(code, 0.15)
    gap = {"mean": GAPS[code], "low": [g - half for g in GAPS[code]], "high": [g + half for g in GAPS[code]]}
    page = Page(write_analysis_report(samples.analysis() | {"gap": gap}, tmp_path, language))
    said = load_texts(language)
    for prefix in ("headline.advice.", "advice.", "do."):
        assert said[prefix + code].replace("-", "‑") in page.text.replace("-", "‑")
    commands = [
        parse(shlex.split(re.sub("<[^>]*>", "", unescape(text)))[1:])
        for text in re.findall("<pre><code>(.*?)</code></pre>", page.source, re.DOTALL)
    ]
    asked = {"plain", "prior", "difftuning_measured"} | ({"difftuning_tau1"} if code != "rising" else set())
    compares = code in ("rising", "not_monotone", "unclear")
    assert [(verb, {*given.pilot.sides}) for verb, given in commands] == [("pilot", asked)] * compares


def test_a_pilot_that_compared_what_an_analysis_advises_does_not_advise_it_again(tmp_path):
    result, said = samples.pilot(), load_texts("en")["do.rising"]
    result["sides"] = [side for side in result["sides"] if side["name"] != "difftuning_measured"]
    assert said in Page(pilot_report(result, tmp_path)).text
    measured = {**copy.deepcopy(result["sides"][-1]), "name": "difftuning_measured"}
    prior = {**copy.deepcopy(result["sides"][-1]), "name": "prior"}
    result["sides"] = [s for s in result["sides"] if s["name"] != "prior"] + [prior, measured]
    page = Page(pilot_report(result, tmp_path))
    assert said not in page.text
    assert load_texts("en")["advice.rising"] in page.text


@pytest.mark.wide
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_pilots_frames_are_told_beside_its_resolution(tmp_path, language):
    result = samples.pilot()
    assert load_texts(language)["meta.frames"] not in Page(pilot_report(result, tmp_path, language)).text
    result["data"]["buckets"] = {"pictures": {"64×64": 40, "48×80": 24}, "cropped": 0.0625}
    said = Page(pilot_report(result, tmp_path, language)).text
    for expected in (load_texts(language)["meta.frames"], "64×64", "40", "48×80", "24", "6%"):
        assert expected in said


def test_harmless():
    assert harmless("dog 犬 é 👩‍🚀 ±") == "dog 犬 é 👩‍🚀 ±"
    assert harmless("a\x1b\n\x7f\x9b\u202e\ud800\ufffe") == "a␛␊␡⟨U+009B⟩⟨U+202E⟩⟨U+D800⟩⟨U+FFFE⟩"


# ---- the verdict

PLAIN = [0.040, 0.050, 0.045]
BETTER = [0.030, 0.041, 0.034]
NOISE = [0.039, 0.052, 0.044]


@pytest.mark.wide
@pytest.mark.parametrize(
    ("kid", "hit", "code", "side", "reason"),
    [
        ({"plain": PLAIN, "difftuning_tau1": BETTER}, None, "winner", "difftuning_tau1", None),
        ({"plain": PLAIN, "difftuning_tau1": NOISE}, None, "none", "plain", "within_noise"),
        ({"plain": PLAIN, "difftuning_tau1": BETTER}, {"difftuning_tau1": 0.87}, "none", "plain", "barred"),
        ({"plain": PLAIN, "difftuning_tau1": BETTER}, {"difftuning_tau1": 0.88}, "winner", "difftuning_tau1", None),
        ({"plain": BETTER, "prior": PLAIN}, None, "plain", "plain", None),
        ({"plain": BETTER, "prior": PLAIN, "difftuning_tau1": PLAIN}, {"prior": 0.5}, "plain", "plain", None),
        ({"plain": PLAIN, "prior": BETTER, "difftuning_tau1": NOISE}, {"prior": 0.5}, "none", "plain", "barred"),
        ({"plain": BETTER, "prior": PLAIN, "difftuning_tau1": BETTER}, None, "none", "plain", "within_noise"),
        ({"prior": PLAIN, "difftuning_tau1": BETTER}, None, "none", "difftuning_tau1", "no_plain"),
        ({"plain": PLAIN}, None, "none", "plain", "alone"),
        ({"plain": [float("nan")] * 3, "prior": BETTER}, None, "none", "prior", "unmeasured"),
    ],
)
def test_verdict(tmp_path, kid, hit, code, side, reason):
    result = samples.pilot(kid, hit)
    found = verdict_of(result)
    assert (found["code"], found["side"], found["reason"]) == (code, side, reason)
    for language in LANGUAGES:
        check_self_contained(Page(pilot_report(result, tmp_path, language)))


def test_verdict_numbers():
    found = verdict_of(samples.pilot({"plain": PLAIN, "difftuning_tau1": BETTER, "difftuning_measured": [0.02] * 3}))
    assert (found["side"], found["also"]) == ("difftuning_measured", ["difftuning_tau1"])
    first = found["comparisons"][0]
    assert first["difference"] == pytest.approx(0.01)
    assert first["spread"] == pytest.approx(0.001)
    assert first["standard_error"] == pytest.approx(0.001 / 3**0.5)
    assert first["change"] == pytest.approx(-0.01 / 0.045)
    assert (first["paired"], first["agree"], first["clear"], first["better"], first["seeds"]) == (*[True] * 4, 3)


def test_all_seeds_must_agree():
    # the mean is more than two standard errors from 0, one of twelve seeds disagrees
    plain, side = [0.05] * 12, [0.04] * 11 + [0.0501]
    found = verdict_of(samples.pilot({"plain": plain, "prior": side}, seeds=tuple(range(12))))
    first = found["comparisons"][0]
    assert first["difference"] > 2 * first["standard_error"]
    assert (first["agree"], found["reason"]) == (False, "within_noise")


def test_one_seed_proves_nothing():
    found = verdict_of(samples.pilot({"plain": [0.09], "prior": [0.01]}, seeds=(0,)))
    assert (found["code"], found["reason"], found["side"]) == ("none", "one_seed", "prior")


def test_other_seeds_are_compared_without_pairs():
    result = samples.pilot({"plain": PLAIN, "prior": BETTER})
    for run in result["sides"][1]["runs"]:
        run["seed"] += 10
    first = verdict_of(result)["comparisons"][0]
    assert not first["paired"]
    assert first["difference"] == pytest.approx(0.01)
    assert not first["clear"]  # two spreads of 0.005 cover it; pairs took the common part away
    for run in result["sides"][1]["runs"]:
        run["kid"] -= 0.02
    assert verdict_of(result)["code"] == "winner"


def test_higher_is_better_for_similarity():
    result = samples.pilot({"plain": PLAIN, "prior": BETTER})
    result["primary"] = "pair_similarity"
    for side, value in zip(result["sides"], (0.6, 0.7)):
        for run in side["runs"]:
            run["pair_similarity"] = value + 0.01 * run["seed"]
    assert (verdict_of(result)["code"], verdict_of(result)["side"]) == ("winner", "prior")
    result["primary"] = "target_loss"
    assert verdict_of(result)["lower"]


def test_each_side_counts_at_its_own_best_length():
    result = samples.pilot({"plain": PLAIN, "prior": NOISE})
    for run in result["sides"][1]["runs"]:
        if run["steps"] == 75:
            run["kid"] = 0.02
    assert verdict_of(result)["code"] == "none"
    result["sides"][1]["best_length"] = 75
    assert verdict_of(result)["code"] == "winner"


@pytest.mark.wide
def test_the_report_says_what_the_verdict_says(tmp_path):
    def said(kid, hit=None, **values) -> str:
        return Page(pilot_report(samples.pilot(kid, hit) | values, tmp_path)).text.replace("‑", "-")

    text = said({"plain": PLAIN, "difftuning_tau1": BETTER})
    assert "Recommended: Diff-Tuning, τ = 1" in text.replace("\xa0", " ")
    assert "clearly better" in text
    assert "clearly worse" not in text
    assert "17 times its standard error" in text
    text = said({"plain": PLAIN, "difftuning_tau1": NOISE})
    assert "No clear winner" in text
    assert "Recommended" not in text
    assert "within the noise" in text
    assert not re.search("clearly better than (plain|Plain|prior|Diff-Tuning)", text)  # of lengths it may be said
    text = said({"plain": PLAIN, "difftuning_tau1": BETTER}, {"difftuning_tau1": 0.5})
    assert "more than 5 points below" in text
    assert "by more than the noise of pictures and seeds" in text
    assert "cannot win" in text
    text = said({"plain": BETTER, "prior": PLAIN})
    assert "Plain fine-tuning is the best choice" in text
    base = samples.pilot()["base"]
    assert "the pretrained model is clearly better" in said(
        {"plain": PLAIN, "prior": BETTER}, base=base | {"kid": 0.001}
    )
    assert "right only 70.0%" in said({"plain": PLAIN, "prior": BETTER}, base=base | {"domain_judge": 0.7})


@pytest.mark.wide
def test_the_next_command_is_the_winners_recipe(tmp_path):
    from difftuning_control.verbs.parse import parse

    result = samples.pilot({"plain": PLAIN, "prior": BETTER})
    result["data"]["path"] = "my pictures; rm -rf x"
    page = Page(pilot_report(result, tmp_path))
    line = next(c for c in re.findall(r"<code>(.*?)</code>", page.source) if "difftune train" in c)
    line = re.sub("<.*?>", "", line).replace("&#39;", "'")
    import shlex

    verb, command = parse(shlex.split(line)[1:])
    assert verb == "train"
    assert (command.data.path, command.training.max_steps, command.bank.size) == ("my pictures; rm -rf x", 150, 256)
    schedule = command.tuning.schedule
    assert (schedule.kind, schedule.psi, schedule.xi, schedule.tau) == ("constant", 1.0, 1.0, None)


# ---- in a browser


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("width", [390, 1280])
def test_it_renders_without_sideways_scrolling(tmp_path, language, width):
    result = samples.pilot()
    samples.draw_pictures(tmp_path, result, ["red apple", "x" * 300, *(f"name {i}" for i in range(7))])
    pages = {"pilot": pilot_report(result, tmp_path, language).rename(tmp_path / "pilot.html")}
    pages["analysis"] = write_analysis_report(samples.analysis(True), tmp_path, language)
    for name, page in pages.items():
        # a headless window is at least 500 wide, so a frame stands for the phone; a stripe marks its right edge
        frame = tmp_path / "frame.html"
        frame.write_text(
            f'<body style="margin:0;background:#00f"><iframe src="{page.name}" scrolling="no" onload="this.style.width='
            "Math.max(this.contentDocument.documentElement.scrollWidth, "
            f'{width})+\'px\'" style="border:0;height:1500px;width:{width}px"></iframe>'
        )
        shot = tmp_path / f"{name}.png"
        subprocess.run(
            [
                "chromium",
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--allow-file-access-from-files",
                f"--screenshot={shot}",
                f"--window-size={width + 200},1500",
                str(frame),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
        with Image.open(shot) as picture:
            pixels = picture.convert("RGB")
        assert pixels.getpixel((width + 1, 700)) == (0, 0, 255)  # the frame did not have to grow
        assert pixels.getpixel((width - 2, 700)) != (0, 0, 255)
        inside = pixels.crop((0, 0, width, 1500))
        assert len(inside.getcolors(1 << 20)) > 100  # text and charts, not a blank page
        dark = sum(n for n, c in inside.convert("L").getcolors() if c < 100)
        assert 0.005 < dark / (width * 1500) < 0.3


@pytest.mark.sample("3-*")
@pytest.mark.parametrize(("seeds", "sides"), [(3, 3), (5, 4), (2, 2)])
def test_a_pilot_without_any_effect_names_a_winner_in_few_cases_only(seeds, sides):
    import random

    rng, named = random.Random(0), 0
    for _ in range(600):
        names = ["plain", *(f"difftuning_tau{i}" for i in range(sides))]
        found = [
            {
                "name": n,
                "best_length": 1,
                "runs": [{"seed": s, "steps": 1, "kid": rng.gauss(1, 0.1)} for s in range(seeds)],
            }
            for n in names
        ]
        named += verdict_of({"primary": "kid", "base": {}, "sides": found})["code"] == "winner"
    assert named / 600 < 0.08
