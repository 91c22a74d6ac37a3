"""Faults 9, 10 and 12 of issue 15: runs work from any folder, go on with another length, and begin from one another."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from difftuning_control import load_adapter, unload_adapter
from difftuning_control.cli import main
from difftuning_control.errors import UserError
from difftuning_control.families.loading import load_family
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.inputs import BankConfig, ControlConfig, DataConfig, FidelityConfig
from difftuning_control.recipe.requests import VerifyRequest
from difftuning_control.recipe.training import ScheduleConfig, TuningConfig
from difftuning_control.runs.audit import read_audit
from difftuning_control.runs.verify import verify
from difftuning_control.verbs.parse import parse
from difftuning_control.verbs.train import train
from support.command_line import flags, settings
from support.damages import flip
from support.marks import needs
from support.pictures import write_pictures
from support.refusals import assert_refused
from support.tiny_sd import tiny_pipeline
from support.trainings import interrupted_after

WEIGHTS = "pytorch_lora_weights.safetensors"


def record(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def lines(run: Path, key: str) -> dict[int, float]:
    """What a run logged under a key, by step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def longer(recipe, steps: int, **training):
    return replace(recipe, training=replace(recipe.training, max_steps=steps, resume=True, **training))


def same(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


# --- 9: from any folder ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A run whose recipe names everything by relative paths, made in the folder above it."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(model_dir, root / "base")
    write_pictures(root / "data", count=24)
    values = settings(Path("base"), Path("data"), Path(), **{"bank.path": "bank", "training.save_at": "[1]"})
    values |= {"bank.size": 10, "data.holdout": 0.4, "output": "runs/one"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        main(["train", *flags(values)])
    return root


def test_a_kept_step_verifies_as_a_part_of_its_run(copy, capsys):
    main(["verify", str(copy / "runs" / "one" / "step-000001")])
    assert "changed" not in capsys.readouterr().out
    flip(next((copy / "runs" / "one" / "step-000001").glob("*.safetensors")))
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(copy / "runs" / "one" / "step-000001")])
    assert stopped.value.code == 1


@pytest.fixture
def copy(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project moved as a whole, seen from a folder that has nothing to do with it."""
    root = tmp_path / "project"
    shutil.copytree(project, root)
    (tmp_path / "far").mkdir()
    monkeypatch.chdir(tmp_path / "far")
    return root


@pytest.mark.wide
def test_fault_15_09_a_run_is_read_from_any_folder(project, tmp_path, monkeypatch, capsys):
    (tmp_path / "far").mkdir()
    monkeypatch.chdir(tmp_path / "far")
    run = str(project / "runs" / "one")
    main(["verify", run, "--strict"])
    main(["sample", "--run", run, "--prompts", '["red 1"]', "--steps", "1", "--output", "pictures"])
    main(["export", run, "--to", "exported"])
    evaluated = ["--features", "lite0", "--pictures", "5", "--seeds", "[0]", "--steps", "1", "--output", "judged"]
    main(["evaluate", "--runs", json.dumps([run]), *evaluated])
    main(["analyze", "--run", run, "--analysis.rows", "4", "--analysis.draws", "1", "--output", "analysed"])
    assert "not checked" not in capsys.readouterr().out
    assert {p.name for p in Path().iterdir()} == {"pictures", "exported", "judged", "analysed"}


def test_fault_15_09_the_recipe_stays_as_it_was_written_and_the_record_says_where_things_lie(project):
    run = project / "runs" / "one"
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert (recipe["model"]["id"], recipe["data"]["path"], recipe["bank"]["path"]) == ("base", "data", "bank")
    assert recipe["output"] == "runs/one"
    found = record(run)
    assert found["recipe"] == recipe
    expected = {"run": "runs/one", "model": "base", "data": "data", "bank": "bank", "cache": "cache"}
    assert found["places"] == {name: str(project / place) for name, place in expected.items()}


@needs("diffusers", "0.36")  # before it a LoRA is loaded offline by the name of its file alone
def test_fault_15_09_the_lines_of_the_card_run_from_any_folder(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = (project / "runs" / "one" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0].replace("images[0]", "images[0].size")
    found: dict = {}
    exec(code.replace("pipe(", "pipe(num_inference_steps=1, prompt="), found)
    assert found["image"] == (16, 16)


def test_fault_15_09_a_run_that_was_moved_with_its_inputs_finds_them_beside_it(copy, capsys):
    (copy / "data" / "metadata.jsonl").write_text((copy / "data" / "metadata.jsonl").read_text().replace("red 0", "x"))
    found = verify(VerifyRequest(str(copy / "runs" / "one")))
    assert {p["part"]: [f["item"] for f in p["findings"]] for p in found["parts"] if p["findings"]} == {
        "data": ["0.png"]
    }
    assert found["unchecked"] == []


def test_fault_15_09_a_run_that_was_moved_by_itself_finds_its_inputs_where_they_were(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(project / "runs" / "one", tmp_path / "elsewhere")
    found = verify(VerifyRequest("elsewhere"))
    assert (found["status"], found["unchecked"]) == ("same", [])


@pytest.mark.sample("analyze")
@pytest.mark.parametrize(
    ("role", "folder", "words"),
    [
        ("model", "base", ["sample", "--prompts", '["red 1"]', "--steps", "1", "--output", "out", "--run"]),
        ("model", "base", ["export", "--to", "out"]),
        (
            "data",
            "data",
            ["evaluate", "--pictures", "5", "--seeds", "[0]", "--steps", "1", "--output", "out", "--runs"],
        ),
        ("bank", "bank", ["analyze", "--analysis.rows", "4", "--analysis.draws", "1", "--output", "out", "--run"]),
    ],
    ids=["sample", "export", "evaluate", "analyze"],
)
def test_fault_15_09_an_input_that_was_moved_is_told_with_the_option_for_its_new_place(
    project, tmp_path, monkeypatch, capsys, role, folder, words
):
    root = tmp_path / "project"
    shutil.copytree(project, root)
    changed = json.loads((root / "runs/one/run.json").read_text().replace(str(project), str(root)))
    (root / "runs/one/run.json").write_text(json.dumps(changed))
    monkeypatch.chdir(tmp_path)
    os.rename(root / folder, root / "new")
    run = str(root / "runs" / "one")
    words = [*words, json.dumps([run]) if words[0] == "evaluate" else run]
    assert_refused(words, capsys, tmp_path, f"no longer at {root / folder}", f"--moved.{role}", run)
    main([*words, f"--moved.{role}", str(root / "new")])
    assert Path("out").is_dir()


def test_fault_15_09_verify_says_which_option_names_the_new_place(copy, project, capsys):
    changed = json.loads((copy / "runs/one/run.json").read_text().replace(str(project), str(copy)))
    (copy / "runs/one/run.json").write_text(json.dumps(changed))
    os.rename(copy / "data", copy / "new")
    run = str(copy / "runs" / "one")
    found = {p["part"]: p for p in verify(VerifyRequest(run, skip=["bank"]))["parts"]}
    assert found["data"]["findings"][0]["what"] == "missing"
    assert "--moved.data" in found["data"]["findings"][0]["said"]
    _, moved = parse(["verify", run, "--moved.data", str(copy / "new")])
    assert {p["part"]: p["state"] for p in verify(moved)["parts"]}["data"] == "same"


def test_fault_15_09_a_run_folder_that_is_gone_is_told_with_the_option(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["sample", "--prompts", '["red"]', "--run", "runs/gone"]
    assert_refused(words, capsys, tmp_path, "there is no folder runs/gone", str(tmp_path / "runs/gone"), "--run")


def test_fault_15_09_a_run_is_resumed_from_any_folder_and_its_recipe_stays_portable(copy, project):
    run = copy / "runs" / "one"
    main(["resume", str(run), "--training.max_steps", "3"])
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert (recipe["model"]["id"], recipe["data"]["path"], recipe["training"]["max_steps"]) == ("base", "data", 3)
    assert record(run)["places"]["data"] == str(copy / "data")
    main(["verify", str(run), "--strict"])


@pytest.mark.wide
def test_fault_15_09_resume_names_the_recipes_own_key_for_a_moved_input(copy, project, capsys):
    changed = json.loads((copy / "runs/one/run.json").read_text().replace(str(project), str(copy)))
    (copy / "runs/one/run.json").write_text(json.dumps(changed))
    os.rename(copy / "data", copy / "new")
    run = str(copy / "runs" / "one")
    assert_refused(["resume", run], capsys, copy, f"no longer at {copy / 'data'}", "--data.path PLACE")
    main(["resume", run, "--data.path", str(copy / "new"), "--training.max_steps", "3"])
    assert record(Path(run))["places"]["data"] == str(copy / "new")


@pytest.mark.wide
def test_fault_15_09_a_bank_of_pictures_is_the_same_bank_in_another_place(recipe, tmp_path):
    write_pictures(tmp_path / "old" / "domain", seed=3)
    recipe = replace(recipe, bank=BankConfig(path=str(tmp_path / "old" / "domain")))
    with interrupted_after(3), pytest.raises(KeyboardInterrupt):
        train(recipe)
    os.rename(tmp_path / "old", tmp_path / "new")
    moved = replace(recipe, bank=BankConfig(path=str(tmp_path / "new" / "domain")))
    assert train(longer(moved, 6)).record.status == "complete"
    found = verify(VerifyRequest(recipe.output))
    assert (found["status"], found["unchecked"]) == ("same", [])


# --- 10: what may change on resuming --------------------------------------------------------------------------------


@pytest.mark.wide
def test_fault_15_10_an_interrupted_run_goes_on_at_another_rate_and_says_so(recipe, capsys):
    output, said = Path(recipe.output), []
    recipe = replace(recipe, training=replace(recipe.training, lr_scheduler="constant"))
    with interrupted_after(3), pytest.raises(KeyboardInterrupt):
        train(recipe)
    before = record(output)["identity"]
    run = train(longer(recipe, 6, learning_rate=5e-3), tell=said.append).record
    assert lines(output, "learning_rate") == pytest.approx(
        dict.fromkeys((1, 2), 1e-2) | dict.fromkeys(range(3, 7), 5e-3)
    )
    (change,) = run.changes
    assert change.to_dict() == {
        "step": 2,
        "identity": before,
        "keys": {"training.learning_rate": [1e-2, 5e-3]},
        "optimizer": "kept",
    }
    assert run.identity != before
    assert any("no longer bit-equal" in line for line in said)
    begun = [e["said"] for e in read_audit(output).entries if e["outcome"] == "begun"]
    assert begun[0] is None
    assert (
        begun[1] == "from step 2 on: training.learning_rate 0.01 → 0.005; the run is no longer bit-equal to an "
        "undisturbed one."
    )
    assert "`training.learning_rate` 0.005 (was 0.01)" in (output / "README.md").read_text()
    assert verify(VerifyRequest(recipe.output))["status"] == "same"


@pytest.mark.wide
def test_fault_15_10_a_longer_cosine_is_entered_at_the_step_reached(recipe):
    output = Path(recipe.output)
    with interrupted_after(5), pytest.raises(KeyboardInterrupt):
        train(recipe)
    train(longer(recipe, 12))
    found = lines(output, "learning_rate")
    assert found[4] == pytest.approx(5e-3 * (1 + math.cos(math.pi * 4 / 6)))  # of the six steps that were planned
    assert found[5] == pytest.approx(5e-3 * (1 + math.cos(math.pi * 5 / 12)))  # of the twelve that are
    assert found[12] == pytest.approx(0, abs=1e-9)
    assert len(lines(output, "loss")) == 12


@pytest.mark.wide
def test_fault_15_10_with_a_constant_rate_a_longer_run_is_the_undisturbed_one(recipe, tmp_path):
    recipe = replace(recipe, training=replace(recipe.training, lr_scheduler="constant"))
    with interrupted_after(3), pytest.raises(KeyboardInterrupt):
        train(recipe)
    train(longer(recipe, 8))
    whole = replace(longer(recipe, 8), output=str(tmp_path / "whole"))
    train(replace(whole, training=replace(whole.training, resume=False)))
    assert same(Path(recipe.output) / WEIGHTS, Path(whole.output) / WEIGHTS)


METHODS = {
    "lora": ({}, {}),
    "orthogonal tlora": ({"adapter": AdapterConfig("tlora", rank=4)}, {}),
    "pissa": ({"adapter": AdapterConfig(rank=2, init="pissa")}, {}),
    "dora": ({"adapter": AdapterConfig("dora", rank=2)}, {}),
    "lokr": ({"adapter": AdapterConfig("lokr")}, {}),
    "difffit": ({"adapter": AdapterConfig("difffit")}, {}),
    "full": ({"method": "full"}, {}),
    "averaged, with a budget": (
        {"tuning": TuningConfig(ScheduleConfig(), retention_ratio=0.4, forgetting_budget=0.02)},
        {"ema_decay": 0.9},
    ),
    "controlnet": (
        {"method": "controlnet", "control": ControlConfig(fidelity=FidelityConfig(every=3, size=2, steps=1))},
        {},
    ),
}


@pytest.mark.sample("averaged, with a budget")
@pytest.mark.parametrize("name", METHODS)
def test_fault_15_10_a_finished_run_is_made_longer_from_its_result(recipe, name):
    values, training = METHODS[name]
    recipe = replace(recipe, **values, training=replace(recipe.training, validate_every=3, **training))
    run, said = train(recipe).record, []
    again = train(longer(recipe, 9, learning_rate=1e-12), tell=said.append).record  # at which nothing moves
    assert again.steps == 9
    assert again.changes[0].optimizer == "anew"
    assert "fresh" in said[1]
    assert list(lines(Path(recipe.output), "loss")) == list(range(1, 10))
    # what the first part came to is where the second began
    for role, losses in run.losses.items():
        assert again.losses[role].base.losses == losses.base.losses
        assert again.losses[role].tuned.losses == pytest.approx(losses.tuned.losses, rel=1e-5)
        assert losses.tuned.losses != pytest.approx(losses.base.losses, rel=1e-4)
    validated = lines(Path(recipe.output), "validation/target_0.5")
    assert sorted(validated) == [3, 6, 9]
    assert verify(VerifyRequest(recipe.output))["status"] == "same"
    if name == "controlnet":
        assert again.fidelity.steps == [0, 3, 6, 9]


@pytest.mark.sample("pissa")
@pytest.mark.parametrize("name", METHODS)
def test_fault_15_10_a_new_run_begins_where_another_ended(recipe, tmp_path, name):
    """At a learning rate that moves nothing the new run's weights are the old one's."""
    values, training = METHODS[name]
    recipe = replace(recipe, **values, training=replace(recipe.training, **training))
    first = train(recipe).record
    still = replace(
        recipe.training, begin_from=recipe.output, learning_rate=1e-12, max_steps=1, lr_scheduler="constant"
    )
    second = replace(recipe, training=still, output=str(tmp_path / "second"))
    run = train(second).record
    for role, losses in first.losses.items():
        found = run.losses[role]
        assert found.base.losses == pytest.approx(losses.base.losses, rel=1e-5)
        assert found.tuned.losses == pytest.approx(losses.tuned.losses, rel=1e-4)
    assert first.losses["target"].tuned.losses != pytest.approx(first.losses["target"].base.losses, rel=1e-4)
    assert run.identity != first.identity
    found = verify(VerifyRequest(second.output))
    assert (found["status"], found["unchecked"]) == ("same", [])
    assert "begin" in {p["part"] for p in found["parts"]}


@pytest.mark.wide
def test_fault_15_10_a_controlnets_lora_cannot_be_reopened_and_says_what_to_do(recipe, tmp_path):
    control = ControlConfig(fidelity=FidelityConfig(every=0))
    adapter = AdapterConfig(on="controlnet", rank=2)
    recipe = replace(recipe, method="controlnet", control=control, adapter=adapter)
    train(recipe)
    with pytest.raises(UserError, match=r"merged into its ControlNet.*--from"):
        train(longer(recipe, 9))
    begun = replace(recipe.training, begin_from=recipe.output)
    assert train(replace(recipe, training=begun, output=str(tmp_path / "second"))).record.status == "complete"


@pytest.mark.wide
def test_fault_15_10_a_reopened_run_that_is_killed_goes_on_from_where_it_was(recipe, tmp_path):
    train(recipe)
    shutil.copytree(recipe.output, tmp_path / "cut")
    train(longer(recipe, 12))
    cut = replace(recipe, output=str(tmp_path / "cut"))
    with interrupted_after(1), pytest.raises(KeyboardInterrupt):
        train(longer(cut, 12))
    assert record(Path(cut.output))["status"] == "running"
    train(longer(cut, 12))
    assert same(Path(recipe.output) / WEIGHTS, tmp_path / "cut" / WEIGHTS)
    assert len(record(Path(cut.output))["changes"]) == 1


@pytest.mark.wide
def test_fault_15_10_what_may_not_change_is_named_key_by_key_with_both_values(recipe):
    train(recipe)
    adapter, tuning = AdapterConfig(rank=4), replace(recipe.tuning, retention_weight=0.2)
    other = replace(longer(recipe, 9), adapter=adapter, tuning=tuning)
    with pytest.raises(UserError) as error:
        train(other)
    said = str(error.value)
    assert "tuning.retention_weight was 0.1 and is 0.2" in said
    assert "adapter.rank was None and is 4" in said
    assert "training.max_steps was" not in said
    assert "training.learning_rate" in said  # among what may change


@pytest.mark.wide
def test_fault_15_10_data_that_changed_is_named(recipe, tmp_path):
    folder = write_pictures(tmp_path / "data")
    recipe = replace(recipe, data=replace(recipe.data, path=str(folder)))
    train(recipe)
    (folder / "1.png").write_bytes((folder / "2.png").read_bytes())
    with pytest.raises(UserError, match="the pictures or captions to tune on have changed"):
        train(longer(recipe, 9))


@pytest.mark.sample("3")
@pytest.mark.parametrize("steps", [3, 6])
def test_fault_15_10_a_finished_run_is_not_made_shorter(recipe, steps):
    train(recipe)
    with pytest.raises(UserError, match=f"has done 6 steps, and training.max_steps is {steps}; give more than 6"):
        train(longer(recipe, steps, learning_rate=1e-4))


@pytest.mark.wide
def test_fault_15_10_cadence_changes_leave_the_run_bit_equal(recipe, tmp_path):
    with interrupted_after(3), pytest.raises(KeyboardInterrupt):
        train(recipe)
    run = train(longer(recipe, 6, checkpoint_every=1, validate_every=1, save_at=[5])).record
    assert run.changes == []
    whole = replace(recipe, output=str(tmp_path / "whole"))
    assert train(whole).record.identity == run.identity
    assert same(Path(recipe.output) / WEIGHTS, tmp_path / "whole" / WEIGHTS)


@pytest.mark.sample("comfyui")
@pytest.mark.parametrize("format", ["kohya", "comfyui"])
def test_fault_15_10_a_lora_file_of_other_tools_is_begun_from(recipe, tmp_path, model_dir, format):
    """As they name it, with an alpha of its own: what it does to the model is what the new run begins with."""
    recipe = replace(recipe, adapter=AdapterConfig(rank=2, alpha=3.0))
    train(recipe)
    main(["export", recipe.output, "--to", str(tmp_path / "file"), "--format", format])
    (file,) = (tmp_path / "file").glob("*.safetensors")
    begun = replace(recipe.training, begin_from=str(file), learning_rate=1e-12, max_steps=1)
    train(replace(recipe, training=begun, adapter=AdapterConfig(rank=2, alpha=1.0), output=str(tmp_path / "second")))
    family = load_family(str(model_dir))
    x, words = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 16)
    drawn = []
    for place in (Path(recipe.output), tmp_path / "second"):
        load_adapter(family.pipe, place)
        with torch.no_grad():
            drawn.append(family.denoiser(x, 500, words).sample)
        unload_adapter(family.pipe)
    torch.testing.assert_close(drawn[0], drawn[1], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert (family.denoiser(x, 500, words).sample - drawn[0]).abs().max() > 1e-3


@pytest.mark.wide
def test_fault_15_10_weights_that_do_not_fit_are_refused_with_both_values(recipe, tmp_path):
    train(replace(recipe, adapter=AdapterConfig(rank=2)))
    begun = replace(recipe.training, begin_from=recipe.output)
    wide = replace(recipe, adapter=AdapterConfig(rank=4), training=begun, output=str(tmp_path / "second"))
    with pytest.raises(UserError, match=r"adapter.rank is 2 there and 4 here"):
        train(wide)
    file = replace(begun, begin_from=str(Path(recipe.output) / WEIGHTS))
    with pytest.raises(UserError, match=r"adapter.rank is 4, and the LoRA .* has the rank 2; give --adapter.rank 2"):
        train(replace(wide, training=file))
    tiny_pipeline(seed=7).save_pretrained(tmp_path / "other")
    other = replace(recipe, model=replace(recipe.model, id=str(tmp_path / "other")), adapter=AdapterConfig(rank=2))
    with pytest.raises(UserError, match="tuned from another base"):
        train(replace(other, training=begun, output=str(tmp_path / "third")))
    with pytest.raises(UserError, match=r"there is nothing at .* to begin from"):
        train(replace(wide, training=replace(begun, begin_from=str(tmp_path / "gone"))))
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="has x, which is no part of a LoRA"):
        train(replace(wide, training=replace(begun, begin_from=str(tmp_path / "x.safetensors"))))
    assert not (tmp_path / "second" / "run.json").exists()


@pytest.mark.wide
def test_fault_15_10_a_run_that_began_from_another_resumes_bit_equal(recipe, tmp_path):
    train(recipe)
    begun = replace(recipe.training, begin_from=recipe.output)
    second = [replace(recipe, training=begun, output=str(tmp_path / name)) for name in ("whole", "cut")]
    train(second[0])
    with interrupted_after(3), pytest.raises(KeyboardInterrupt):
        train(second[1])
    train(longer(second[1], 6))
    assert same(tmp_path / "whole" / WEIGHTS, tmp_path / "cut" / WEIGHTS)
    assert not same(tmp_path / "whole" / WEIGHTS, Path(recipe.output) / WEIGHTS)


@pytest.mark.wide
def test_fault_15_10_a_data_folder_of_another_place_does_not_count_as_a_change(recipe, tmp_path):
    folder = write_pictures(tmp_path / "data")
    recipe = replace(recipe, data=DataConfig(str(folder), holdout=0.25, cache=recipe.data.cache))
    train(recipe)
    os.rename(folder, tmp_path / "moved")
    run = train(longer(replace(recipe, data=replace(recipe.data, path=str(tmp_path / "moved"))), 7)).record
    assert list(run.changes[0].keys) == ["training.max_steps"]
