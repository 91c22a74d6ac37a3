"""Where nothing can be written a command says so in one sentence, before its work, and nothing has changed."""

import json
import shutil
from pathlib import Path

import pytest

from difftuning_control.cli import main
from difftuning_control.runs.audit import FILE
from difftuning_control.runs.folder import check_folder
from difftuning_control.system.digests import digest_of_file
from support.command_line import flags, settings
from support.disks import read_only
from support.feature_models import save_tiny_dinov2
from support.pictures import write_pictures
from support.refusals import assert_refused, snapshot

OF_A_PLACE, OF_THE_OUTPUT = "cannot be read or written (", "cannot be written ("


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_dir, pictures) -> Path:
    root = tmp_path_factory.mktemp("read-only")
    main(["train", *flags(settings(model_dir, pictures, root))])
    return root / "run"


@pytest.fixture
def locked(tmp_path):
    """A folder that cannot be written."""
    with read_only(tmp_path / "locked"):
        yield tmp_path / "locked"


@pytest.mark.sample("bank-bank.path", "train-output")
@pytest.mark.parametrize(
    ("verb", "key"),
    [
        ("train", "output"),
        ("train", "data.cache"),
        ("train", "bank.path"),
        ("bank", "data.cache"),
        ("bank", "bank.path"),
    ],
)
def test_training_and_drawing_a_bank_are_refused(locked, tmp_path, model_dir, pictures, capsys, verb, key):
    words = [verb, *flags(settings(model_dir, pictures, tmp_path, **{key: locked / "new"}))]
    said = OF_THE_OUTPUT if key == "output" else OF_A_PLACE
    assert_refused(words, capsys, tmp_path, str(locked), said)
    if key == "output":
        assert not (tmp_path / "cache").exists()


def test_the_folder_itself_is_refused_too(locked, tmp_path, model_dir, pictures, capsys):
    assert_refused(
        ["train", *flags(settings(model_dir, pictures, tmp_path, output=locked))], capsys, tmp_path, OF_THE_OUTPUT
    )


def test_a_pilot_is_refused(locked, tmp_path, model_dir, capsys):
    data = write_pictures(tmp_path / "data", count=12)
    values = settings(model_dir, data, tmp_path, output=locked / "new", **{"data.holdout": 0.5})
    values |= {"pilot.features": save_tiny_dinov2(tmp_path / "features"), "pilot.pictures": 5}
    assert_refused(["pilot", *flags(values)], capsys, tmp_path, str(locked), OF_THE_OUTPUT)


@pytest.mark.sample("sample", "export")
@pytest.mark.parametrize(
    "words",
    [
        ["sample", "--run", "run", "--prompts", '["red"]', "--output"],
        ["evaluate", "--runs", '["run"]', "--output"],
        ["analyze", "--run", "run", "--output"],
        ["export", "run", "--base", "referenced", "--to"],
        ["bench", "--output"],
    ],
    ids=lambda words: words[0],
)
def test_what_reads_a_run_is_refused_before_it_loads_anything(locked, finished, tmp_path, monkeypatch, capsys, words):
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    for place in (locked, locked / "a" / "b"):
        assert_refused([*words, str(place)], capsys, tmp_path, str(locked), OF_THE_OUTPUT)


def test_a_folder_that_can_be_written_is_looked_at_and_left_as_it_was(tmp_path):
    check_folder(tmp_path / "a" / "b", "marker", False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.wide
def test_a_run_that_was_stopped_and_cannot_be_written_any_more_stays_as_it_is_and_goes_on_later(
    tmp_path, model_dir, pictures, capsys, monkeypatch, finished
):
    """And it ends as the undisturbed one."""
    words = ["train", *flags(settings(model_dir, pictures, tmp_path, **{"training.resume": "true"}))]
    with monkeypatch.context() as patch:
        patch.setattr("difftuning_control.training.loop.asked", lambda: 15)
        with pytest.raises(SystemExit):
            main(words)
    assert (tmp_path / "run" / "checkpoint-1" / "state.json").is_file()
    with read_only(tmp_path / "run"):
        assert_refused(words, capsys, tmp_path, f"{tmp_path / 'run'}", OF_THE_OUTPUT)
    main(words)
    names = ("pytorch_lora_weights.safetensors", "metrics.jsonl")
    assert [digest_of_file(tmp_path / "run" / n) for n in names] == [digest_of_file(finished / n) for n in names]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "complete"


@pytest.mark.wide
def test_a_run_that_cannot_be_written_is_sampled_verified_and_exported_all_the_same(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    before = snapshot(run)
    with read_only(run):
        main(["verify", str(run)])
        main(["sample", "--run", str(run), "--steps", "1", "--prompts", '["red"]', "--output", str(tmp_path / "s")])
        main(["export", str(run), "--to", str(tmp_path / "export"), "--base", "referenced"])
    assert capsys.readouterr().err.count(f"note: {run / FILE} cannot be written") == 2
    assert snapshot(run) == before
    assert (tmp_path / "s" / "000-red.png").is_file()
    assert (tmp_path / "export" / "export.json").is_file()
