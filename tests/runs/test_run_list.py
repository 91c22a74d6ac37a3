"""`difftune runs`: every run below a folder, in whatever state, and nothing in its names that a program obeys."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from difftuning_control.cli import main
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.listing import COLUMNS, as_csv, list_runs
from difftuning_control.system.durable import write_json
from difftuning_control.verbs.train import train
from support.refusals import assert_refused
from support.trainings import trained_once


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, pictures: Path) -> dict[str, Any]:
    """The record of a short run."""
    root = tmp_path_factory.mktemp("list")

    def make(name: str, **changes: Any) -> Recipe:
        recipe = Recipe(output=str(root / name))
        recipe.model.id = str(model_dir)
        recipe.data = replace(recipe.data, path=str(pictures), cache=str(root / "cache"), holdout=0.25)
        recipe.bank = replace(recipe.bank, size=6, steps=1)
        recipe.training = replace(recipe.training, max_steps=2, batch_size=5, validation_size=2, sample_every=0)
        return recipe

    recipe = trained_once(make)({})
    return json.loads((Path(recipe.output) / "run.json").read_text())


@pytest.fixture
def runs(tmp_path: Path, record: dict[str, Any]) -> Path:
    """Runs in every state, some of them in folders of their own, and other folders between them."""
    root = tmp_path / "runs"
    gates = {"passed": False, "figures": {"kid": {"value": 0.25, "limit": 0.1, "at": "most", "passed": False}}}
    begun = {k: v for k, v in record.items() if k not in ("losses", "steps")} | {"status": "running"}
    write_json(root / "done" / "run.json", record)
    write_json(root / "pilot" / "plain" / "seed-1" / "run.json", record | {"gates": gates})
    write_json(root / "cut" / "run.json", begun)
    (root / "cut" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3')
    write_json(root / "diverged" / "run.json", begun | {"status": "failed"})
    write_json(root / "alive" / "run.json", begun)
    (root / "empty").mkdir()
    (root / "torn").mkdir()
    (root / "torn" / "run.json").write_text("{")
    write_json(root / "alien" / "run.json", {"recipe": 1})
    write_json(root / ".hidden" / "run.json", record)
    return root


def test_every_run_has_its_state_and_figures(runs, record):
    with FileLock(runs / "alive" / ".lock"):
        rows = {row["run"]: row for row in list_runs(runs)}
    assert {name: row["state"] for name, row in rows.items()} == {
        "done": "done",
        "pilot/plain/seed-1": "done",
        "cut": "interrupted",
        "diverged": "failed",
        "alive": "running",
        "torn": "unreadable",
        "alien": "unreadable",
    }
    done, cut, judged = rows["done"], rows["cut"], rows["pilot/plain/seed-1"]
    losses = record["losses"]["target"]["tuned"]["loss"]
    assert done["target_loss"] == pytest.approx(sum(losses) / len(losses))
    assert isinstance(done["retention_loss"], float)
    assert (done["model"], done["method"], done["steps"]) == (record["recipe"]["model"]["id"], "lora", 2)
    assert (done["gates"], judged["gates"], judged["kid"]) == (None, "failed", 0.25)
    assert (cut["steps"], cut["target_loss"]) == (2, None)


def test_a_lock_that_nobody_holds_is_no_life(runs):
    (runs / "cut" / ".lock").touch()
    assert {r["run"]: r["state"] for r in list_runs(runs)}["cut"] == "interrupted"


def test_a_lock_of_a_colleague_is_asked_whether_it_is_held(runs, monkeypatch):
    lock = runs / "cut" / ".lock"
    lock.touch()

    locks = pytest.importorskip("fcntl")  # not on Windows

    def forbidden(*args, **options):
        raise PermissionError("not yours")

    def state() -> str:
        return {r["run"]: r["state"] for r in list_runs(runs)}["cut"]

    monkeypatch.setattr("filelock.FileLock.acquire", forbidden)
    assert state() == "interrupted"
    with lock.open("rb") as held:
        locks.flock(held, locks.LOCK_EX)
        assert state() == "running"


def test_a_run_itself_is_a_list_of_one(runs):
    (row,) = list_runs(runs / "done")
    assert row["run"] == "done"


@pytest.mark.wide
def test_a_run_that_trains_is_running_and_then_done(recipe, monkeypatch):
    from difftuning_control.training import loop

    seen: list[str] = []
    advance = loop.TrainingLoop.advance
    monkeypatch.setattr(
        loop.TrainingLoop,
        "advance",
        lambda self, n, more: (seen.append(list_runs(recipe.output)[0]["state"]), advance(self, n, more))[1],
    )
    train(replace(recipe, training=replace(recipe.training, max_steps=1)))
    assert seen == ["running"]
    assert list_runs(recipe.output)[0]["state"] == "done"


def test_table_json_and_csv_show_the_same_runs(runs, capsys):
    main(["runs", str(runs)])
    shown = capsys.readouterr().out
    main(["runs", str(runs), "--json"])
    rows = json.loads(capsys.readouterr().out)
    main(["runs", str(runs), "--csv"])
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == len(table) == 7
    assert tuple(table[0]) == tuple(rows[0]) == COLUMNS
    for row, cells in zip(rows, table):
        assert cells == {k: "" if v is None else str(v) for k, v in row.items()}
        assert row["run"] in shown
    assert "interrupted" in shown
    assert "25" in shown


EVIL = ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "＝1", "\t=1", "[red]x[/red]", "\x1b[31mred", "a\u202eb", '"=1"']


def test_names_that_a_spreadsheet_or_a_terminal_obeys_are_harmless(tmp_path, record, capsys):
    for i, name in enumerate(EVIL):
        folder = tmp_path / (name.replace("/", "÷") or str(i))
        changed = {**record, "recipe": {**record["recipe"], "model": {"id": name}}}
        write_json(folder / "run.json", changed)
    rows = list_runs(tmp_path)
    assert len(rows) == len(EVIL)
    for cells in csv.reader(io.StringIO(as_csv(rows))):
        assert not any(c.startswith(("=", "+", "-", "@", "＝", "\t")) and not _is_number(c) for c in cells)
        assert not any(ord(c) < 32 or c in "\x7f\u202e" for c in "".join(cells))
    for words in ([], ["--json"], ["--csv"]):
        main(["runs", str(tmp_path), *words])
        shown = capsys.readouterr().out
        assert "\x1b" not in shown
        assert "\u202e" not in shown
    main(["runs", str(tmp_path)])
    assert "[red]x[" in capsys.readouterr().out


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text not in ("+1", "-1")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "nowhere is no folder; give one with runs in it."),
        ([".", "--json", "--csv"], "give --json or --csv, not both."),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_sentence(tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    assert_refused(["runs", *words], capsys, tmp_path, expected)
