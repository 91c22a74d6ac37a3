"""Every file of a stopped run, deleted or with a byte flipped: a clear error or a rebuild, never a wrong result."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from support.pictures import write_pictures
from support.tiny_sd import tiny_pipeline

from .harness import Moment, again, broken_audits, commands, contents, import_what_it_imported, run

pytestmark = pytest.mark.slow
LAST = "difftune: "
WATCHED = ("metrics.jsonl", "run.json", "report.html")  # what has, or hashes, the figures that were logged on the way


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, flip], ids=["deleted", "flipped"])
def test_damage_is_told_or_mended(tmp_path, capsys, damage):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    given = commands(tmp_path / "model", write_pictures(tmp_path / "pictures"), tmp_path / "work")["controlnet"]
    again(tmp_path)
    outcome = run(given, tmp_path)
    assert outcome.code == 0, outcome.said
    import_what_it_imported(tmp_path)
    expected = contents(tmp_path / "work")
    again(tmp_path)
    # in the midst of training, with a checkpoint behind it
    stopped = run(given, tmp_path, Moment(signal.SIGKILL, "checkpointing", outcome.calls.count("checkpointing") // 2))
    assert stopped.code == -signal.SIGKILL
    shutil.copytree(tmp_path / "work", tmp_path / "kept")
    names = [p.relative_to(tmp_path / "kept") for p in sorted((tmp_path / "kept").rglob("*")) if p.is_file()]
    names = [n for n in names if n.name != "audit.jsonl" and not n.name.endswith(".lock") and ".partial" not in str(n)]
    assert {"cache", "run"} == {n.parts[0] for n in names}
    assert any(part.startswith("checkpoint-") for n in names for part in n.parts)
    assert any("banks" in n.parts for n in names)
    told = []
    for name in names:
        shutil.rmtree(tmp_path / "work")
        shutil.copytree(tmp_path / "kept", tmp_path / "work")
        damage(tmp_path / "work" / name)
        outcome = run(given, tmp_path)
        if outcome.code == 0:
            found = contents(tmp_path / "work")
            differing = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
            watched = {f"run/{n}" for n in WATCHED} if name.name == "metrics.jsonl" else set()
            assert (name, set(differing) - watched) == (name, set())
            assert broken_audits(tmp_path / "work") == []
        else:
            said = outcome.said.strip().split("\n")[-1]
            assert (name, outcome.code, said[: len(LAST)]) == (name, 2, LAST), outcome.said
            assert str(tmp_path / "work" / name.parent) in said
            told.append(name)
        with capsys.disabled():
            print(f"{name}: {'mended' if outcome.code == 0 else said}")
    assert [n for n in told if n.parts[0] == "cache" and "banks" not in n.parts] == []
