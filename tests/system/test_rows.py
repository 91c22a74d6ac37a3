"""Rows that are left on disk are those that were written, and never others."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from difftuning_control.cli import main
from difftuning_control.data.conditions import Conditions
from difftuning_control.data.latents import LatentMoments
from difftuning_control.errors import UserError
from difftuning_control.recipe.inputs import ControlConfig, FidelityConfig
from difftuning_control.recipe.training import TuningConfig
from difftuning_control.runs.identity import write_recipe
from difftuning_control.system import rows as stored
from difftuning_control.system.rows import Files, Rows, open_checked
from difftuning_control.system.tensors import digest_of_tensors, write_checked
from difftuning_control.training import preparation
from difftuning_control.training.inputs import TrainingInputs
from difftuning_control.training.loop import TrainingLoop
from difftuning_control.verbs import train as trainer

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool]


def written(folder: Path, parts: list[dict[str, torch.Tensor]], lead: int = 1) -> Files:
    """Files with these tensors."""
    for number, tensors in enumerate(parts):
        write_checked(folder / f"{number}.safetensors", tensors)
    found = [open_checked(folder / f"{number}.safetensors", lead) for number in range(len(parts))]
    assert [f.digest for f in found] == [digest_of_tensors(tensors) for tensors in parts]
    return Files(found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_way_to_index_gives_what_the_tensor_gives(tmp_path, dtype):
    whole = torch.randn(7, 3, 2, 5, generator=torch.Generator().manual_seed(0)).mul(50).to(dtype)
    beside = torch.arange(7)
    files = written(tmp_path, [{"a": whole[part], "b": beside[part]} for part in (slice(3), slice(3, 7))], lead=2)
    rows = files.rows("a")
    assert (len(rows), rows.shape) == (7, whole.shape)
    for index in (
        0,
        5,
        -1,
        slice(None),
        slice(2, 5),
        [6, 1, 1],
        torch.tensor(4),
        torch.tensor([4, 2]),
        (3, 1),
        (torch.tensor(6), torch.tensor(2)),
        (torch.tensor([0, 6]), torch.tensor([2, 0])),
    ):
        assert torch.equal(rows[index], whole[index]), index
        assert rows[index].dtype == dtype
    assert torch.equal(torch.stack(list(rows)), whole)
    assert torch.equal(files.rows("b")[[6, 0]], beside[[6, 0]])
    assert torch.equal(rows.narrow(0, 2, 4).narrow(0, 1, 2)[:], whole[3:5])
    assert [torch.equal(one[:], part) for one, part in zip(files.each("a"), whole.split([3, 4]))] == [True, True]
    with pytest.raises(IndexError):
        rows[7]


def test_the_digest_of_a_shard_is_known_without_reading_it_again(tmp_path):
    shards = torch.randint(0, 255, (5, 2, 3, 4, 4), dtype=torch.uint8).split([3, 2])
    files = written(tmp_path, [{"conditions": shard} for shard in shards], lead=2)
    found = files.each("conditions")
    for number in range(2):
        (tmp_path / f"{number}.safetensors").unlink()
    assert [rows.digest for rows in found] == [digest_of_tensors({"conditions": shard}) for shard in shards]
    with pytest.raises(AssertionError):
        _ = found[0].narrow(0, 0, 2).digest


def test_of_the_views_only_the_first_is_read_where_only_it_is_meant(tmp_path):
    mean = torch.randn(5, 2, 4, 3, 3)
    rows = written(tmp_path, [{"mean": mean[:3]}, {"mean": mean[3:]}], lead=2).rows("mean")

    def scale(latents: torch.Tensor) -> torch.Tensor:
        return (latents - 0.1) * 0.7

    lazy, there = (LatentMoments(m, m).first_views(scale) for m in (rows, mean))
    assert lazy.shape == there.shape
    for index in (4, slice(None), torch.tensor([3, 0, 3])):
        assert torch.equal(lazy[index], there[index])
    assert torch.equal(lazy.narrow(0, 1, 3)[:], there[1:4])


def test_what_was_read_can_be_written_to_and_is_read_again_as_it_was(tmp_path):
    rows = written(tmp_path, [{"a": torch.ones(2, 3)}]).rows("a")
    rows[0].zero_()
    assert torch.equal(rows[:], torch.ones(2, 3))


def test_no_more_files_than_so_many_are_open_and_none_stays_open(tmp_path, monkeypatch):
    def open_files() -> int:
        return len(os.listdir("/dev/fd"))

    monkeypatch.setattr(stored, "OPEN", 3)
    before = open_files()
    rows = written(tmp_path, [{"a": torch.full((2, 2), float(i))} for i in range(9)]).rows("a")
    assert open_files() == before
    for number in [*range(18), 3, 17, 0]:
        assert torch.equal(rows[number], torch.full((2,), float(number // 2)))
        assert open_files() <= before + 3
    del rows
    assert open_files() == before


@pytest.mark.parametrize("row", [0, 3])
def test_bytes_that_change_after_the_check_are_never_taken_for_rows(tmp_path, row):
    files = written(tmp_path, [{"a": torch.ones(2, 8)}, {"a": torch.ones(2, 8)}])
    rows, path = files.rows("a"), tmp_path / f"{row // 2}.safetensors"
    content = bytearray(path.read_bytes())
    content[-32 * (2 - row % 2)] ^= 1
    with path.open("r+b") as file:  # in place, as a disk would do it
        file.write(content)
    with pytest.raises(UserError, match=r"safetensors changed while it was in use"):
        rows[row]
    assert torch.equal(rows[row ^ 1], torch.ones(8))
    with path.open("r+b") as file:
        file.truncate(len(content) - 40)
    with pytest.raises(UserError, match="changed while it was in use"):
        rows[row | 1]


def test_a_file_that_is_deleted_while_it_is_read_is_read_on(tmp_path):
    rows = written(tmp_path, [{"a": torch.ones(2, 8)}]).rows("a")
    rows[0]
    (tmp_path / "0.safetensors").unlink()
    assert torch.equal(rows[1], torch.ones(8))


# --- training -------------------------------------------------------------------------------------------------------


def read_whole(found: TrainingInputs) -> TrainingInputs:
    """The same with everything in memory, and nothing left to read."""
    targets, bank, control = found.targets, found.bank, found.control
    assert bank is not None
    assert all(isinstance(rows, Rows) for rows in (targets.moments.mean, targets.moments.std, bank.latents))

    def held(conditions: Conditions | None) -> Any:
        return conditions and replace(conditions, shards=[shard[:] for shard in conditions.shards])

    moments, conditions = LatentMoments(targets.moments.mean[:], targets.moments.std[:]), held(targets.conditions)
    embeddings = replace(found.embeddings, tensors={n: rows[:] for n, rows in found.embeddings.tensors.items()})
    return replace(
        found,
        targets=replace(targets, moments=moments, conditions=conditions),
        embeddings=embeddings,
        bank=replace(bank, latents=bank.latents[:]),
        control=control and replace(control, bank=held(control.bank)),
    )


@pytest.mark.wide
@pytest.mark.parametrize("method", ["lora", "controlnet"])
def test_rows_from_disk_train_to_the_same_weights_as_rows_in_memory(recipe, tmp_path, monkeypatch, method):
    monkeypatch.setattr("difftuning_control.data.latents.SHARD", 3)
    monkeypatch.setattr("difftuning_control.data.conditions.SHARD", 3)
    control = ControlConfig(dropout=0.3, fidelity=FidelityConfig(every=0), bank_condition="own")
    recipe = replace(
        recipe,
        method=method,
        data=replace(recipe.data, flip=True),
        tuning=TuningConfig(retention_prompts="own"),
        control=control if method == "controlnet" else recipe.control,
    )
    trainer.train(recipe)
    prepare = preparation.prepare_inputs
    monkeypatch.setattr(preparation, "prepare_inputs", lambda *given: read_whole(prepare(*given)))
    trainer.train(replace(recipe, output=str(tmp_path / "whole")))

    def files(folder: Path) -> dict[str, bytes]:
        found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}
        return found | {"metrics": (folder / "metrics.jsonl").read_bytes()}

    assert files(tmp_path / "whole") == files(tmp_path / "run")
    assert len(files(tmp_path / "run")) > 1


@pytest.mark.wide
def test_a_cache_that_changes_under_a_run_ends_it_with_a_sentence_and_the_run_goes_on_to_the_same_end(
    recipe, tmp_path, monkeypatch, capsys
):
    trainer.train(replace(recipe, output=str(tmp_path / "undisturbed")))
    path = max(Path(recipe.data.cache).glob("moments-*.safetensors"), key=lambda p: p.stat().st_size)
    advance = TrainingLoop.advance

    def change(loop: TrainingLoop, number: int, more: bool = True) -> None:
        if number == 4:
            content = path.read_bytes()
            with path.open("r+b") as file:
                file.write(content[:1000] + bytes(255 - byte for byte in content[1000:]))
        advance(loop, number, more)

    write_recipe(tmp_path, recipe)
    monkeypatch.setattr(TrainingLoop, "advance", change)
    with pytest.raises(SystemExit) as ended:
        main(["train", f"--config={tmp_path}/recipe.yaml"])
    assert ended.value.code == 2
    assert f"{path} changed while it was in use" in capsys.readouterr().err
    monkeypatch.undo()
    trainer.train(replace(recipe, training=replace(recipe.training, resume=True)))
    name = "pytorch_lora_weights.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
