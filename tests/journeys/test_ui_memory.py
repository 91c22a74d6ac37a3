"""The page's server while somebody watches a training for an hour: as many looks at it as that hour has, one after the
other, in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.record import RunRecord

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'difftuning-control[ui]'")
psutil = pytest.importorskip("psutil")
playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]
ROOT = Path(__file__).parents[2]
LOOKS, FIRST = 2400, 600  # an hour has 1800 after the first ones, which fill caches
GROWTH = 12 * 2**20  # bytes; a look that kept its page would keep some hundred times that
SERVE = """
import sys
import psutil
from difftuning_control.verbs.ui import train_tab
from difftuning_control.verbs.ui.run import serve
from difftuning_control.verbs.ui.settings import UiSettings

looks, choose = 0, train_tab.chosen_job

def counted(jobs, name):
    global looks
    looks += 1
    if looks % 200 == 0:
        print("looks", looks, psutil.Process().memory_info().rss, flush=True)
    return choose(jobs, name)

train_tab.chosen_job, train_tab.EVERY = counted, 0.02
serve(UiSettings(sys.argv[1], port=0), lambda line: print(line, flush=True))
"""


def watched(folder: Path) -> Path:
    """A run that a page started, as it is while it trains; it "runs" as long as this test."""
    from difftuning_control.verbs.ui.jobs import RUNNING, Job

    run = folder / "runs" / "one"
    RunRecord(status="running", recipe_values=Recipe().to_dict()).write(run)
    me = psutil.Process()
    job = Job("00000000000000000001-aa", ["train"], str(run), RUNNING, me.pid, me.create_time())
    jobs = folder / ".difftune-ui" / "jobs"
    jobs.mkdir(parents=True)
    (jobs / f"{job.name}.json").write_text(json.dumps(asdict(job)))
    (jobs / f"{job.name}.log").write_text("it trains\n" * 200)
    return run


def test_an_hour_of_live_updates_takes_no_more_memory(tmp_path):
    run, over = watched(tmp_path), threading.Event()

    def train() -> None:
        step = 0
        while not over.wait(0.25):
            step = step % 280 + 1  # a run of 280 steps, over and over: what grows is not the run
            rows = [{"step": s, "loss": 0.5, "target_loss": 0.5 / s, "bank_loss": 0.2} for s in range(1, step + 1)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    words = [sys.executable, "-u", "-c", SERVE, str(tmp_path)]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    writer = threading.Thread(target=train, daemon=True)
    writer.start()
    taken: dict[int, int] = {}
    try:
        assert server.stdout is not None
        lines = iter(server.stdout.readline, "")
        address = next(found[0] for line in lines if (found := re.search(r"http://127\S+", line)))
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(address)
            page.get_by_role("tab", name="Train", exact=True).click()
            page.locator("#progress svg").first.wait_for(timeout=60_000)
            for line in lines:
                if found := re.fullmatch(r"looks (\d+) (\d+)\n", line):
                    taken[int(found[1])] = int(found[2])
                    if int(found[1]) >= LOOKS:
                        break
            browser.close()
    finally:
        over.set()
        server.terminate()
        server.wait(20)
    print({looks: f"{size / 2**20:.0f} MiB" for looks, size in taken.items()})
    assert taken[LOOKS] - taken[FIRST] < GROWTH, taken
