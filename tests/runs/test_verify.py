"""`difftune verify`: an untouched run verifies wherever it lies, and each tampering is found and named."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from difftuning_control.cli import main
from difftuning_control.recipe.inputs import BankConfig, ControlConfig, DataConfig, FidelityConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.requests import VerifyRequest
from difftuning_control.recipe.training import TuningConfig
from difftuning_control.runs.audit import FILE, read_audit
from difftuning_control.runs.manifest import place_of, source_files
from difftuning_control.runs.verify import table, verify
from difftuning_control.system.digests import digest_of_file
from difftuning_control.system.durable import write_json
from difftuning_control.verbs.train import train
from support.command_line import flags, settings
from support.damages import flip
from support.pictures import write_pictures
from support.refusals import assert_refused

WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A run of two steps with its base, its data and a bank of three shards, all in one folder."""
    root = tmp_path_factory.mktemp("verify")
    shutil.copytree(model_dir, root / "base")
    values = {"bank.size": 130, "bank.steps": 1, "bank.batch_size": 64, "training.sample_every": 2}
    data = write_pictures(root / "data", count=12)
    (data / "notes.txt").write_text("not a caption")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        main(["train", *flags(settings(Path("base"), Path("data"), Path(), **values, **{"bank.path": "bank"}))])
    return root.rename(root.with_name("verify-moved"))  # so that the places that it recorded are gone


@pytest.fixture
def root(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be tampered with; it is the current folder, so all lies elsewhere than when it was trained."""
    copy = tmp_path / "copy"
    shutil.copytree(kept, copy)
    monkeypatch.chdir(copy)
    return copy


def found(**changes: Any) -> dict[str, list[tuple[str, str, str]]]:
    """The findings of each part that has any."""
    result = verify(VerifyRequest("run", **changes))
    assert (result["status"] == "changed") == any(p["findings"] for p in result["parts"])
    return {
        p["part"]: [(f["what"], f["item"], f["said"]) for f in p["findings"]] for p in result["parts"] if p["findings"]
    }


# --- what is as it was ----------------------------------------------------------------------------------------------


def test_an_untouched_run_verifies_part_by_part(root, capsys):
    main(["verify", "run", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert (result["status"], result["unchecked"], result["torn"]) == ("same", [], 0)
    checked = {p["part"]: p["checked"] for p in result["parts"]}
    assert checked["data"] == 12
    assert checked["bank"] == 1 + 3 + 1  # manifest, shards, prompts
    assert checked["base"] >= 8
    assert {p["state"] for p in result["parts"]} == {"same"}
    assert result["head"] == read_audit(root / "run").head


def test_a_moved_run_verifies(root, capsys):
    shutil.move("run", "elsewhere")
    main(["verify", "elsewhere", "--strict", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert (result["status"], result["unchecked"]) == ("same", [])
    assert {p["state"] for p in result["parts"]} == {"same"}


def test_what_the_run_does_not_use_may_change(root):
    (root / "data" / "notes.txt").write_text("another")
    rows = [json.loads(line) | {"more": 1} for line in (root / "data" / "metadata.jsonl").read_text().splitlines()]
    (root / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "run" / ".DS_Store").write_text("x")
    (root / "run" / "logs").mkdir()
    (root / "run" / "logs" / "events").write_text("x")
    assert found() == {}


def test_commands_that_read_a_run_leave_it_verifiable_and_a_line_each(root):
    main(["sample", "--run", "run", "--steps", "1", "--prompts", '["red"]', "--output", "samples"])
    main(["export", "run", "--to", "export", "--base", "referenced"])
    assert found() == {}
    chain = read_audit(root / "run")
    assert [e["outcome"] for e in chain.entries] == ["begun", "done", "done", "done"]
    assert chain.entries[2]["command"].startswith("difftune sample --run run")
    assert chain.last_hash_of("export.json") is not None


# --- each tampering -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (f"run/{WEIGHTS}", "outputs"),
        ("run/recipe.yaml", "outputs"),
        ("run/README.md", "outputs"),
        ("run/metrics.jsonl", "outputs"),
        ("run/samples/step-000002.png", "outputs"),
        ("base/unet/diffusion_pytorch_model.safetensors", "base"),
        ("base/scheduler/scheduler_config.json", "base"),
        ("base/tokenizer/tokenizer_config.json", "base"),
        ("base/model_index.json", "base"),
        ("bank/bank-00001.safetensors", "bank"),
        ("bank/prompts.jsonl", "bank"),
        ("data/3.png", "data"),
    ],
)
def test_a_flipped_byte_is_found_and_so_is_a_missing_file(root, name, part):
    path, relative = root / name, name.partition("/")[2]
    content = path.read_bytes()
    if name != "base/model_index.json":  # which says where the others lie
        flip(path, len(content) // 2)
        assert [(what, item) for what, item, _ in found()[part]] == [("changed", relative)]
    path.unlink()
    assert ("missing", relative) in [(what, item) for what, item, _ in found()[part]]
    path.write_bytes(content)
    assert found() == {}


def test_an_edited_caption_is_found(root):
    path = root / "data" / "metadata.jsonl"
    path.write_text(path.read_text().replace("red 3", "blue 3"))
    assert found() == {"data": [("changed", "3.png", "its caption")]}


def test_an_added_picture_is_found_and_a_removed_row(root):
    Image.new("RGB", (16, 16)).save(root / "data" / "new.png")
    assert found() == {}  # no row of the metadata names it, so training would not read it
    path = root / "data" / "metadata.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows[1:], json.dumps({"file_name": "new.png", "text": "new"})]))
    assert found() == {"data": [("missing", "0.png", ""), ("added", "new.png", "")]}


def test_another_order_of_the_same_pictures_is_found(root):
    path = root / "data" / "metadata.jsonl"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    assert found() == {"data": [("changed", str(root / "data"), "the same pictures, in another order")]}


def test_exchanged_shards_are_found(root):
    one, two = (root / "bank" / f"bank-0000{i}.safetensors" for i in (0, 1))
    content = one.read_bytes(), two.read_bytes()
    one.write_bytes(content[1])
    two.write_bytes(content[0])
    assert [f[:2] for f in found()["bank"]] == [("changed", one.name), ("changed", two.name)]


def test_a_shard_of_another_bank_is_found_though_its_manifest_says_it_is_right(root):
    from difftuning_control.system.digests import digest_of_file

    shard, path = root / "bank" / "bank-00002.safetensors", root / "bank" / "manifest.json"
    flip(shard)
    manifest = json.loads(path.read_text())
    manifest["shards"][shard.name] = digest_of_file(shard)
    write_json(path, manifest)
    assert found() == {"bank": [("changed", "manifest.json", "it is of another bank, or was edited")]}


@pytest.mark.parametrize("name", ["run/extra.safetensors", "bank/bank-00009.safetensors", "base/unet/more.safetensors"])
def test_an_added_file_is_found(root, name):
    (root / name).write_bytes(b"x")
    assert [f[0] for findings in found().values() for f in findings] == ["added"]


@pytest.mark.parametrize("number", [0, 1])
def test_an_edited_audit_line_is_found(root, number):
    lines = (root / "run" / FILE).read_bytes().splitlines(keepends=True)
    lines[number] = lines[number].replace(b'"command": "', b'"command": "x')
    (root / "run" / FILE).write_bytes(b"".join(lines))
    assert ("changed", FILE, f"line {number + 1} was edited") in found()["audit"]


def test_an_edited_record_is_found_even_where_it_agrees_with_edited_weights(root):
    from difftuning_control.system.digests import digest_of_file

    flip(root / "run" / WEIGHTS)
    record = json.loads((root / "run" / "run.json").read_text())
    record["outputs"][WEIGHTS] = digest_of_file(root / "run" / WEIGHTS)
    write_json(root / "run" / "run.json", record)
    assert list(found()) == ["record"]


def test_a_list_of_pictures_that_was_edited_is_not_relied_on(root):
    path = root / "run" / "inputs.jsonl"
    path.write_text(path.read_text().replace('"3.png"', '"4.png"'))
    assert found() == {"outputs": [("changed", "inputs.jsonl", "")]}
    assert verify(VerifyRequest("run"))["unchecked"] == ["data"]


def test_a_cut_chain_shows_by_its_kept_head(root, capsys):
    main(["export", "run", "--to", "export", "--base", "referenced"])
    head = read_audit(root / "run").head
    main(["verify", "run", "--head", head])
    lines = (root / "run" / FILE).read_bytes().splitlines(keepends=True)
    (root / "run" / FILE).write_bytes(b"".join(lines[:-1]))
    assert found() == {}
    assert list(found(head=head)) == ["audit"]


def test_a_power_cut_in_the_audit_is_said_and_is_no_change(root, capsys):
    main(["export", "run", "--to", "export", "--base", "referenced"])
    path = root / "run" / FILE
    path.write_bytes(path.read_bytes()[:-30])
    capsys.readouterr()
    main(["verify", "run"])
    assert "note: 1 line of audit.jsonl was cut off" in capsys.readouterr().out


# --- what cannot be checked -----------------------------------------------------------------------------------------


def test_what_is_left_out_is_said_and_counts_where_it_is_strict(root, capsys):
    shutil.rmtree(root / "data")
    shutil.rmtree(root / "bank")
    assert list(found()) == ["data", "bank"]
    capsys.readouterr()
    main(["verify", "run", "--skip", '["data", "bank"]'])
    shown = capsys.readouterr().out
    assert shown.count("not checked: left out as asked") == 2
    with pytest.raises(SystemExit) as stopped:
        main(["verify", "run", "--skip", '["data", "bank"]', "--strict"])
    assert stopped.value.code == 1


def test_a_base_of_the_hub_is_found_in_its_cache_or_said_not_to_be_there(root, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789" * 4
    snapshot = tmp_path / "hub" / "models--me--tiny" / "snapshots" / commit
    shutil.copytree(root / "base", snapshot)
    refs = tmp_path / "hub" / "models--me--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    place = place_of("me/tiny")
    assert place is not None
    assert place.resolve() == snapshot.resolve()
    record = json.loads((root / "run" / "run.json").read_text())
    record["sources"]["base"] |= {"id": "me/tiny", "revision": commit}
    record["recipe"]["model"]["id"] = "me/tiny"
    del record["places"]["model"]
    write_json(root / "run" / "run.json", record)
    assert "base" not in found()
    (snapshot / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant, downloaded since")
    assert "base" not in found()
    flip(snapshot / "vae" / "diffusion_pytorch_model.safetensors")
    assert found()["base"] == [("changed", "vae/diffusion_pytorch_model.safetensors", "")]
    shutil.rmtree(tmp_path / "hub")
    (part,) = [p for p in verify(VerifyRequest("run"))["parts"] if p["part"] == "base"]
    assert (part["state"], part["findings"]) == ("unchecked", [])
    assert "me/tiny at" in part["unchecked"]


def test_a_run_of_an_earlier_version_is_checked_as_far_as_it_goes(root):
    record = json.loads((root / "run" / "run.json").read_text())
    for name in ("files", "sources", "inputs"):
        del record[name]
    write_json(root / "run" / "run.json", record)
    (root / "run" / FILE).unlink()
    result = verify(VerifyRequest("run"))
    assert (result["status"], result["unchecked"]) == ("same", ["record", "audit", "outputs", "base", "data"])
    flip(root / "run" / WEIGHTS)
    assert found() == {"outputs": [("changed", WEIGHTS, "")]}


def test_only_files_that_a_pipeline_reads_are_hashed(root):
    (root / "base" / "big-checkpoint.safetensors").write_bytes(b"x")
    (root / "base" / "unet" / "pickled.bin").write_bytes(b"x")
    names = dict(source_files(root / "base"))
    assert "model_index.json" in names
    assert "unet/diffusion_pytorch_model.safetensors" in names
    assert {"big-checkpoint.safetensors", "unet/pickled.bin"}.isdisjoint(names)


# --- other inputs ---------------------------------------------------------------------------------------------------


def test_captions_beside_pictures_and_a_place_of_held_out_ones(recipe, tmp_path):
    for name, seed in (("train", 0), ("held", 1)):
        folder = write_pictures(tmp_path / name, count=4, seed=seed)
        (folder / "metadata.jsonl").unlink()
        for i in range(4):
            (folder / f"{i}.txt").write_text(f"{name} {i}")
    data = DataConfig(
        str(tmp_path / "train"),
        holdout=0.0,
        validation_path=str(tmp_path / "held"),
        limit=3,
        cache=str(tmp_path / "cache"),
    )
    training = replace(recipe.training, max_steps=1, batch_size=2)
    made = replace(recipe, data=data, training=training, tuning=TuningConfig(retention_ratio=0, retention_weight=0))
    train(made)
    request = VerifyRequest(made.output)

    def differing() -> dict[str, list[tuple[str, str]]]:
        return {
            p["part"]: [(f["what"], f["item"]) for f in p["findings"]]
            for p in verify(request)["parts"]
            if p["findings"]
        }

    assert differing() == {}
    (tmp_path / "train" / "9.txt").write_text("beyond the limit")
    Image.new("RGB", (16, 16)).save(tmp_path / "train" / "9.png")
    assert differing() == {}
    Image.new("RGB", (16, 16)).save(tmp_path / "train" / "00.png")
    (tmp_path / "train" / "00.txt").write_text("before it")
    (tmp_path / "train" / "1.txt").unlink()
    (tmp_path / "held" / "2.txt").write_text("another")
    Image.new("RGB", (16, 16)).save(tmp_path / "held" / "9.png")
    assert differing() == {
        "data": [("missing", "1.png"), ("added", "00.png")],
        "validation": [("changed", "2.png"), ("added", "9.png")],
    }


def test_conditions_and_a_bank_of_pictures(recipe, tmp_path):
    for name, seed in (("data", 0), ("conditions", 1), ("old", 2)):
        write_pictures(tmp_path / name, count=4, seed=seed)
        if name != "data":
            (tmp_path / name / "metadata.jsonl").unlink()
    made = Recipe(
        "controlnet",
        recipe.model,
        DataConfig(str(tmp_path / "data"), holdout=0.25, cache=str(tmp_path / "cache")),
        bank=BankConfig(path=str(tmp_path / "old")),
        control=ControlConfig(
            "supplied", path=str(tmp_path / "conditions"), bank_condition="blank", fidelity=FidelityConfig(every=0)
        ),
        training=replace(recipe.training, max_steps=1),
        output=recipe.output,
    )
    train(made)

    def parts() -> dict[str, list[tuple[str, str, str]]]:
        return {
            p["part"]: [(f["what"], f["item"], f["said"]) for f in p["findings"]]
            for p in verify(VerifyRequest(made.output))["parts"]
            if p["findings"]
        }

    assert parts() == {}
    Image.new("RGB", (16, 16)).save(tmp_path / "conditions" / "2.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "old" / "2.png")
    flip(Path(made.output) / "controlnet" / "control_spec.json", 5)
    flip(Path(made.output) / "report.html", 50)
    changed = parts()
    assert changed["data"] == [("changed", "2.png", "its condition")]
    assert [f[0] for f in changed["bank"]] == ["changed"]
    assert [f[1] for f in changed["outputs"]] == ["controlnet/control_spec.json", "report.html"]


# --- exit codes and refusals ----------------------------------------------------------------------------------------


def test_what_differs_is_said_with_exit_code_one(root, capsys):
    flip(root / "run" / WEIGHTS)
    with pytest.raises(SystemExit) as stopped:
        main(["verify", "run"])
    shown = capsys.readouterr()
    assert stopped.value.code == 1
    assert f"changed  {WEIGHTS}" in shown.out
    assert shown.err == "difftune: run is not what it was (outputs).\n"


def test_names_with_escapes_are_shown_harmlessly_and_many_are_counted(root):
    for i in range(30):
        (root / "run" / f"\x1b[31m{i}").write_text("x")
    shown = table(verify(VerifyRequest("run")))
    assert "\x1b" not in shown
    assert "… and 10 more" in shown


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "there is no folder nowhere"),
        (["run", "--head", "abc"], "head is 'abc'; expected the 64 hexadecimal digits"),
        (["run", "--skip", '["outputs"]'], "skip names 'outputs'; expected any of base, controlnet, schedule"),
        ([], "run"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_exit_code_two(root, capsys, words, expected):
    assert_refused(["verify", *words], capsys, root, expected)


def test_a_record_that_is_no_more_is_found_where_the_audit_tells_of_it(root):
    path = root / "run" / "run.json"
    content = path.read_text()
    for changed in ("{", "{}", content.replace('"status": "complete"', '"status": "running"')):
        path.write_text(changed)
        assert [f[:2] for f in found()["record"]] == [("changed", "run.json")]
    path.unlink()
    assert [f[:2] for f in found()["record"]] == [("missing", "run.json")]


def test_an_unfinished_run_is_refused(root, capsys):
    path = root / "run" / "run.json"
    write_json(path, json.loads(path.read_text()) | {"status": "running"})
    lines = (root / "run" / FILE).read_bytes().splitlines(keepends=True)
    (root / "run" / FILE).write_bytes(lines[0])
    assert_refused(["verify", "run"], capsys, root, "is running, not complete")


# --- sessions of a run ----------------------------------------------------------------------------------------------


class Cut(BaseException):
    pass


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe], None]:
    """Trains until the first checkpoint, and breaks off."""
    from difftuning_control.training import loop

    def break_off(recipe: Recipe) -> None:
        with monkeypatch.context() as patch:
            save = loop.save_checkpoint

            def then_stop(*arguments: Any) -> None:
                save(*arguments)
                raise Cut

            patch.setattr(loop, "save_checkpoint", then_stop)
            with pytest.raises(Cut):
                train(recipe)

    return break_off


@pytest.mark.wide
def test_the_audit_of_a_resumed_run_has_both_sessions(recipe, cut):
    cut(recipe)
    train(replace(recipe, training=replace(recipe.training, resume=True)))
    entries = read_audit(Path(recipe.output)).entries
    assert [e["outcome"] for e in entries] == ["begun", "interrupted", "begun", "done"]
    assert entries[0]["session"] == entries[1]["session"] != entries[2]["session"] == entries[3]["session"]
    assert entries[0]["recipe"] == entries[1]["recipe"]
    assert verify(VerifyRequest(recipe.output))["status"] == "same"


def test_a_record_without_its_line_is_vouched_for_when_the_run_is_resumed(recipe):
    train(recipe)
    path = Path(recipe.output) / FILE
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    assert verify(VerifyRequest(recipe.output))["status"] == "changed"
    again = replace(recipe, training=replace(recipe.training, resume=True))
    train(again)
    assert verify(VerifyRequest(recipe.output))["status"] == "same"
    before = path.read_bytes()
    train(again)
    assert path.read_bytes() == before


@pytest.mark.wide
def test_a_changed_record_is_not_vouched_for_by_resuming(recipe):
    train(recipe)
    path = Path(recipe.output) / "run.json"
    write_json(path, json.loads(path.read_text()) | {"device": "another"})
    train(replace(recipe, training=replace(recipe.training, resume=True)))
    assert verify(VerifyRequest(recipe.output))["status"] == "changed"


@pytest.mark.wide
def test_an_audit_outlives_the_run_that_is_overwritten(recipe):
    short = replace(recipe, training=replace(recipe.training, max_steps=1))
    train(short)
    train(short, overwrite=True)
    assert [e["outcome"] for e in read_audit(Path(recipe.output)).entries] == ["begun", "done"] * 2
    assert verify(VerifyRequest(recipe.output))["status"] == "same"


def test_a_bank_drawn_ahead_has_its_line(root):
    main(["bank", *flags(settings(Path("base"), Path("data"), Path(), **{"bank.path": "ahead", "bank.size": 2}))])
    (entry,) = read_audit(root / "ahead").entries
    assert entry["command"].startswith("difftune bank --model.id base")
    digest = digest_of_file(root / "ahead" / "manifest.json")
    assert (entry["outcome"], entry["artefacts"]) == ("done", {"manifest.json": digest})
