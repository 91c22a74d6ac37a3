"""The record of a run: its form on disk, records of earlier and of newer versions, and who knows its keys."""

from __future__ import annotations

import ast
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from difftuning_control.errors import UserError
from difftuning_control.evaluation.band_losses import BandLosses, LossChange
from difftuning_control.evaluation.fidelity_record import Convergence, FidelityRecord
from difftuning_control.recipe.inputs import DataConfig
from difftuning_control.recipe.measured_schedule import MeasuredSchedule
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.gate_results import GateResult, GateResults
from difftuning_control.runs.kept import record_at
from difftuning_control.runs.places import located
from difftuning_control.runs.record import RunRecord, read_run, record_from
from difftuning_control.runs.record_sections import BankRecord, Change, DataRecord, Timings
from difftuning_control.system.durable import write_json
from difftuning_control.system.sections import Section

PACKAGE = Path(__file__).parents[2] / "difftuning_control"
BEGUN = [
    "status",
    "identity",
    "recipe",
    "places",
    "family",
    "base_path",
    "fingerprints",
    "dtype",
    "loads_lora",
    "data",
    "bank",
    "classes",
    "control",
    "prompts",
    "versions",
    "device",
    "processes",
    "rows_per_step",
    "seed",
    "schedule",
]
EARLY = {  # of the first version, with all that it wrote
    "status": "complete",
    "identity": "abc",
    "recipe": {"method": "lora", "model": {"id": "embedded"}, "adapter": {"kind": "lora"}},
    "family": "sd",
    "base_path": "/somewhere",
    "fingerprints": {"base": {"denoiser": "1"}, "data": "2"},
    "data": {"pictures": 8, "skipped": {}, "resolution": 64},
    "bank": {"items": 8, "folder": "bank"},
    "seed": 3,
    "losses": {},
    "steps": 6,
    "outputs": {"pytorch_lora_weights.safetensors": "0"},
}


def begun(**values: Any) -> RunRecord:
    recipe = Recipe(data=DataConfig("embedded/icons"))
    return RunRecord(status="running", identity="abc", recipe_values=recipe.to_dict(), **values)


def test_a_run_that_has_begun_says_all_that_is_known_even_where_there_is_none():
    values = begun().to_dict()
    assert list(values) == BEGUN
    assert [values[key] for key in ("bank", "classes", "control", "schedule")] == [None] * 4


def test_a_complete_run_ends_with_its_result_in_the_order_in_which_it_came():
    record = begun(inputs="1", sources={})
    record.status, record.timings, record.outputs = "complete", Timings(preparation=1.0, training=2.0), {"file": "2"}
    assert list(record.to_dict()) == [
        *BEGUN,
        "sources",
        "inputs",
        "losses",
        "steps_per_second",
        "steps",
        "timings",
        "outputs",
    ]
    record.files, record.gates = {}, GateResults(passed=True)
    assert list(record.to_dict())[-2:] == ["files", "gates"]


def test_a_failed_run_says_why_and_nothing_of_a_result():
    assert list(replace(begun(), status="failed", error="NaN").to_dict()) == [*BEGUN, "error"]


def test_a_record_is_read_and_written_byte_for_byte(tmp_path):
    record = begun(changes=[Change(step=2, keys={"training.max_steps": [4, 6]})], data=DataRecord(notes=[]))
    record.write(tmp_path)
    first = (tmp_path / "run.json").read_bytes()
    found = read_run(str(tmp_path))
    assert found == record
    assert found is not None
    found.write(tmp_path)
    assert (tmp_path / "run.json").read_bytes() == first


def test_an_early_record_has_what_it_lacks_by_default_and_gains_nothing_when_written_again():
    record = RunRecord.from_dict(EARLY)
    assert (record.changes, record.places, record.sources, record.files) == ([], {}, None, None)
    assert (record.data.local, record.data.held_out, record.bank) == ([], None, BankRecord(items=8, folder="bank"))
    assert (record.dtype_name, record.may_have_dtype("torch.bfloat16")) == ("float32", True)
    assert record.stock_loads_lora
    assert not record.has_hashes
    assert json.dumps(record.to_dict()) == json.dumps(EARLY)
    assert list(replace(record, files={}, discarded=[]).to_dict()) == [*EARLY, "files", "discarded"]


def test_what_a_newer_version_added_is_kept_in_its_place():
    newer = {"made_by": "tomorrow", **copy.deepcopy(EARLY), "colour": {"a": 1}}
    newer["bank"]["kind"] = newer["data"]["weather"] = "new"
    record = RunRecord.from_dict(newer)
    record.steps = 7
    assert record.bank is not None
    record.bank.items = 9
    assert json.dumps(record.to_dict()) == json.dumps(
        newer | {"steps": 7, "bank": {"items": 9, "folder": "bank", "kind": "new"}}
    )


FIGURES = {  # in the form of the files that they are also written to
    "schedule": {
        "kind": "measured",
        "u": [0.25, 0.75],
        "psi": [0.5, 1.0],
        "xi": [1.0, 0.5],
        "gap": {"mean": [0.1, 0.2], "low": [0.0, 0.1], "high": [0.2, 0.3]},
        "losses": {"target": [2.0, 1.0], "bank": [1.0, 0.5]},
        "advice": ["rising"],
        "rows": 8,
    },
    "losses": {
        "target": {"base": {"u": [0.25, 0.75], "loss": [2.0, 1.0]}, "tuned": {"u": [0.25, 0.75], "loss": [1.0, 0.5]}},
        "bank": {"base": {"u": [0.25, 0.75], "loss": [1.0, 0.5]}, "tuned": {"u": [0.25, 0.75], "loss": [1.5, 0.5]}},
    },
    "fidelity": {
        "kind": "edges",
        "main": "f1",
        "higher_is_better": True,
        "without": {"f1": 0.25, "ssim": 0.5},
        "steps": [0, 2, 4],
        "figures": {"f1": [0.25, 0.5, 0.75], "ssim": [0.5, 0.5, 0.5]},
        "convergence": {"start": 0.0, "end": 2.0, "step": 1.0, "before": 0.25, "after": 0.75, "sudden": True},
    },
    "gates": {
        "passed": False,
        "figures": {"kid": {"value": None, "limit": 0.1, "at": "most", "passed": False, "clear": None}},
        "asked": {"kid": 0.1},
    },
}


def test_figures_are_read_as_what_they_are_and_written_byte_for_byte():
    values = EARLY | FIGURES
    record = RunRecord.from_dict(copy.deepcopy(values))
    assert record.schedule == MeasuredSchedule(**FIGURES["schedule"])
    bands = [BandLosses(centres=[0.25, 0.75], losses=losses) for losses in ([1.0, 0.5], [1.5, 0.5])]
    assert record.losses["bank"] == LossChange(base=bands[0], tuned=bands[1])
    assert (record.losses["bank"].rises, record.losses["bank"].tuned.mean) == ([0.5, 0.0], 1.0)
    assert record.fidelity == FidelityRecord(
        **FIGURES["fidelity"] | {"convergence": Convergence(**FIGURES["fidelity"]["convergence"])}
    )
    assert (record.fidelity.values, record.fidelity.row(1)) == ([0.25, 0.5, 0.75], {"f1": 0.5, "ssim": 0.5})
    assert record.gates == GateResults(figures={"kid": GateResult(limit=0.1)}, asked={"kid": 0.1})
    assert record.gates.failed == "kid is unknown, at most 0.1 asked"
    assert json.dumps(record.to_dict()) == json.dumps(values)


def test_new_figures_have_the_form_of_those_that_were_read():
    read = RunRecord.from_dict(copy.deepcopy(EARLY | FIGURES))
    for name, form in FIGURES.items():
        made = copy.deepcopy(getattr(read, name))
        for section in _sections(made):
            section.original = None
        written = RunRecord(losses=made).to_dict()[name] if name == "losses" else made.to_dict()
        assert json.dumps(written) == json.dumps(form), name


def _sections(value: Any) -> list[Section]:
    if isinstance(value, dict):
        return [section for part in value.values() for section in _sections(part)]
    if not isinstance(value, Section):
        return []
    return [value, *(section for part in vars(value).values() for section in _sections(part))]


def test_what_earlier_figures_lack_has_its_default_and_stays_away():
    gates = {"passed": True, "figures": {"kid": {"value": 0.1, "limit": 0.1, "at": "most", "passed": True}}}
    table = {"kind": "measured", "u": [0, 1], "psi": [0, 1], "xi": [1, 0]}
    values = EARLY | {"schedule": table, "gates": gates, "losses": {"bank": {}}}
    record = RunRecord.from_dict(copy.deepcopy(values))
    assert record.gates is not None
    assert (record.gates.figures["kid"].clear, record.gates.asked) == (None, {})
    assert record.losses == {"bank": LossChange()}
    assert json.dumps(record.to_dict()) == json.dumps(values)


def test_a_curve_until_a_step_keeps_what_a_newer_version_added():
    curve = FidelityRecord.from_dict({**FIGURES["fidelity"], "colour": "blue"}).until(2)
    assert (curve.steps, curve.values, curve.convergence) == ([0, 2], [0.25, 0.5], None)
    assert list(curve.to_dict()) == [*FIGURES["fidelity"], "colour"]


def test_places_of_today_leave_the_record_as_it_was(tmp_path):
    record = begun(places={"run": str(tmp_path), "bank": "/a", "tomorrow": "/b"}, bank=BankRecord(folder="/a"))
    record.recipe_values["bank"]["path"] = "a"
    before = json.dumps(record.to_dict())
    today = located(record, tmp_path / "elsewhere")
    assert today.bank is not None
    assert today.bank.folder == today.recipe.bank.path == "/a"
    assert json.dumps(record.to_dict()) == before


def test_a_kept_step_has_no_figures_of_the_final_weights(tmp_path):
    write_json(tmp_path / "step-000003" / "losses.json", {"bank": {}})
    record = RunRecord.from_dict(EARLY | {"gates": {"passed": True}, "timings": {"training": 1.0}})
    found = record_at(record, tmp_path, 3)
    assert (found.steps, found.losses, found.gates, found.timings) == (3, {"bank": LossChange()}, None, None)
    assert found.identity != record.identity
    assert not {"gates", "timings"} & found.to_dict().keys()


@pytest.mark.parametrize(
    "values", [1, [], {}, {"recipe": 1}, {"status": 3}, {"status": "complete", "recipe": []}, EARLY | {"data": None}]
)
def test_what_is_of_no_run_is_not_read(tmp_path, values):
    with pytest.raises((TypeError, ValueError)):
        record_from(values)
    write_json(tmp_path / "run.json", values)
    assert read_run(tmp_path) is None


def test_a_recipe_of_another_version_is_refused_in_a_sentence():
    values = Recipe().to_dict()
    values["data"]["tomorrow"] = 1
    for recipe in ({}, values):
        with pytest.raises(UserError, match=r"it is of a newer version of this package, or was edited\.$"):
            _ = RunRecord(recipe_values=recipe).recipe


# --- who knows the keys ---------------------------------------------------------------------------------------------

RECORDS = ("record", "run", "before", "today", "theirs", "budget")  # names that records go by


FIGURE_KEYS = (  # that figures alone have
    "tuned",
    "convergence",
    "higher_is_better",
    "sudden",
    "passed",
    "asked",
    "psi",
    "xi",
    "forwards",
    "target_cost",
)


def record_keys(source: str) -> list[int]:
    """Lines on which a record or a figure of it is read by a string key, or a dictionary is made into a record."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        read, key = None, None
        if isinstance(node, ast.Subscript):
            read, key = node.value, node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            read, key = (node.func.value if node.func.attr == "get" else None), node.args[0]
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            read, key = node.left, ast.Constant("")
        name = read.attr if isinstance(read, ast.Attribute) else getattr(read, "id", None)
        if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
            continue
        if name in RECORDS or (read is not None and key.value in FIGURE_KEYS):
            lines.append(node.lineno)
    return lines


def test_no_file_of_the_package_reads_a_record_by_a_string_key():
    found = {str(p.relative_to(PACKAGE)): record_keys(p.read_text()) for p in PACKAGE.rglob("*.py")}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_only_one_file_of_the_package_names_the_records_file_in_code():
    named = [
        str(p.relative_to(PACKAGE))
        for p in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(p.read_text()))
        if isinstance(node, ast.Constant) and node.value == "run.json"
    ]
    assert sorted(named) == ["evaluation/report/control.py", "runs/record.py"]  # a report links to it


@pytest.mark.parametrize(
    "source",
    [
        'record["x"]',
        'record.get("x")',
        'self.record["x"]',
        'run["x"]["y"]',
        'record | {"x": 1}',
        'losses["bank"]["tuned"]',
        'curve.get("convergence")',
        'phases["bank"]["forwards"]',
    ],
)
def test_a_key_is_found(source):
    assert record_keys(source) == [1]
