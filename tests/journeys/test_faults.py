"""What a command leaves when it is stopped, the disk is full or bytes change; the kills are in `tests/faults`."""

import os
import re
import signal
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from difftuning_control.cli import main
from difftuning_control.runs.audit import read_audit
from difftuning_control.runs.folder import OutputFolder
from difftuning_control.runs.identity import write_recipe
from difftuning_control.system import signals
from difftuning_control.system.durable import is_empty, write_text
from difftuning_control.system.processes import kept
from difftuning_control.system.rows import Files, open_checked
from difftuning_control.system.tensors import write_checked, write_tensors
from difftuning_control.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from difftuning_control.training.loop import TrainingLoop
from difftuning_control.verbs.train import train
from support.checkpoints import assert_same_state, fresh


@contextmanager
def no_space(size: int):
    """No file can grow beyond so many bytes: the kernel's own error in the midst of a write."""
    resource = pytest.importorskip("resource")  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_any_flipped_bit_of_a_cached_file_is_noticed(tmp_path):
    path, tensors = tmp_path / "x", {"a": torch.arange(7.0), "b": torch.ones(2, 3, dtype=torch.uint8)}
    write_checked(path, tensors)
    whole = path.read_bytes()
    assert open_checked(path).entries.keys() == tensors.keys()
    for place in range(8, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        found = open_checked(path)
        assert found is None or all(torch.equal(Files([found]).rows(k)[:], tensors[k]) for k in tensors)


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\x01")])
def test_a_cached_file_that_is_gone_or_damaged_is_made_again_and_only_then(tmp_path, damage):
    made, there = [], []

    def make():
        made.append(1)
        return {"a": torch.zeros(5)}

    def ask():
        return Files([kept(tmp_path / "x", make, lambda: there.append(1))]).rows("a")[:]

    assert torch.equal(ask(), torch.zeros(5))
    assert torch.equal(ask(), torch.zeros(5))
    assert (len(made), len(there)) == (1, 1)
    damage(tmp_path / "x")
    (tmp_path / ".x.0123.partial").write_bytes(b"of a killed process")
    assert torch.equal(ask(), torch.zeros(5))
    assert len(made) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_without_space_the_older_checkpoint_and_nothing_else_is_there(tmp_path):
    older, newer = fresh(0), fresh(1)
    save_checkpoint(tmp_path, 2, older, "me")
    with no_space(300), pytest.raises(OSError, match=re.escape("checkpoint-4")) as error:
        save_checkpoint(tmp_path, 4, newer, "me")
    assert error.value.filename is not None
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    loaded = fresh(2)
    assert load_checkpoint(checkpoints(tmp_path)[0], loaded, "me") == 2
    assert_same_state(loaded, older)


@pytest.mark.parametrize(
    "write", [lambda p: write_text(p, "x" * 999), lambda p: write_tensors(p, {"a": torch.ones(999)})]
)
def test_without_space_the_earlier_file_stays_and_the_error_names_it(tmp_path, write):
    path = tmp_path / "file"
    path.write_text("earlier")
    with no_space(100), pytest.raises(OSError, match="file") as error:
        write(path)
    assert error.value.filename == str(path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "earlier")]


def test_what_a_killed_run_left_of_its_first_file_hinders_no_other(tmp_path):
    (tmp_path / ".run.json.0123.partial").write_text("{")
    assert is_empty(tmp_path)
    OutputFolder(tmp_path, resume=False, overwrite=False).release()


def test_an_earlier_run_is_cleared_with_its_record_last(tmp_path, monkeypatch):
    for name in ("README.md", "run.json", "schedule.json"):
        (tmp_path / name).write_text('{"status": "complete"}')
    folder, gone = OutputFolder(tmp_path, resume=False, overwrite=True), []
    monkeypatch.setattr("pathlib.Path.unlink", lambda self, **_: gone.append(self.name))
    folder.clear()
    assert gone == ["README.md", "schedule.json", "run.json"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_with_a_code_of_its_own(monkeypatch, capsys, number, code):
    before = signal.getsignal(number)
    monkeypatch.setitem(main.__globals__["RUNNERS"], "bank", lambda command: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ended:
        main(["bank", "--data.path", "embedded/icons"])
    assert ended.value.code == code
    assert "run the same command again" in capsys.readouterr().err
    assert signal.getsignal(number) is before


def test_a_deferred_signal_is_noted_and_one_passed_on_by_a_launcher_is_the_same():
    with signals.watched(), signals.deferred():
        assert signals.asked() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked() == signal.SIGTERM
    assert signals.asked() == 0


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    monkeypatch.setattr(signals, "AGAIN", -1.0)
    child = os.fork()
    if child == 0:
        with signals.watched(), signals.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


@pytest.mark.wide
def test_sigterm_in_training_saves_at_the_next_step_and_resumes_bit_for_bit(recipe, tmp_path, monkeypatch, capsys):
    whole = replace(recipe, output=str(tmp_path / "whole"))
    train(whole)
    write_recipe(tmp_path, recipe)
    advance = TrainingLoop.advance

    def stopped(self, number, more=True):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self, number, more)

    command = ["train", "--config", str(tmp_path / "recipe.yaml"), "--training.resume", "true"]
    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "advance", stopped)
        with pytest.raises(SystemExit) as ended:
            main(command)
    assert ended.value.code == 143
    assert "with a checkpoint of step 3; go on with difftune resume" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    main(command)
    name = "pytorch_lora_weights.safetensors"
    torch.testing.assert_close(load_file(tmp_path / "run" / name), load_file(tmp_path / "whole" / name), atol=0, rtol=0)
    audit = read_audit(tmp_path / "run")
    assert [e["outcome"] for e in audit.entries] == ["begun", "interrupted", "begun", "done"]
    assert audit.faults == []
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
