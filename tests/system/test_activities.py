"""The activities of a command: named with their seconds where that is wanted, silent where not."""

import re

import pytest

from difftuning_control.system.terminal import activity, duration, progress, showing_activities


def test_activities_are_named_with_their_seconds(capsys):
    with showing_activities():
        with activity("loading", detail="a/model"):
            assert capsys.readouterr().out == "loading a/model … "  # before it is over
        with progress(7, "encoding") as advance:
            advance(7)
        with activity("loading", detail="another"):
            pass
    lines = re.sub(r"\d\.\d s", "0.0 s", capsys.readouterr().out).splitlines()
    assert lines == ["0.0 s", "encoding … 7 in 0.0 s", "loading another … 0.0 s"]


def test_nothing_is_said_unless_it_is_wanted(capsys):
    with activity("loading"), progress(3, "encoding"):
        pass
    with showing_activities(False), activity("loading"):
        pass
    assert capsys.readouterr().out == ""


def test_what_encloses_decides_for_what_is_inside(capsys):
    with showing_activities(), showing_activities(False), activity("loading"):
        pass
    assert "loading" in capsys.readouterr().out


def test_an_activity_that_fails_ends_its_line(capsys):
    with showing_activities(), pytest.raises(ValueError, match="x"), activity("loading\x1b[31m"):
        raise ValueError("x")
    said = capsys.readouterr().out
    assert said.endswith(" … \n")
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (3.21, "3.2 s"), (9.96, "10 s"), (59.4, "59 s"), (200, "3 min 20 s"), (3900, "1 h 5 min")],
)
def test_seconds_are_said_as_people_do(seconds, said):
    assert duration(seconds) == said
