"""A checkpoint restores a training bit for bit, is whole or not there, and holds nothing pickled."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from difftuning_control.errors import UserError
from difftuning_control.training.checkpoint import TrainingState, checkpoints, load_checkpoint, save_checkpoint
from support.checkpoints import assert_same_state, fresh


def step(state: TrainingState, number: int) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
    p = list(state.parameters.values())
    loss = (torch.tanh(x @ p[0].T + p[1]) @ p[2].T + p[3] - x[:, :2]).square().mean()
    if state.scaler is None:
        loss.backward()
        state.optimizer.step()
    else:
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
    state.optimizer.zero_grad()
    state.lr_scheduler.step()
    if state.ema is not None:
        state.ema.step(state.parameters.values())


@pytest.fixture
def trained() -> TrainingState:
    state = fresh(0)
    for number in range(4):
        step(state, number)
    return state


@pytest.mark.parametrize("ema", [True, False], ids=["ema", "no ema"])
@pytest.mark.parametrize("scaler", [True, False], ids=["scaler", "no scaler"])
def test_a_loaded_state_is_the_saved_one_and_goes_on_as_it_would_have(tmp_path, ema, scaler):
    state, loaded = fresh(0, ema, scaler), fresh(1, ema, scaler)
    for number in range(4):
        step(state, number)
    folder = save_checkpoint(tmp_path, 4, state, "me")
    assert load_checkpoint(folder, loaded, "me") == 4
    assert_same_state(loaded, state)
    for number in range(4, 8):
        step(state, number)
        step(loaded, number)
    assert_same_state(loaded, state)


def test_a_checkpoint_of_the_first_moment_restores_too(tmp_path):
    state, loaded = fresh(0), fresh(1)
    assert load_checkpoint(save_checkpoint(tmp_path, 0, state, "me"), loaded, "me") == 0
    assert_same_state(loaded, state)


def test_weights_are_restored_in_place(trained, tmp_path):
    loaded = fresh(1)
    before = [p.data_ptr() for p in loaded.parameters.values()]
    load_checkpoint(save_checkpoint(tmp_path, 4, trained, "me"), loaded, "me")
    assert [p.data_ptr() for p in loaded.parameters.values()] == before


def other_identity(folder: Path, state: TrainingState) -> TrainingState:
    save_checkpoint(folder.parent, 4, state, "you")
    return state


def other_parameters(folder: Path, state: TrainingState) -> TrainingState:
    return replace(state, parameters={f"x.{n}": p for n, p in state.parameters.items()})


def missing(name: str):
    def damage(folder: Path, state: TrainingState) -> TrainingState:
        (folder / name).unlink()
        return state

    return damage


def cut_short(name: str):
    def damage(folder: Path, state: TrainingState) -> TrainingState:
        (folder / name).write_bytes((folder / name).read_bytes()[:-9])
        return state

    return damage


def flipped_bit(name: str):
    def damage(folder: Path, state: TrainingState) -> TrainingState:
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
        return state

    return damage


def another_step(folder: Path, state: TrainingState) -> TrainingState:
    path = folder / "state.json"
    path.write_text(path.read_text().replace('"step": 4', '"step": 6'))  # still JSON, and two bits away
    return state


TENSORS = ["weights.safetensors", "optimizer.safetensors", "ema.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_identity, "another recipe, base or data"),
        (other_parameters, "another model or adapter"),
        *((damage(name), f"damaged.*{name}") for name in TENSORS for damage in (missing, cut_short, flipped_bit)),
        (cut_short("state.json"), r"damaged.*state\.json"),
        (another_step, r"damaged.*state\.json"),
    ],
)
def test_a_foreign_or_damaged_checkpoint_is_refused_and_touches_nothing(trained, tmp_path, change, message):
    folder = save_checkpoint(tmp_path, 4, trained, "me")
    untouched, loaded = fresh(1), fresh(1)
    with pytest.raises(UserError, match=message):
        load_checkpoint(folder, change(folder, loaded), "me")
    assert_same_state(loaded, untouched)


def test_only_the_newest_checkpoint_is_kept(trained, tmp_path):
    for number in (2, 9, 10):
        save_checkpoint(tmp_path, number, trained, "me")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-10"]
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-10"]


def test_checkpoints_are_ordered_by_number_and_half_written_ones_are_none(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", ".checkpoint-11.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").touch()
    (tmp_path / "checkpoint-12").mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-9"]


@pytest.mark.parametrize("function", ["write_tensors", "write_json", "place"])
def test_a_save_that_breaks_off_leaves_the_older_checkpoint_whole(trained, tmp_path, monkeypatch, function):
    older = fresh(1)
    save_checkpoint(tmp_path, 2, older, "me")

    def break_off(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"difftuning_control.training.checkpoint.{function}", break_off)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 4, trained, "me")
    (found,) = checkpoints(tmp_path)
    loaded = fresh(2)
    assert load_checkpoint(found, loaded, "me") == 2
    assert_same_state(loaded, older)
    save_checkpoint(tmp_path, 4, trained, "me")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"]


def test_nothing_is_pickled(trained, tmp_path):
    folder = save_checkpoint(tmp_path, 4, trained, "me")
    assert {p.name for p in folder.iterdir()} == {*TENSORS, "state.json"}
