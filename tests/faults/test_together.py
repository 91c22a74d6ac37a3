"""Runs at once over one cache and one bank end as each of them would have alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.pictures import write_pictures
from support.tiny_sd import tiny_pipeline

from .harness import broken_audits, contents, flags, import_what_it_imported, start

pytestmark = pytest.mark.slow
TIMES = 4  # they meet at other places every time
NAMES = ("one", "two")


def command(root: Path, name: str, **more: object) -> list[str]:
    values = {
        "model.id": root / "model",
        "data.path": root / "pictures",
        "data.cache": root / "work" / "cache",
        "data.holdout": 0.25,
        "bank.size": 70,
        "bank.steps": 1,
        "bank.batch_size": 35,
        "training.max_steps": 4,
        "training.batch_size": 5,
        "training.checkpoint_every": 2,
        "training.validation_size": 2,
        "training.sample_every": 0,
        "output": root / "work" / name,
    }
    return ["train", *flags(values | more)]


@pytest.mark.parametrize(
    "more",
    [{}, {"method": "controlnet", "control.annotator": "canny", "control.fidelity.every": 0}],
    ids=["lora", "controlnet"],
)
def test_two_runs_that_share_a_cache_end_as_runs_alone(tmp_path, more):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    write_pictures(tmp_path / "pictures")
    alone = {}
    for name in NAMES:
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        outcome = start(command(tmp_path, name, **more), tmp_path).end()
        assert outcome.code == 0, outcome.said
        import_what_it_imported(tmp_path)
        alone |= contents(tmp_path / "work")
    assert {Path(n).parts[0] for n in alone} == {"cache", *NAMES}
    for _ in range(TIMES):
        shutil.rmtree(tmp_path / "work")
        children = [start(command(tmp_path, name, **more), tmp_path, name=name) for name in NAMES]
        ends = [child.end() for child in children]
        assert [end.code for end in ends] == [0, 0], [end.said for end in ends]
        found = contents(tmp_path / "work")
        assert sorted(n for n in found.keys() | alone.keys() if found.get(n) != alone.get(n)) == []
        assert broken_audits(tmp_path) == []
