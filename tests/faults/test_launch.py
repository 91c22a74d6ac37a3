"""A signal to `accelerate launch` reaches what it launched, which saves a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from difftuning_control.runs.identity import write_recipe

pytestmark = pytest.mark.slow


def wait_for(condition, seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.2)


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_the_launcher_saves_a_checkpoint(recipe, tmp_path, processes):
    training = replace(recipe.training, max_steps=100_000, checkpoint_every=100_000, batch_size=10)
    recipe = replace(recipe, training=training)
    write_recipe(tmp_path, recipe)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_machines",
        "1",
        "--num_processes",
        str(processes),
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    command += ["--multi_gpu"] if processes > 1 and "--cpu" not in command else []
    command += ["--module", "difftuning_control.cli", "train", "--config", str(tmp_path / "recipe.yaml")]
    with (tmp_path / "said").open("w") as said:
        launcher = subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    run = Path(recipe.output)
    try:
        wait_for(lambda: launcher.poll() is not None or (run / "metrics.jsonl").exists())
        assert launcher.poll() is None, (tmp_path / "said").read_text()
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(120)
        wait_for(lambda: list(run.glob("checkpoint-*/state.json")), 60)
        wait_for(lambda: "with a checkpoint of step" in (tmp_path / "said").read_text(), 60)
    finally:
        launcher.kill()
    assert launcher.returncode != 0
