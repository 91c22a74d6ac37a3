"""Blind votes of a run: counted, kept with it, with an interval; a run stays verified with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from difftuning_control.errors import UserError
from difftuning_control.runs.manifest import files_of_run
from difftuning_control.runs.votes import VOTES, Tally, add_vote, tallies, wilson


@pytest.mark.parametrize(
    ("won", "count", "low", "high"),
    # by R's prop.test(won, count, correct = FALSE)
    [(7, 10, 0.3967781, 0.8922087), (0, 5, 0.0, 0.4344825), (10, 10, 0.7224672, 1.0), (50, 100, 0.4038315, 0.5961685)],
)
def test_the_interval_is_wilsons(won, count, low, high):
    assert wilson(won, count) == pytest.approx((low, high), abs=1e-6)


def test_without_a_vote_nothing_is_known():
    assert wilson(0, 0) == (0.0, 1.0)
    assert Tally("base", 0, 0, 3).share is None


def test_votes_are_kept_with_the_run_by_the_other_side(tmp_path: Path):
    for preferred in (True, True, False, None):
        add_vote(tmp_path, "base", preferred, {"prompt": "a cat", "seed": 3})
    found = add_vote(tmp_path, "runs/other", True, {"prompt": "a dog", "seed": 4})
    assert found == tallies(tmp_path) == [Tally("base", 2, 1, 1), Tally("runs/other", 1, 0, 0)]
    kept = json.loads((tmp_path / VOTES).read_text())
    assert kept["figures"][0]["share"] == pytest.approx(2 / 3)
    assert [v["prompt"] for v in kept["votes"]] == ["a cat"] * 4 + ["a dog"]


def test_votes_do_not_change_what_is_verified(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("")
    before = dict(files_of_run(tmp_path))
    add_vote(tmp_path, "base", True, {})
    assert dict(files_of_run(tmp_path)) == before


@pytest.mark.parametrize("text", ["", "[]", '{"votes": [{"against": 1, "preferred": true}]}', '{"votes": [{}]}'])
def test_votes_that_cannot_be_read_are_left_as_they_are(tmp_path: Path, text):
    (tmp_path / VOTES).write_text(text)
    with pytest.raises(UserError, match="cannot be read; move it away"):
        add_vote(tmp_path, "base", True, {})
    assert (tmp_path / VOTES).read_text() == text
