"""`difftune verify` on a pilot: whole where nothing was touched, wherever it lies, and each tampering is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from difftuning_control.cli import main
from difftuning_control.errors import UserError
from difftuning_control.recipe.inputs import BankConfig, DataConfig, ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.requests import VerifyRequest
from difftuning_control.recipe.studies import PilotConfig
from difftuning_control.recipe.training import TrainingConfig, TuningConfig
from difftuning_control.runs.audit import FILE, read_audit
from difftuning_control.runs.finished import check_outputs, finished_run
from difftuning_control.runs.pilot_files import settle
from difftuning_control.runs.verify import verify
from difftuning_control.verbs.pilot.pilot import pilot
from support.damages import flip
from support.feature_models import save_tiny_dinov2
from support.pictures import write_pictures
from support.refusals import assert_refused

RUNS = [f"{side}/lr-0.01/seed-{seed}" for side in ("plain", "difftuning_measured") for seed in (0, 1)]
INPUTS = ["base", "data", "validation", "bank", "schedule"]


def again(root: Path) -> dict[str, Any]:
    """The pilot in `root`, which is the current folder; whole models, of which it keeps those of the first seed."""
    recipe = Recipe(
        "full",
        ModelConfig("base"),
        DataConfig("data", holdout=0.0, validation_path="held", cache="cache"),
        tuning=TuningConfig(retention_ratio=0.4),
        bank=BankConfig(size=6, steps=1, batch_size=6),
        training=TrainingConfig(
            max_steps=4,
            batch_size=5,
            validate_every=0,
            validation_size=4,
            sample_every=0,
            learning_rate=1e-2,
            lr_scheduler="constant",
            ema_decay=0.9,
        ),
        output="pilot",
    )
    config = PilotConfig(
        ["plain", "difftuning_measured"],
        seeds=[0, 1],
        learning_rates=[1e-2],
        lengths=[2, 4],
        pictures=6,
        steps=1,
        features="features",
    )
    return pilot(recipe, config, "en", False, tell=lambda text: None)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("verify-pilot")
    shutil.copytree(model_dir, root / "base")
    write_pictures(root / "data", count=8)
    write_pictures(root / "held", count=12, seed=7)
    save_tiny_dinov2(root / "features")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        again(root)
    return root


@pytest.fixture
def root(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be tampered with; it is the current folder."""
    copy = Path(shutil.copytree(kept, tmp_path / "copy"))
    monkeypatch.chdir(copy)
    return copy


def found(folder: str = "pilot", **changes: Any) -> dict[str, list[tuple[str, str]]]:
    """What and item of the findings of each part that has any."""
    parts = verify(VerifyRequest(folder, **changes))["parts"]
    return {p["part"]: [(f["what"], f["item"]) for f in p["findings"]] for p in parts if p["findings"]}


def test_an_untouched_pilot_verifies_and_so_does_each_of_its_runs(root, capsys):
    main(["verify", "pilot", "--json", "--strict"])
    result = json.loads(capsys.readouterr().out)
    assert (result["status"], result["unchecked"]) == ("same", [])
    names = [p["part"] for p in result["parts"]]
    assert names[:3] == ["record", "audit", "outputs"]
    assert sorted(names[3:]) == sorted([*INPUTS, *RUNS])  # inputs that all runs have in common, once
    assert all(p["checked"] for p in result["parts"])
    assert result["head"] == read_audit(root / "pilot").head
    for name in RUNS:
        main(["verify", f"pilot/{name}", "--strict"])
        assert [e["outcome"] for e in read_audit(root / "pilot" / name).entries] == ["begun", "done"] * 2


def test_a_pilot_that_was_moved_verifies(root):
    shutil.move("pilot", "elsewhere")
    assert found("elsewhere") == {}
    flip(root / "elsewhere" / "bank" / "bank-00000.safetensors")
    assert found("elsewhere") == {"bank": [("changed", "bank-00000.safetensors")]}


@pytest.mark.sample("pilot/pilot.json-record-pilot.json")
@pytest.mark.parametrize(
    ("name", "part", "item"),
    [
        ("pilot/pilot.json", "record", "pilot.json"),
        ("pilot/report.html", "record", "report.html"),
        ("pilot/analysis.json", "outputs", "analysis.json"),
        ("pilot/base/seed-0/0.png", "outputs", "base/seed-0/0.png"),
        (f"pilot/{RUNS[1]}/figures.json", RUNS[1], "figures.json"),
        (f"pilot/{RUNS[3]}/pictures-2/0.png", RUNS[3], "pictures-2/0.png"),
        (
            f"pilot/{RUNS[0]}/pipeline/unet/diffusion_pytorch_model.safetensors",
            RUNS[0],
            "pipeline/unet/diffusion_pytorch_model.safetensors",
        ),
        (f"pilot/{RUNS[2]}/run.json", RUNS[2], "run.json"),
        ("pilot/bank/bank-00000.safetensors", "bank", "bank-00000.safetensors"),
        ("base/vae/diffusion_pytorch_model.safetensors", "base", "vae/diffusion_pytorch_model.safetensors"),
        ("held/3.png", "validation", "3.png"),
    ],
)
def test_a_flipped_byte_is_found_and_so_is_a_missing_file(root, name, part, item):
    path = root / name
    content = path.read_bytes()
    if path.suffix == ".json":
        path.write_bytes(content.replace(b"0.", b"1.", 1))
    else:
        flip(path, len(content) // 2)
    assert found() == {part: [("changed", item)]}
    path.unlink()
    assert ("missing", item) in found()[part]


def test_an_added_file_an_added_run_and_one_that_is_gone_are_found(root):
    (root / "pilot" / "more.txt").write_text("x")
    shutil.copytree(root / "pilot" / RUNS[0], root / "pilot" / "plain" / "lr-0.02" / "seed-0")
    shutil.rmtree(root / "pilot" / RUNS[3])
    assert found() == {
        "outputs": [("added", "more.txt"), ("added", "plain/lr-0.02/seed-0")],
        RUNS[3]: [("missing", "run.json")],
    }


@pytest.mark.parametrize("place", [".", RUNS[1]])
def test_an_edited_audit_line_is_found(root, place):
    path = root / "pilot" / place / FILE
    path.write_bytes(path.read_bytes().replace(b'"begun"', b'"gone!"', 1))
    assert list(found()) == ["audit" if place == "." else place]


def test_the_same_command_again_leaves_a_pilot_that_verifies(root, monkeypatch):
    records = {name: (root / "pilot" / name / "run.json").read_bytes() for name in RUNS}
    monkeypatch.setattr("difftuning_control.verbs.pilot.side_runs.train", lambda *a, **k: pytest.fail("trained again"))
    again(root)
    assert {name: (root / "pilot" / name / "run.json").read_bytes() for name in RUNS} == records
    assert found() == {}


def test_a_run_that_was_killed_before_its_record_was_whole_is_settled_later(root):
    run = root / "pilot" / RUNS[0]
    lines = (run / FILE).read_bytes().splitlines(keepends=True)
    (run / FILE).write_bytes(b"".join(lines[:-1]))
    assert found()[RUNS[0]] != []
    settle(run)
    assert found() == {}
    before = (run / FILE).read_bytes()
    settle(run)
    assert (run / FILE).read_bytes() == before


def test_settling_vouches_for_nothing_but_what_the_pilot_adds(root):
    run = root / "pilot" / RUNS[0]
    (run / "README.md").write_text("another")
    (run / "pictures-4" / "9.png").write_bytes(b"new")
    settle(run)
    assert found(f"pilot/{RUNS[0]}") == {"outputs": [("changed", "README.md")]}


def test_weights_that_a_pilot_did_not_keep_are_not_missed_but_not_exported_either(root):
    run = root / "pilot" / RUNS[1]
    record = finished_run(run)
    assert set(record.discarded) == set(record.outputs)
    assert not (run / "pipeline").exists()
    with pytest.raises(UserError, match="keeps whole models of its first seed only"):
        check_outputs(record, run)


def test_an_unfinished_pilot_is_refused(root, capsys):
    (root / "pilot" / "pilot.json").unlink()
    (root / "pilot" / FILE).unlink()
    assert_refused(["verify", "pilot"], capsys, root, "the pilot pilot is not finished; give the same command again")


def test_a_pilot_of_an_earlier_version_says_so(root):
    path = root / "pilot" / "pilot.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in result.items() if k not in ("files", "records")}))
    (root / "pilot" / FILE).unlink()
    assert verify(VerifyRequest("pilot"))["unchecked"] == ["record", "outputs"]
