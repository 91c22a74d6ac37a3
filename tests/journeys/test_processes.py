"""Several processes end with what one ends with: the same files, losses and weights, whatever number goes on.

Each launch has two processes (gloo, CPU) that do several jobs, since starting them takes longest.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from difftuning_control.cli import main
from difftuning_control.errors import UserError
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.inputs import ControlConfig, FidelityConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.training import ScheduleConfig, TrainingConfig, TuningConfig
from difftuning_control.runs.identity import write_recipe
from difftuning_control.system.digests import digest_of_file
from difftuning_control.verbs.train import train
from support import process_worker
from support.process_worker import run, small_files

WORKER = Path(process_worker.__file__)
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def make(tmp_path_factory, model_dir, pictures):
    """Recipes in which everything random plays a part; all have 20 rows to a step."""
    from difftuning_control.recipe.inputs import BankConfig, DataConfig, ModelConfig

    root = tmp_path_factory.mktemp("processes")

    def recipe(name: str, processes: int, method: str = "lora", cache: str | None = None, **training) -> Recipe:
        settings = {
            "max_steps": 4,
            "batch_size": 10 // processes,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 2,
            "ema_decay": 0.9,
            "checkpoint_every": 2,
            "validate_every": 0,
            "validation_size": 2,
            "sample_every": 0,
            **training,
        }
        control = ControlConfig()
        if method == "controlnet":
            control = ControlConfig(dropout=0.3, fidelity=FidelityConfig(every=0))
        return Recipe(
            method=method,
            model=ModelConfig(str(model_dir)),
            data=DataConfig(str(pictures), holdout=0.25, flip=True, cache=str(root / (cache or f"cache-{processes}"))),
            tuning=TuningConfig(schedule=ScheduleConfig("power", tau=0.5), prompt_dropout=0.3),
            bank=BankConfig(size=10, steps=2, batch_size=4),
            adapter=AdapterConfig(rank=4) if method == "lora" else AdapterConfig(),
            control=control,
            training=TrainingConfig(**settings),
            output=str(root / name),
        )

    return recipe


def launch(folder: Path, jobs: list[dict], fail: Recipe | None = None) -> subprocess.CompletedProcess:
    """Run jobs in two processes, one after the other; perhaps last one that fails on one of them, its bank first."""
    folder.mkdir(exist_ok=True)
    if fail is not None:
        write_recipe(folder, fail)
    order = {"train": jobs, "fail": str(folder / "recipe.yaml") if fail is not None else None}
    (folder / "jobs.json").write_text(json.dumps(order))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", WORKER, folder / "jobs.json"]
    return subprocess.run(
        [str(c) for c in command], env=environment, capture_output=True, text=True, timeout=1500, check=False
    )


def alone(recipe: Recipe, stop: int | None = None) -> Recipe:
    """The same in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with small_files():
        run({"recipe": recipe.to_dict(), "stop": stop})
    torch.set_num_threads(threads)
    return recipe


def weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    place = {"lora": "*.safetensors", "full": "pipeline/unet/*.safetensors", "controlnet": "controlnet/*.safetensors"}
    (file,) = Path(recipe.output).glob(place[recipe.method])
    return load_file(file)


def losses(recipe: Recipe) -> torch.Tensor:
    """Of every step, by role."""
    rows = [json.loads(line) for line in (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([[r["loss"], r["target_loss"], r["bank_loss"]] for r in rows if "loss" in r])


def assert_same_result(found: Recipe, expected: Recipe, what: str) -> None:
    """Equal but for the order of float32 sums; the largest difference is printed."""
    mine, its = weights(found), weights(expected)
    assert mine.keys() == its.keys()
    apart = max(float((mine[n] - its[n]).abs().max()) for n in its)
    largest = max(float(t.abs().max()) for t in its.values())
    step = float((losses(found) - losses(expected)).abs().max())
    print(f"\n{what}: weights differ by at most {apart:.1e} (the largest is {largest:.2f}), losses by {step:.1e}")
    torch.testing.assert_close(mine, its, **CLOSE)
    torch.testing.assert_close(losses(found), losses(expected), **CLOSE)
    record = json.loads((Path(found.output) / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["rows_per_step"] == 20


def tar_shards(folder: Path, count: int = 4, each: int = 5) -> Path:
    """WebDataset shards of coloured squares."""
    folder.mkdir()
    for shard in range(count):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(shard * each, (shard + 1) * each):
                content = io.BytesIO()
                Image.new("RGB", (16, 16), (12 * i, 250 - 11 * i, 90)).save(content, "PNG")
                for ending, part in (("png", content.getvalue()), ("txt", f"red {i}".encode())):
                    entry = tarfile.TarInfo(f"{i:03d}.{ending}")
                    entry.size = len(part)
                    tar.addfile(entry, io.BytesIO(part))
    return folder


def wide_pictures(folder: Path) -> Path:
    """Pictures of two shapes, so that bank rows, which are square, take a forward of their own in some steps."""
    folder.mkdir()
    for i in range(8):
        Image.new("RGB", (32, 8) if i % 2 else (16, 16), (20 * i, 90, 200 - 9 * i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"red {i}")
    return folder


def job(recipe: Recipe, **more) -> dict:
    return {"recipe": recipe.to_dict(), **more}


def files(folder: Path) -> dict[str, str]:
    """The digests by name, but for what tells when and by whom it was made."""
    found = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "audit.jsonl"]
    return {str(p.relative_to(folder)): digest_of_file(p) for p in found}


@pytest.fixture(scope="module")
def first(make, tmp_path_factory):
    """A LoRA and sharded full weights on two processes, then a run that fails on one of them."""
    recipes = [make("lora-2", 2), make("full-2", 2, "full", shard=True), make("failing", 2)]
    done = launch(tmp_path_factory.mktemp("first"), [job(r) for r in recipes[:2]], fail=recipes[2])
    return recipes, done


@pytest.mark.wide
def test_two_processes_train_a_lora_as_one_does_and_write_the_same_bank_and_caches(make, first):
    (recipe, *_), _ = first
    expected = alone(make("lora-1", 1))
    assert_same_result(recipe, expected, "LoRA on 2 processes against 1")
    mine, its = (files(Path(r.data.cache)) for r in (recipe, expected))
    assert len(its) > 6
    assert mine == its


@pytest.mark.wide
def test_the_verb_bank_draws_in_two_processes_and_speaks_once(first):
    _, done = first
    assert done.stdout.count("done:") == 1
    assert "holds 10 samples" in done.stdout


def test_a_mistake_that_all_processes_find_is_said_once_a_machine(monkeypatch, capsys):
    for rank, said in (("0", "difftune: there is no option --nonsense"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit, match="2"):
            main(["train", "--nonsense", "3"])
        found = capsys.readouterr().err
        assert found.startswith(said)
        assert bool(found) == bool(said)


def test_a_step_too_small_for_a_bank_row_is_refused_and_nothing_is_written(make):
    recipe = make("small", 1, gradient_accumulation_steps=1)
    recipe = replace(recipe, training=replace(recipe.training, batch_size=4))
    with pytest.raises(UserError, match=r"batch_size 4 makes 4 rows a step, .* leaves no row for the bank"):
        train(recipe)
    assert not Path(recipe.output).exists()


@pytest.mark.wide
def test_rows_split_over_forwards_are_those_of_one_forward(make, first):
    whole = make("lora-whole", 1, cache="cache-1", gradient_accumulation_steps=1)
    whole = alone(replace(whole, training=replace(whole.training, batch_size=20)))
    assert_same_result(whole, alone(make("lora-1", 1, resume=True)), "one forward against two")


@pytest.mark.wide
def test_weights_sharded_over_two_processes_train_as_whole_ones_do(make, first):
    (_, recipe, _), _ = first
    assert_same_result(recipe, alone(make("full-1", 1, "full")), "full weights sharded over 2 processes")


@pytest.mark.wide
def test_the_failure_of_one_process_ends_all_with_one_sentence(first):
    _, done = first
    assert done.returncode != 0
    assert done.stderr.count("difftune: process 1 cannot read its rows") == 1
    assert done.stderr.count("Traceback (most recent call last)") <= 1  # torchrun's own


@pytest.mark.slow
def test_other_methods_and_another_number_of_processes(make, tmp_path):
    def streamed(recipe: Recipe) -> Recipe:
        return replace(recipe, data=replace(recipe.data, path=str(shards), stream=True))

    def bucketed(recipe: Recipe) -> Recipe:
        return replace(recipe, data=replace(recipe.data, path=str(wide), buckets=True, bucket_aspect=4.0))

    shards, wide = tar_shards(tmp_path / "shards"), wide_pictures(tmp_path / "wide")
    full, control = make("full-1s", 1, "full"), make("control-1s", 1, "controlnet")
    stream = streamed(make("stream-1s", 1))
    buckets = bucketed(make("buckets-1s", 1))
    for recipe in (full, control, stream, buckets):
        alone(recipe)
    begun = alone(make("begun-by-one", 1, "full"), stop=2)  # an ordinary checkpoint
    two = {
        "ControlNet": make("control-2s", 2, "controlnet"),
        "full weights": make("full-2s", 2, "full"),
        "begun by one, gone on with by two": make("one-two", 2, "full", resume=True),
        "the same, then sharded": make("one-two-sharded", 2, "full", resume=True, shard=True),
        "streamed": streamed(make("stream-2s", 2)),
        "buckets": bucketed(make("buckets-2s", 2)),
    }
    begun_by_two = make("begun-by-two", 2, "full", shard=True)
    again = make("two-two", 2, "full", shard=True, resume=True)
    jobs = [
        job(two["ControlNet"]),
        job(two["full weights"]),
        job(two["begun by one, gone on with by two"], copy=begun.output),
        job(two["the same, then sharded"], copy=begun.output),
        job(two["streamed"]),
        job(two["buckets"]),
        job(begun_by_two, stop=2),
        job(again, copy=begun_by_two.output),
    ]
    done = launch(tmp_path, jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    for what, recipe in two.items():
        expected = {"ControlNet": control, "streamed": stream, "buckets": buckets}.get(what, full)
        assert_same_result(recipe, expected, what)
    assert_same_result(again, full, "sharded, interrupted, gone on with by two")
    (checkpoint,) = Path(begun_by_two.output).glob("checkpoint-2")
    assert len(list(checkpoint.glob("shard-*.safetensors"))) == 2
    last = make("two-one", 1, "full", resume=True)
    shutil.copytree(begun_by_two.output, last.output)
    assert_same_result(alone(last), full, "sharded over two, gone on with by one")
