"""A full disk, at several sizes: a clear error, what was whole stays, and with room the command ends the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from difftuning_control.system.digests import digest_of_file
from difftuning_control.training.checkpoint import checkpoints
from support.disks import enlarge, small_disk
from support.pictures import write_pictures
from support.tiny_sd import tiny_pipeline

from .harness import again, broken_audits, commands, contents, import_what_it_imported, run

pytestmark = pytest.mark.slow
ROOM = 1 << 28
PAGE = 4096
# which command, which of its folders lies on the small disk, disks of how many times what it holds in the end, and what
# must have been written when one of them was full
CASES = {
    "caching": ("train", "cache", (0.85, 0.97), "moments-"),
    "annotating": ("controlnet", "cache", (0.9, 0.97), "conditions-"),
    "bank building": ("bank", ".", (0.4, 0.8), "bank-00001"),
    "checkpointing": ("train", "run", (0.5, 1.8, 2.8, 3.5), "checkpoint-4"),
    "exporting": ("export", ".", (0.3, 0.97), "export"),
}


def pages(folder: Path) -> int:
    return sum(-(-p.stat().st_size // PAGE) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("phase", CASES)
def test_a_full_disk_loses_nothing(tmp_path, capsys, phase):
    name, place, shares, file = CASES[phase]
    tiny_pipeline().save_pretrained(tmp_path / "model")
    given = commands(tmp_path / "model", write_pictures(tmp_path / "pictures"), tmp_path / "work")
    again(tmp_path)
    if name == "export":
        assert run(given["train"], tmp_path).code == 0
        (tmp_path / "work" / "run").rename(tmp_path / "finished")
        again(tmp_path)
    assert run(given[name], tmp_path).code == 0
    import_what_it_imported(tmp_path)
    expected, disk, met = contents(tmp_path / "work"), tmp_path / "work" / place, []
    whole = pages(disk)
    for share in shares:
        again(tmp_path)
        with small_disk(disk, int(share * whole) * PAGE):
            outcome = run(given[name], tmp_path)
            met.append(outcome.said.strip().split("\n")[-1])
            assert outcome.code == 2, outcome.said
            assert met[-1].startswith("difftune: ")
            assert met[-1].endswith("(No space left on device); mend that, or choose another place.")
            for checkpoint in checkpoints(disk):
                hashes = json.loads((checkpoint / "state.json").read_text())["files"]
                assert hashes == {n: digest_of_file(checkpoint / n) for n in hashes}
            if file in met[-1] and phase == "checkpointing":
                assert [p.name for p in checkpoints(disk)] == ["checkpoint-2"]
            assert [p for p in disk.glob(".*.partial") if phase != "bank building"] == []
            enlarge(disk, ROOM)
            outcome = run(given[name], tmp_path)
            assert outcome.code == 0, outcome.said
            found = contents(tmp_path / "work")
            assert sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n)) == []
            assert broken_audits(tmp_path) == []
        with capsys.disabled():
            print(f"{phase}, {share:.0%} of what it needs: {met[-1]}")
    assert any(file in said for said in met)
