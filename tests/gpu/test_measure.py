"""The pack for a day with a GPU: what fails does not stop the rest, what is done is not done again, and all of it runs
at tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from difftuning_control.verbs.bench.settings import PEERS, PEERS_XL, Bench
from difftuning_control.verbs.parse import parse
from support.documents import NAMES
from support.scripts import loaded

# a side of diffusers, for as many steps as it is asked for
PEER = """
import argparse, torch
parser = argparse.ArgumentParser()
parser.add_argument("--max_train_steps", type=int)
steps = parser.parse_known_args()[0].max_train_steps
weight = torch.nn.Parameter(torch.zeros(3))
optimizer = torch.optim.AdamW([weight])
for _ in range(steps):
    weight.sum().backward()
    optimizer.step()
"""


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return loaded(Path(__file__).with_name("measure.py"))


def peers_in(folder: Path) -> Path:
    folder.mkdir()
    for name in PEERS.values():
        (folder / name).write_text(PEER)
    return folder


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def script(gpu: ModuleType, name: str, code: str, minutes: float = 1.0):
    return gpu.Part(name, [sys.executable, "-S", "-c", code], minutes)


def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_others(gpu, tmp_path):
    todo = [
        script(gpu, "bad", "import sys; print('of no use'); sys.exit(3)"),
        script(gpu, "slow", "import time; print('on my way', flush=True); time.sleep(600)", 1 / 6),
        script(gpu, "good", f"open({str(tmp_path / 'good')!r}, 'a').write('x'); print('5 passed')"),
    ]
    gpu.Pack(tmp_path / "out").run(todo)
    found = json.loads((tmp_path / "out" / gpu.RESULT).read_text())["parts"]
    assert {name: (part["state"], part["said"]) for name, part in found.items()} == {
        "bad": ("failed", "of no use"),
        "slow": ("too long", "on my way"),
        "good": ("done", "5 passed"),
    }
    said = (tmp_path / "out" / gpu.TABLE).read_text()
    assert "- bad: failed (of no use)" in said
    assert "- good: 5 passed (" in said
    todo[0] = script(gpu, "bad", "print('better')")
    again = gpu.Pack(tmp_path / "out").run([todo[0], todo[2]])["parts"]
    assert again["bad"]["state"] == "done"
    assert again["slow"]["state"] == "too long"
    assert (tmp_path / "good").read_text() == "x"  # done once


def test_what_there_is_no_time_for_is_left_out_and_done_in_the_next_call(gpu, tmp_path):
    clock = Clock()
    pack = gpu.Pack(tmp_path, minutes=1, now=clock)
    clock.now = 50
    assert pack.run([script(gpu, "a", "print(1)")])["parts"]["a"]["state"] == "left out"
    assert gpu.Pack(tmp_path).run([script(gpu, "a", "print(1)")])["parts"]["a"]["state"] == "done"


@pytest.mark.parametrize("sizes", ["Sizes", "TINY"])
def test_every_part_is_a_command_that_is_understood(gpu, tmp_path, sizes):
    """At the sizes of a GPU too, which no CPU runs."""
    chosen = gpu.Sizes() if sizes == "Sizes" else gpu.TINY
    peers = peers_in(tmp_path / "peers")
    for name in PEERS_XL.values():
        (peers / name).touch()
    found = gpu.parts(chosen, tmp_path, peers)
    assert len({part.name for part in found}) == len(found)
    assert len({part.result for part in found}) >= len(found) - 2
    for part in found:
        if part.command[: len(gpu.CLI)] == gpu.CLI:
            verb, asked = parse(part.command[len(gpu.CLI) :])
            assert verb == "bench"
            assert isinstance(asked, Bench)
            assert len(asked.parts) == 1
            assert asked.mixed_precision == chosen.precision
        else:
            files = part.command[6:] if part.name == "tests" else part.command[1:2]
            assert files
            assert all((gpu.ROOT / file).exists() for file in files)
    asked = {part.name for part in found}
    if sizes == "Sizes":
        assert {"flux", "sdxl total", "sd15 bank", "sdxl lora, batch 8", "sd15 lora, batch 1, inductor"} <= asked


def test_the_table_has_a_row_for_each_comparison(gpu):
    ratio = {"ratio": 1.5, "least": 1.4, "most": 1.6}
    sides = {"ours": 2**30, "peer": 2**31}
    lora = {
        "wall": ratio,
        "peak": sides,
        "device_peak": {"ours": 0, "peer": 0},
        "seconds_steps": {"ours": [0.1], "peer": [0.2]},
    }
    bank = {"a_second": 4.0, "loop of 1": ratio, "loop of 4": ratio}
    values = {
        "machine": {"device": "a GPU", "versions": {"torch": "2", "diffusers": "0"}},
        "parts": {
            "sd15 lora, batch 1": {"state": "done", "said": "", "seconds": 1.0, "parts": {"lora": lora}},
            "sd15 bank": {"state": "done", "said": "", "seconds": 1.0, "parts": {"bank": bank}},
            "tests": {"state": "left out", "said": "no time"},
        },
    }
    lines = gpu.table(values).splitlines()
    assert "| sd15 lora, batch 1: steps/s | 10.00 | 5.00 | 1.50 | 1.0 GiB | 2.0 GiB |" in lines
    assert "| sd15 bank: pictures/s | 4.00 | | 1.50 times a loop of 1, 1.50 times a loop of 4 | | |" in lines
    assert lines[-1] == "- tests: left out (no time)"


def test_the_pack_has_what_it_takes(tmp_path):
    """Its script is found from there, and knows all of its parts."""
    peers = peers_in(tmp_path / "peers")
    for name in PEERS_XL.values():
        (peers / name).touch()
    made = loaded(Path(__file__).with_name("make_pack.py"))
    made.make(tmp_path / "pack", peers, wheels=False)
    read_by_tests = [*NAMES, ".pre-commit-config.yaml"]
    assert [name for name in read_by_tests if not (tmp_path / "pack" / name).is_file()] == []
    assert {p.name for p in (tmp_path / "pack" / "peers").iterdir()} == {*PEERS.values(), *PEERS_XL.values()}
    listed = [sys.executable, "-S", "tests/gpu/measure.py", "--list"]
    said = subprocess.run(listed, cwd=tmp_path / "pack", capture_output=True, text=True, check=True).stdout
    assert said.startswith("flux (")
    assert "measure.py --peers peers --output results" in (tmp_path / "pack" / "run.sh").read_text()


@pytest.mark.slow
def test_the_whole_pack_runs_at_tiny_sizes(gpu, tmp_path, capsys):
    peers = peers_in(tmp_path / "peers")
    gpu.main(["--tiny", "--output", str(tmp_path / "out"), "--peers", str(peers), "--minutes", "60"])
    found = json.loads((tmp_path / "out" / gpu.RESULT).read_text())["parts"]
    assert {name: part["state"] for name, part in found.items() if part["state"] != "done"} == {}
    assert found["flux"]["parts"]["flux"]["of_units"] == 19
    assert found["recipes"]["said"].startswith("| z_image_lora, float8 | 20 GB |")
    assert found["sd15 total"]["parts"]["total"]["added_up"]
    assert "sd15 lora, batch 1: steps/s" in capsys.readouterr().out
