"""The voting page of a pilot: which pairs it shows, what it hides, and what it counts."""

from __future__ import annotations

import base64
import io
import shutil

import pytest
from PIL import Image

from difftuning_control.errors import UserError
from difftuning_control.evaluation.report.vote import rival_of, vote_pairs, write_vote_page
from difftuning_control.runs.pilot_record import PilotRecord
from support import report_samples as samples
from support.pages import LANGUAGES, Page, check_self_contained
from support.report_samples import pilot_report

PROMPTS = ["red apple", "dog face", "key"]
RED = {"plain": 50, "difftuning_tau1": 200}


def colour_of(uri: str) -> tuple[int, int, int]:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        return picture.convert("RGB").getpixel((0, 0))


@pytest.fixture
def pilot(tmp_path) -> PilotRecord:
    """One that `difftuning_tau1` wins, whose pictures have a colour of their own each: side, seed and prompt."""
    result = samples.pilot()
    samples.draw_pictures(tmp_path, result, PROMPTS)
    for side, red in RED.items():
        for seed in (0, 1, 2):
            folder = tmp_path / side / f"seed-{seed}" / "pictures-150"
            folder.mkdir(parents=True)
            for i in range(len(PROMPTS)):
                Image.new("RGB", (16, 16), (red, seed, i)).save(folder / f"{i}.png")
    return PilotRecord.from_dict(result)


def test_every_prompt_is_shown_at_every_seed_and_each_pair_says_which_is_which(pilot, tmp_path):
    pairs = vote_pairs(pilot, tmp_path, "difftuning_tau1")
    seen = set()
    for pair in pairs:
        left, right = colour_of(pair["left"]), colour_of(pair["right"])
        assert left[1:] == right[1:]
        assert (left[0], right[0]) == ((50, 200) if pair["first"] else (200, 50))
        assert pair["prompt"] == PROMPTS[left[2]]
        assert pair["true"].startswith("data:image/png")
        seen.add(left[1:])
    assert len(seen) == len(pairs) == 9
    assert {pair["first"] for pair in pairs} == {True, False}
    assert [p["prompt"] for p in pairs] != sorted(p["prompt"] for p in pairs)
    assert pairs == vote_pairs(pilot, tmp_path, "difftuning_tau1")


def test_seeds_whose_pictures_were_not_kept_are_left_out(pilot, tmp_path):
    shutil.rmtree(tmp_path / "plain" / "seed-1")
    assert len(vote_pairs(pilot, tmp_path, "difftuning_tau1")) == 6
    (tmp_path / "plain" / "seed-2" / "pictures-150" / "1.png").unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        vote_pairs(pilot, tmp_path, "difftuning_tau1")


def test_plain_is_shown_beside_what_the_verdict_names_or_the_best_of_the_others(pilot):
    assert rival_of(pilot) == "difftuning_tau1"
    worse = {"plain": [0.03, 0.031, 0.032], "prior": [0.06, 0.061, 0.062], "difftuning_tau1": [0.05, 0.051, 0.052]}
    assert rival_of(PilotRecord.from_dict(samples.pilot(worse))) == "difftuning_tau1"
    assert rival_of(PilotRecord.from_dict(samples.pilot({"plain": [0.03, 0.031, 0.032]}))) is None
    assert rival_of(PilotRecord.from_dict(samples.pilot({"prior": [0.03] * 3, "difftuning_tau1": [0.04] * 3}))) is None


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_pilots_report_leads_to_the_page_which_names_no_side_beside_a_picture(pilot, tmp_path, language):
    report = Page(pilot_report(pilot.to_dict(), tmp_path, language))
    assert "./vote.html" in report.values("href")
    page = Page(tmp_path / "vote.html")
    check_self_contained(page, scripts=1)
    before, after = page.source.split('<section id="result"')
    assert "difftuning_tau1" not in page.source
    assert after.count("<tr>") == 3
    assert "Plain fine-tuning" not in before.partition("<section")[2]


def test_a_report_without_pairs_leads_nowhere(tmp_path):
    result = samples.pilot({"plain": [0.1, 0.11, 0.12]})
    samples.draw_pictures(tmp_path, result, PROMPTS)
    assert "./vote.html" not in Page(pilot_report(result, tmp_path)).values("href")
    assert not (tmp_path / "vote.html").exists()


@pytest.mark.slow
def test_votes_in_a_browser_are_counted_for_the_side_that_drew_the_picture(pilot, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    pairs = vote_pairs(pilot, tmp_path, "difftuning_tau1")
    place = write_vote_page(pilot, tmp_path)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, wrong = browser.new_page(), []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: wrong.append(asked.url))
        page.goto(place.as_uri())
        for number, pair in enumerate(pairs):
            assert page.locator("#prompt").text_content() == pair["prompt"]
            assert page.locator("#left").get_attribute("src") == pair["left"]
            if number == 0:
                page.keyboard.press("ArrowDown")
            else:  # always for the rival
                page.locator(f"button[value={'right' if pair['first'] else 'left'}]").click()
        counted = [page.locator(f"#{name}").text_content() for name in ("plain", "rival", "same")]
        said = page.locator("#chance").text_content()
        assert page.locator("#pair").is_hidden()
        browser.close()
    assert counted == ["0", "8", "1"]
    assert "8 decided votes" in said
    assert "0.0078" in said  # 2 · 2⁻⁸
    assert [w for w in wrong if not w.startswith(("file:", "data:"))] == []
