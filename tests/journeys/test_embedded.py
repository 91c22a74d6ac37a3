"""The model and data that the package carries."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image

from difftuning_control.data.sources import embedded_set, load_images
from difftuning_control.families.loading import embedded_model
from difftuning_control.recipe.requests import VerifyRequest
from difftuning_control.runs.verify import verify

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.wide
def test_the_model_is_a_small_stock_pipeline_without_pickles():
    files = [p for p in embedded_model().rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".txt"}
    assert sum(p.stat().st_size for p in files) <= 45e6
    pipe = DiffusionPipeline.from_pretrained(embedded_model())
    assert type(pipe) is StableDiffusionPipeline
    picture = np.asarray(pipe("red apple", num_inference_steps=6).images[0], dtype=float)
    assert picture.shape == (64, 64, 3)
    # an apple on white: a light border, and a middle that is redder than it is blue
    middle = picture[16:48, 16:48].mean((0, 1))
    assert picture[:3].mean() > 200
    assert middle[0] > middle[2] + 20


@pytest.mark.sample("icons")
@pytest.mark.parametrize("style", ["icons", "flat"])
def test_each_style_has_64_pictures_to_tune_on_and_others_to_evaluate_on(style):
    tune, evaluate = load_images(f"embedded/{style}"), load_images(f"embedded/{style}-eval")
    assert len(tune) == 64
    assert len(evaluate) >= 256
    assert not {e.caption for e in tune.examples} & {e.caption for e in evaluate.examples}
    assert {e.load().size for e in tune.examples} == {(64, 64)}


def test_names_that_the_base_never_saw_are_marked_and_never_tuned_on():
    for style in ("icons", "flat"):
        for part in ("", "-eval"):
            lines = (embedded_set(style + part) / "metadata.jsonl").read_text().splitlines()
            unknown = [row for row in map(json.loads, lines) if not row["known_to_base"]]
            assert len(unknown) == (34 if part else 0)


@pytest.mark.wide
def test_the_hook_example_runs_and_adds_at_most_ten_lines(tmp_path):
    script = ROOT / "examples" / "hook_into_your_loop.py"
    assert 1 <= sum("# +" in line and '"""' not in line for line in script.read_text().splitlines()[8:]) <= 10
    command = [sys.executable, str(script), "--steps", "10", "--bank", str(tmp_path / "bank")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "step 10: loss" in result.stdout


@pytest.mark.slow
def test_the_demo_ends_with_its_report(tmp_path, capsys):
    from difftuning_control.cli import main

    output = tmp_path / "demo"
    main(["demo", "--steps", "2", "--output", str(output)])
    targets = json.loads((output / "summary.json").read_text())["targets"]
    assert list(targets) == ["icons", "flat"]
    page = (output / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "Plain fine-tuning" in page
    for target, found in targets.items():
        assert {row["rows"] for row in found["table"]} == {"target", "bank"}
        assert f'href="./{target}/report.html"' in page
        assert verify(VerifyRequest(str(output / target), strict=True))["status"] == "same"
    with Image.open(output / "grid.png") as grid:
        assert grid.height > 8 * 64  # four rows a target
    printed = capsys.readouterr().out
    assert "KID" in printed
    lora = next(line for line in printed.splitlines() if "load_lora_weights" in line).split('"')[1]
    pipe = DiffusionPipeline.from_pretrained(embedded_model())
    pipe.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    assert pipe("red apple", num_inference_steps=2).images[0].size == (64, 64)


@pytest.mark.slow
def test_the_demos_two_pilots_find_the_same_side_by_side_as_one_after_the_other(tmp_path, capsys):
    from difftuning_control.cli import main

    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):  # of which each of two processes has one
            torch.set_num_threads(threads)
            main(["demo", "--steps", "2", "--output", str(tmp_path / str(threads))])
            found.append(json.loads((tmp_path / str(threads) / "summary.json").read_text()))
            printed = capsys.readouterr().out
            assert "icons, a far style" in printed
            assert "flat, a near style" in printed
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_a_demo_writes_beside_nothing_that_is_not_its_own(tmp_path, capsys):
    from difftuning_control.cli import main

    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--steps", "2", "--output", str(tmp_path), "--overwrite"])
    assert stopped.value.code == 2
    assert "holds thesis.txt, which no demo writes" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_first_losses_are_the_same_under_every_version_to_four_digits(tmp_path, capsys):
    """Tokenizer, text encoder, autoencoder, denoiser, sampled bank and random numbers in one figure each."""
    from difftuning_control.cli import main

    data = ["--data.path", "embedded/icons", "--data.limit", "16", "--data.holdout", "0.25", "--bank.size", "8"]
    few = [
        "--bank.steps",
        "4",
        "--training.max_steps",
        "1",
        "--training.batch_size",
        "5",
        "--training.sample_every",
        "0",
    ]
    places = ["--data.cache", str(tmp_path / "cache"), "--output", str(tmp_path / "run")]
    main(["train", *data, *few, *places, "--training.validation_size", "2", "--tuning.schedule.kind", "power"])
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert (first["target_loss"], first["bank_loss"]) == pytest.approx((1.06220, 0.16295), abs=6e-5)
