"""A signal to `accelerate launch` or torchrun reaches what it launched, which saves a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from difftuning_control.runs.identity import write_recipe
from difftuning_control.runs.record import read_run

pytestmark = pytest.mark.slow


def wait_for(condition, seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.2)


def trains_on_a_whole_bank(run: Path) -> bool:
    """Before the bank is whole a run has nothing to go on from, and ends at once."""
    record, metrics = read_run(run), run / "metrics.jsonl"
    begun = metrics.exists() and '"loss"' in metrics.read_text()
    return begun and record is not None and record.fingerprints.bank is not None


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_the_launcher_saves_a_checkpoint(recipe, tmp_path, processes):
    training = replace(recipe.training, max_steps=100_000, checkpoint_every=100_000, batch_size=10)
    recipe = replace(recipe, training=training)
    write_recipe(tmp_path, recipe)
    if processes == 1:
        words = ["accelerate.commands.launch", "--cpu", "--num_machines", "1", "--num_processes", "1"]
        words += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    else:  # with --cpu accelerate starts one, whatever it is told
        words = ["torch.distributed.run", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-m", *words, "--module", "difftuning_control.cli"]
    command += ["train", "--config", str(tmp_path / "recipe.yaml")]
    with (tmp_path / "said").open("w") as said:
        launcher = subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    run = Path(recipe.output)
    try:
        wait_for(lambda: launcher.poll() is not None or trains_on_a_whole_bank(run))
        assert launcher.poll() is None, (tmp_path / "said").read_text()
        assert json.loads((run / "run.json").read_text())["processes"] == processes
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(120)
        wait_for(lambda: list(run.glob("checkpoint-*/state.json")), 60)
        wait_for(lambda: "with a checkpoint of step" in (tmp_path / "said").read_text(), 60)
    finally:
        launcher.kill()
    assert launcher.returncode != 0
