"""`difftune bench`: both sides under one watch, and what is made of the times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from difftuning_control.errors import UserError
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.verbs.bench import inputs as material
from difftuning_control.verbs.bench.run import table
from difftuning_control.verbs.bench.settings import PEERS, Bench
from difftuning_control.verbs.bench.sides import ours, peer, ratio, run
from difftuning_control.verbs.parse import parse

SCRIPT = """
import sys, time, torch
weight = torch.nn.Parameter(torch.zeros(3))
optimizer = torch.optim.AdamW([weight])
for _ in range(int(sys.argv[1])):
    time.sleep(0.02)
    weight.sum().backward()
    optimizer.step()
print("the last line")
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "loop.py").write_text(SCRIPT)
    return str(tmp_path / "loop.py")


@pytest.mark.wide
def test_every_optimizer_step_but_the_first_is_timed(script, tmp_path):
    timed = run([script, "4", "0"], tmp_path / "side", 1)
    assert len(timed.steps) == len(timed.cpu) == 3
    assert all(seconds >= 0.02 for seconds in timed.steps)
    assert all(0 <= cpu <= wall + 0.02 for cpu, wall in zip(timed.cpu, timed.steps))
    assert timed.first_step is not None
    assert 0 < timed.first_step < timed.seconds
    assert timed.peak > 50 * 2**20  # torch alone takes more


@pytest.mark.wide
def test_memory_is_that_of_the_side_and_not_of_who_started_it(script, tmp_path):
    alone = run([script, "1", "0"], tmp_path / "alone", 1).peak
    held = b"x" * (600 * 2**20)
    beside = run([script, "1", "0"], tmp_path / "beside", 1).peak
    assert abs(beside - alone) < len(held) / 4


@pytest.mark.wide
def test_a_side_that_fails_ends_the_benchmark_with_what_it_said(script, tmp_path):
    with pytest.raises(UserError, match=r"ended with code 5 \(the last line\); all it said is in"):
        run([script, "1", "5"], tmp_path / "side", 1)


@pytest.mark.wide
def test_of_a_side_that_aborts_the_error_is_said_and_not_the_last_of_its_frames(tmp_path):
    script = tmp_path / "side.py"
    script.write_text("print('RuntimeError: out of numbers\\nframe #1: below (0x1)\\nframe #2: start (0x2)'); exit(6)")
    with pytest.raises(UserError, match=r"ended with code 6 \(RuntimeError: out of numbers\); all it said"):
        run([str(script)], tmp_path / "side", 1)


def test_the_ratio_is_the_median_over_rounds_of_the_medians_within_one():
    rounds = [([4.0, 2.0, 3.0], [1.0, 1.0, 9.0]), ([8.0], [2.0]), ([2.0], [2.0])]
    assert ratio(rounds) == {"ratio": 3.0, "least": 1.0, "most": 4.0}


@pytest.mark.parametrize("part", PEERS)
def test_both_sides_are_given_the_same_rows_rank_and_learning_rate(part, tmp_path):
    data = material.pictures(tmp_path / "data", 3, 32, edges=True)
    verb, command = parse(ours(part, "embedded", data, tmp_path, 64, 5, 2)[2:])
    assert verb == "train"
    assert isinstance(command, Recipe)
    assert not command.uses_bank
    given = dict(flag[2:].split("=", 1) for flag in peer(part, "peers", tmp_path, data, tmp_path, 64, 5, 2)[1:])
    training = command.training
    assert (given["max_train_steps"], given["train_batch_size"]) == (str(training.max_steps), str(training.batch_size))
    assert float(given["learning_rate"]) == training.learning_rate
    assert given["resolution"] == str(command.data.resolution)
    if part == "lora":
        assert given["rank"] == str(command.adapter.rank)
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    assert all((data / row["file_name"]).is_file() for row in rows)
    assert all((data / row["conditioning_image_file_name"]).is_file() for row in rows)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"parts": []}, "parts is"),
        ({"parts": ["bank", "bank"]}, "each once"),
        ({"rounds": 0}, "rounds is 0"),
        ({"parts": ["lora"]}, "name its folder by --peers"),
        ({"parts": ["lora"], "peers": "nowhere"}, "nowhere holds no train_text_to_image_lora.py"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        Bench(**settings)


def test_the_table_has_a_row_for_each_comparison():
    found = {"ratio": 2.0, "least": 1.9, "most": 2.2}
    part = {"cpu": found, "wall": found, "peak": {"ours": 2**30, "peer": 2**31}}
    part["caching"] = {"seconds": 1.25, "pictures": 16}
    parts = {
        "lora": part,
        "bank": {"clock": "cpu", "loop of 1": found, "loop of 4": found},
        "memory": {"train": {"10": 2**30, "1000": 2**30}},
    }
    lines = table({"parts": parts}).splitlines()
    assert "| lora: steps/s against diffusers' script | 2.00 (1.90 to 2.20) | 2.00 (1.90 to 2.20) |" in lines[2]
    assert "1.0 GiB against 2.0 GiB" in lines[2]
    assert len([line for line in lines if line.startswith("| bank")]) == 2
    assert "lora: caches of 16 pictures took 1.2 s to fill." in lines
    assert lines[-1] == "Peak memory of `train`: 1.00 GiB on 10 pictures, 1.00 GiB on 1000 pictures."


def test_nothing_of_the_benchmark_is_loaded_with_the_command_line():
    code = "import sys, difftuning_control.cli; print('difftuning_control.verbs.bench.parts' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"
