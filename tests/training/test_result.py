"""The result of a training: the history of its steps."""

from __future__ import annotations

import pytest

from difftuning_control.runs.record import RunRecord
from difftuning_control.training.result import TrainingResult


def test_the_history_is_a_dictionary_a_line_without_one_that_was_cut_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 1, "validation": 2.0}\n{"step": 2, "lo')
    result = TrainingResult(RunRecord(status="complete"), tmp_path)
    assert result.history == [{"step": 1, "loss": 0.5}, {"step": 1, "validation": 2.0}]


def test_a_line_in_the_middle_that_is_damaged_is_not_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match="delimiter"):
        _ = TrainingResult(RunRecord(), tmp_path).history
