"""The whole way in a browser on the embedded model: pictures, a training, comparing, voting, exporting."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from difftuning_control.runs.record import read_run
from difftuning_control.runs.votes import tallies
from difftuning_control.verbs.ui.files import PICTURE

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'difftuning-control[ui]'")
playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]
ROOT = Path(__file__).parents[2]
PATIENCE = 240_000  # milliseconds for what a model does
EVIL = "<img src=x onerror=\"document.title='broken'\"> heart"


@pytest.fixture(scope="module")
def studio(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """A page over a folder with eight pictures: its address and the folder."""
    folder = tmp_path_factory.mktemp("studio")
    (folder / "emoji").mkdir()
    for path in sorted((ROOT / "difftuning_control" / "assets" / "flat" / "tune").glob("*.png"))[:8]:
        shutil.copy(path, folder / "emoji")
        (folder / "emoji" / path.name).with_suffix(".txt").write_text(path.stem.replace("-", " "))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    words = [sys.executable, "-u", "-m", "difftuning_control.cli", "ui", str(folder), "--port", "0"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        lines = iter(server.stdout.readline, "")
        yield next(found[0] for line in lines if (found := re.search(r"http://127\S+", line))), folder
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture
def browse(studio) -> Iterator:
    """Opens the page in a window of a width; what it says on its console and asks of others is a failure."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        wrong: list[str] = []

        def browse(width: int, scheme: str):
            window = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page = window.new_page()
            page.set_default_timeout(30_000)
            own = studio[0].partition("/?")[0]
            page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
            page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith((own, "data:", "blob:")) else None)
            page.goto(studio[0])
            page.get_by_role("tab", name="Pictures").wait_for()
            page.wait_for_timeout(1500)  # until gradio listens
            return page

        yield browse
        browser.close()
        assert wrong == []


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()
    page.wait_for_timeout(800)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_and_fetches_nothing_from_elsewhere(browse, width, scheme):
    page = browse(width, scheme)
    page.locator("#pictures img").first.wait_for()
    for name in ("Train", "Compare", "Why", "Runs", "Pictures"):  # none of them in a menu
        open_tab(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


def test_the_whole_way(browse, studio):
    page, folder = browse(1280, "light"), studio[1]

    # pictures: a caption that is markup is text, and is mended
    victim = sorted((folder / "emoji").glob("*.png"))[2]
    victim.with_suffix(".txt").write_text(EVIL)
    open_tab(page, "Train")
    open_tab(page, "Pictures")
    card = page.locator(f"#pictures [data-pick='{victim.name}']")
    assert EVIL in card.inner_text()
    assert page.title() == "difftune"
    assert PICTURE in (card.locator("img").get_attribute("src") or "")
    card.click()
    box = page.locator("#caption textarea")
    playwright.expect(box).to_have_value(EVIL)
    box.fill("a heart")
    page.locator("#save").click()
    playwright.expect(card).to_contain_text("a heart")
    assert victim.with_suffix(".txt").read_text() == "a heart"

    # what it will take: pictures without a caption are named in its place
    bare = sorted((folder / "emoji").glob("*.txt"))[5]
    text = bare.read_text()
    bare.unlink()
    open_tab(page, "Train")
    page.locator("#ask").click()
    playwright.expect(page.locator("#price")).to_contain_text("1 of the 8 pictures have no caption", timeout=PATIENCE)
    bare.write_text(text)
    page.locator("#ask").click()
    playwright.expect(page.locator("#price")).to_contain_text("in all", timeout=PATIENCE)

    # a training of 20 steps: watched, stopped, gone on with
    open_tab(page, "Train")
    page.get_by_label("Steps", exact=True).fill("20")
    page.get_by_label("Batch", exact=True).fill("5")
    page.get_by_label("Name of the run").fill("one")
    page.get_by_text("Everything else").click()
    page.get_by_role("button", name="bank").click()
    page.locator("[id='bank.size']").locator("input, textarea").fill("8")
    page.locator("#start").click()
    state = page.locator("#progress .state")
    page.get_by_text(re.compile(r"^[1-9]\d* of 20$")).wait_for(timeout=PATIENCE)
    page.locator("#stop").click()
    playwright.expect(state).to_have_text("stopped", timeout=PATIENCE)
    page.get_by_role("button", name="Go on").click()
    playwright.expect(state).to_have_text("done", timeout=PATIENCE)
    page.locator("#grids img").first.wait_for()
    assert page.locator("#progress svg").count() > 0
    record = read_run(folder / "runs" / "one")
    assert record is not None
    assert (record.is_complete, record.steps) == (True, 20)

    # comparing, with a slider moved
    open_tab(page, "Compare")
    page.locator("#prompts textarea").fill("heart\napple")
    page.locator("#draw").click()
    page.locator("#comparison img").nth(3).wait_for(timeout=PATIENCE)
    before = page.locator("#comparison img").nth(2).get_attribute("src")
    page.locator("#strength input[type=number]").fill("0")
    page.locator("#draw").click()
    playwright.expect(page.locator("#comparison")).to_contain_text("adapter at 0", timeout=PATIENCE)
    assert page.locator("#comparison img").nth(2).get_attribute("src") != before
    page.locator("#strength input[type=number]").fill("1")

    # a picture large, and the one below it by an arrow
    page.locator("#comparison img").first.press("Enter")
    page.keyboard.press("ArrowDown")
    large = page.locator("#comparison img.large")
    assert (large.get_attribute("alt") or "").startswith("runs/one: ")
    page.keyboard.press("Escape")
    assert large.count() == 0

    # space ends what is being drawn
    page.get_by_role("spinbutton", name="Sampling steps").fill("200")
    page.locator("#draw").click()
    page.locator("#halt").wait_for()
    page.locator("#comparison").click()
    page.keyboard.press("Space")
    playwright.expect(page.locator("#comparison")).to_contain_text("Stopped; not drawn: ", timeout=PATIENCE)
    playwright.expect(page.locator("#halt")).to_be_hidden()
    page.get_by_role("spinbutton", name="Sampling steps").fill("15")

    # over a picture, with a strength over the noise
    page.get_by_text("Draw over a picture").click()
    page.locator("#begin-picture input[type=file]").set_input_files(victim)
    page.get_by_text("Over the noise").first.click()
    page.locator("#over-noise").locator("input, textarea").fill("0:0, 0.5:1")
    page.wait_for_timeout(1000)
    page.locator("#draw").click()
    playwright.expect(page.locator("#comparison")).to_contain_text("over the picture", timeout=PATIENCE)
    assert page.locator("#comparison svg").count() == 1

    # a blind vote
    page.get_by_text("Vote blind").click()
    page.locator("#begin").click()
    page.locator("#pair img").first.click(timeout=PATIENCE)
    playwright.expect(page.locator("#votes")).to_contain_text("95 % interval", timeout=PATIENCE)
    assert sum(t.won + t.lost for t in tallies(folder / "runs" / "one")) == 1

    # an export
    open_tab(page, "Runs")
    page.locator("#runs [data-pick='runs/one']").click()
    page.get_by_role("button", name="Export").first.click()
    page.get_by_label("as", exact=True).click()
    page.get_by_role("option", name="kohya").click()
    page.get_by_role("button", name="Export").last.click()
    page.get_by_text("is being written").wait_for()
    open_tab(page, "Train")
    playwright.expect(page.locator("#jobs tbody tr").first).to_contain_text("done", timeout=PATIENCE)
    assert [*(folder / "exports" / "one-kohya").glob("*.safetensors")]
