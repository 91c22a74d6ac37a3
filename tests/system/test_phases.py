"""The phases of a command: named with their seconds where that is wanted, silent where not, and added up."""

import pytest

from difftuning_control.system.terminal import duration, phase, phase_seconds, phases, progress


def test_phases_are_named_and_added_up(capsys):
    with phases() as seconds:
        with phase("loading", detail="a/model"):
            assert capsys.readouterr().out == "loading a/model … "  # before it is over
        with progress(7, "encoding") as advance:
            advance(7)
        with phase("loading", detail="another"):
            pass
        assert phase_seconds() == seconds
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["0.0 s", "encoding … 7 in 0.0 s", "loading another … 0.0 s"]
    assert list(seconds) == ["loading", "encoding"]


def test_nothing_is_said_unless_it_is_wanted(capsys):
    with phase("loading"), progress(3, "encoding"):
        pass
    with phases(show=False) as seconds, phase("loading"):
        pass
    assert capsys.readouterr().out == ""
    assert list(seconds) == ["loading"]


def test_what_encloses_decides_for_what_is_inside(capsys):
    with phases(), phases(show=False), phase("loading"):
        pass
    assert "loading" in capsys.readouterr().out


def test_a_phase_that_fails_ends_its_line(capsys):
    with phases(), pytest.raises(ValueError, match="x"), phase("loading\x1b[31m"):
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
