"""Every part of `difftune bench` that needs no script from elsewhere, once and briefly on the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest

from difftuning_control.verbs.bench.run import bench, table
from difftuning_control.verbs.bench.settings import Bench

pytestmark = pytest.mark.benchmark


def test_each_part_is_measured(tmp_path: Path, capsys):
    parts = ["difftuning", "bank", "startup", "memory", "profile"]
    result = bench(Bench(parts=parts, rounds=1, steps=3, batch_size=4, pictures=40, output=str(tmp_path / "bench")))
    with capsys.disabled():
        print("\n" + table(result))
    assert list(result["parts"]) == parts
    assert {"train", "train controlnet", "bank", "analyze", "evaluate"} == set(result["parts"]["memory"])
    assert sum(v for k, v in result["parts"]["profile"].items() if k != "seconds_a_step") == pytest.approx(1)
