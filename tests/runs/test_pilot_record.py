"""The records of a pilot: their form on disk, and those of earlier and of newer versions."""

from __future__ import annotations

import json

import pytest

from difftuning_control.runs.pilot_record import PilotCost, PilotRecord, PilotSettings, read_pilot, read_settings
from difftuning_control.system.durable import write_json
from support import report_samples as samples


def test_a_pilots_record_is_read_and_written_as_it_was():
    values = samples.pilot()
    assert json.dumps(PilotRecord.from_dict(values).to_dict()) == json.dumps(values)


def test_a_new_record_has_every_key_in_the_order_of_a_report_and_its_hashes_last():
    record = PilotRecord(status="complete", cost=PilotCost(seconds=1.0, training_seconds=0.5, runs=2, device="cpu"))
    keys = "status command created model data settings primary cost versions recipe base sides analysis pictures budget"
    assert " ".join(record.to_dict()) == keys
    assert list(record.to_dict()["cost"]) == ["seconds", "training_seconds", "runs", "device"]
    record.files, record.records = {}, {}
    assert " ".join(record.to_dict()) == f"{keys} files records"


def test_an_earlier_record_has_no_hashes_and_a_newer_one_keeps_what_is_new(tmp_path):
    values = {"recipe": {"output": "there"}, "status": "complete", "tomorrow": 1}
    write_json(tmp_path / "pilot.json", values)
    record = read_pilot(tmp_path)
    assert record is not None
    assert (record.output, record.files, record.records) == ("there", None, None)
    assert record.to_dict() == values


@pytest.mark.parametrize("values", [1, {}, {"recipe": None}, {"recipe": {}}, {"recipe": {"output": "a"}, "sides": 3}])
def test_what_is_no_pilots_record_is_not_read(tmp_path, values):
    write_json(tmp_path / "pilot.json", values)
    assert read_pilot(tmp_path) is None


def test_settings_grow_as_a_pilot_goes_on(tmp_path):
    assert read_settings(tmp_path) == PilotSettings()
    settings = PilotSettings(identity="abc")
    settings.write(tmp_path)
    assert json.loads((tmp_path / "pilot-settings.json").read_text()) == {"identity": "abc"}
    settings = read_settings(tmp_path)
    settings.inputs = ["1", "2"]
    settings.seconds += 2.5
    settings.write(tmp_path)
    kept = {"identity": "abc", "inputs": ["1", "2"], "seconds": 2.5}
    assert json.loads((tmp_path / "pilot-settings.json").read_text()) == kept
