"""The page's memory while somebody watches a training for two hours: as many live updates as that takes, one after the
other, each with something new to show."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.record import RunRecord

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'difftuning-control[ui]'")
psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.slow
LOOKS, FIRST = 3600, 600  # at one each two seconds; the first ones fill caches
GROWTH = 4 * 2**20  # bytes; a look that kept what it showed would keep thirty times that


def watched(folder: Path) -> tuple[Path, Path]:
    """A run that a page started, as it is while it trains, and its log; it "runs" as long as this test."""
    from difftuning_control.verbs.ui.jobs import RUNNING, Job

    run = folder / "runs" / "one"
    RunRecord(status="running", recipe_values=Recipe().to_dict()).write(run)
    me = psutil.Process()
    job = Job("00000000000000000001-aa", ["train"], str(run), RUNNING, me.pid, me.create_time())
    jobs = folder / ".difftune-ui" / "jobs"
    jobs.mkdir(parents=True)
    (jobs / f"{job.name}.json").write_text(json.dumps(asdict(job)))
    return run, jobs / f"{job.name}.log"


def test_two_hours_of_live_updates_take_no_more_memory(tmp_path):
    from difftuning_control.verbs.ui.page import build_page
    from difftuning_control.verbs.ui.places import Places
    from difftuning_control.verbs.ui.studio import Studio

    run, log = watched(tmp_path)
    page = build_page(Studio(Places.of(tmp_path)))
    look = next(f.fn for f in page.fns.values() if any(event == "tick" for _, event in f.targets))
    taken, signs, sizes = {}, None, []
    for number in range(1, LOOKS + 1):
        step = number % 280 + 1  # a run of 280 steps, over and over: what grows is not the run
        rows = [{"step": s, "loss": 0.5, "target_loss": 0.5 / s, "bank_loss": 0.2} for s in range(1, step + 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        log.write_text(f"step {number}\n" * 200)
        shown = look(None, signs)
        signs = shown[-2]
        sizes.append(sum(len(part) for part in shown if isinstance(part, str)))
        if number in (FIRST, LOOKS):
            gc.collect()
            taken[number] = psutil.Process().memory_info().rss
    print({looks: f"{size / 2**20:.1f} MiB" for looks, size in taken.items()}, f"{sum(sizes) / 2**20:.0f} MiB shown")
    assert min(sizes) > 3000  # each look showed a table, a chart and a log
    assert taken[LOOKS] - taken[FIRST] < GROWTH
