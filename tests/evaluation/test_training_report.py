"""The report of a run: one page with nothing fetched or run, escaped, right where figures are few or damaged."""

import base64
import io
import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from difftuning_control.evaluation.band_losses import BandLosses
from difftuning_control.evaluation.drawing import grid_cells, save_grid
from difftuning_control.evaluation.report.lines import Line, line_chart, ticks
from difftuning_control.evaluation.report.training import MOST_STEPS, RunFacts, write_training_report

BANDS = BandLosses(centres=[0.1, 0.3, 0.5, 0.7, 0.9], losses=[0.5, 0.4, 0.3, 0.2, 0.1])
BASE = {"target": BANDS, "bank": BANDS}
FACTS = RunFacts(
    status="running",
    step=40,
    end=100,
    remaining=75.0,
    error=None,
    base=BASE,
    phases={"loading": 1.5, "training": 60.0},
    model="org/model",
    family="sd",
    method="lora",
    pictures=12,
    held_out=2,
    bank=64,
    prompts=["a red apple", "<script>alert(1)</script>"],
    side=96,
    first_row=None,
    device="cpu",
    settings=[("training.learning_rate", 1e-4), ("training.batch_size", 4), ("data.path", "pics"), ("x", None)],
)


def colour(shade: int, side: int = 96) -> Image.Image:
    return Image.new("RGB", (side, side), (shade, 255 - shade, shade // 2))


def run_folder(folder: Path, steps: list[int]) -> Path:
    rows = [{"step": s, "loss": 1.0, "target_loss": 1 / s, "bank_loss": 0.5} for s in range(1, 41)]
    bands = {f"validation/{role}_{u:.1f}": 0.1 for role in BASE for u in BASE[role].centres}
    lines = [json.dumps(r) for r in [*rows, {"step": 40, **bands}]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 41, "target_')
    shown = {"base": [colour(0), colour(250)]}
    for number, step in enumerate(steps):
        pictures = [colour(10 + number), colour(200 - number)]
        save_grid(folder / f"samples/step-{step:06d}.png", shown | {"s": pictures}, ["a", "b"])
    return folder


def page_of(folder: Path, facts: RunFacts = FACTS) -> str:
    return write_training_report(folder, facts).read_text(encoding="utf-8")


def test_the_page_fetches_and_runs_nothing(tmp_path):
    page = page_of(run_folder(tmp_path, [4, 40]))
    assert not re.search(r"<script|<link|@import|url\(|https?://|<iframe|onerror", page)
    assert set(re.findall(r'src="([^,"]*),', page)) == {"data:image/jpeg;base64"}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "prefers-color-scheme: dark" in page


def test_pictures_are_those_of_the_grids(tmp_path):
    page = page_of(run_folder(tmp_path, [4, 40]))
    found = [Image.open(io.BytesIO(base64.b64decode(uri))) for uri in re.findall(r'src="[^,"]*,([^"]*)"', page)]
    assert [p.size for p in found] == [(96, 96)] * 6  # the base, then the newest step first
    for picture, shade in zip(found, (0, 250, 11, 199, 10, 200)):
        assert max(abs(a - b) for a, b in zip(picture.getpixel((48, 48)), colour(shade).getpixel((0, 0)))) < 6
    assert re.findall(r'<th scope="row">([^<]*)</th>', page) == ["pretrained", "step 40", "step 4"]


def test_of_many_grids_some_are_shown_first_and_last_among_them(tmp_path):
    page = page_of(run_folder(tmp_path, list(range(2, 41, 2))))
    named = re.findall(r'<th scope="row">step (\d+)</th>', page)
    assert len(named) == MOST_STEPS
    assert (named[0], named[-1]) == ("40", "2")


@pytest.mark.parametrize(
    ("status", "there", "absent"),
    [
        ("running", ['http-equiv="refresh"', "1 min 15 s to go", "difftune resume"], ["difftune sample"]),
        ("complete", ["difftune sample", "a red apple"], ["refresh", "to go", "difftune resume"]),
        ("stopped", ["difftune resume", "step 40 of 100"], ["refresh", "to go<", "difftune sample"]),
        ("failed", ["the loss is not finite", "step 40 of 100"], ["refresh", "to go"]),
    ],
)
def test_the_page_says_how_it_stands(tmp_path, status, there, absent):
    error = "the loss is not finite" if status == "failed" else None
    page = page_of(run_folder(tmp_path, [40]), replace(FACTS, status=status, error=error))
    assert [text for text in there if text not in page] == []
    assert [text for text in absent if text in page] == []


def test_validation_is_told_against_the_pretrained_model(tmp_path):
    page = page_of(run_folder(tmp_path, []))
    assert "0.3" in page
    assert page.count("−66.7%") == 2  # 0.1 against a mean of 0.3, of both roles
    assert "training.learning_rate" in page
    assert ">data.path<" not in page


def test_an_empty_folder_and_damaged_pictures_give_a_page(tmp_path):
    assert "no step yet" in page_of(tmp_path, replace(FACTS, step=0))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/step-000004.png").write_bytes(b"no picture")
    Image.new("RGB", (20, 20)).save(tmp_path / "samples/step-000008.png")
    assert "<img" not in page_of(tmp_path)


def test_cells_of_a_grid_are_the_pictures(tmp_path):
    rows = {"base": [colour(i) for i in (1, 2, 3)], "a longer name": [colour(i) for i in (4, 5, 6)]}
    save_grid(tmp_path / "grid.png", rows, ["x", "y " * 40, "z"])
    with Image.open(tmp_path / "grid.png") as sheet:
        cells = grid_cells(sheet, 2, 3, 96)
    assert [[c.tobytes() for c in row] for row in cells] == [[p.tobytes() for p in row] for row in rows.values()]
    with pytest.raises(ValueError, match="has no 9 × 9 pictures"):
        grid_cells(Image.new("RGB", (50, 50)), 9, 9, 96)


def test_lines_lie_in_the_chart_and_leave_out_what_is_no_number():
    chart = line_chart("t", [Line("a<b", [0, 1, 2, 3], [1.0, math.nan, 9.0, math.inf], "target")], "step", width=400)
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]*)"', chart)[1].split()]
    assert len(points) == 2
    assert all(0 <= x <= 400 and 0 <= y <= 260 for x, y in points)
    assert points[0][1] > points[1][1]  # more is higher up
    assert "a&lt;b" in chart
    assert line_chart("t", [Line("a", [], [], "target")], "step") == ""


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 0.0131), (-5, 1234), (3, 3), (1, 300)])
def test_ticks_are_round_few_and_inside(low, high):
    found = ticks(low, high)
    assert 1 <= len(found) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    assert len({round(b - a, 12) for a, b in pairwise(found)}) <= 1
