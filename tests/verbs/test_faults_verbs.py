"""Faults 10, 11, 12 and 26 of issue 15 on the command line: resuming, beginning, kept steps, choices over a recipe."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from difftuning_control.cli import main
from difftuning_control.errors import UserError
from difftuning_control.recipe.requests import VerifyRequest
from difftuning_control.runs.audit import read_audit
from difftuning_control.runs.verify import verify
from difftuning_control.verbs.choices import CHOICES, DEFAULTS, left_out
from difftuning_control.verbs.commands import COMMANDS
from difftuning_control.verbs.parse import keys_of, parse
from support.command_line import flags, settings
from support.pictures import write_pictures
from support.refusals import assert_refused

WEIGHTS = "pytorch_lora_weights.safetensors"


def record(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """Finished runs of three steps that kept their weights after each: a LoRA, all weights, and a ControlNet."""
    root = tmp_path_factory.mktemp("verbs")
    pictures = write_pictures(root / "data", count=24)
    common = {"training.max_steps": 3, "training.save_at": "[1, 2, 3]", "data.holdout": 0.4, "bank.size": 10}
    common |= {"training.learning_rate": 0.01, "training.lr_scheduler": "constant"}
    for name, more in (
        ("lora", {}),
        ("full", {"method": "full"}),
        ("controlnet", {"method": "controlnet", "control.fidelity.every": 0}),
    ):
        values = settings(model_dir, pictures, root, **common, **more, output=root / name)
        main(["train", *flags(values)])
    return root


# --- 11: resume, and train without data -----------------------------------------------------------------------------


def test_fault_15_11_resume_needs_the_folder_alone(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {p: p.read_bytes() for p in (root / "lora").iterdir() if p.is_file()}
    main(["resume", str(root / "lora")])
    assert f"done: {root / 'lora'} (complete)" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in (root / "lora").iterdir() if p.is_file()} == before


@pytest.mark.wide
def test_fault_15_11_dotted_keys_change_what_may_change(tmp_path, model_dir, capsys):
    pictures = write_pictures(tmp_path / "data")
    main(["train", *flags(settings(model_dir, pictures, tmp_path))])
    run = tmp_path / "run"
    assert_refused(["resume", str(run), "--adapter.rank", "4"], capsys, tmp_path, "adapter.rank was None and is 4")
    main(["resume", str(run), "--training.max_steps", "4", "--training.learning_rate=5e-5"])
    found = record(run)
    assert (found["steps"], found["recipe"]["training"]["learning_rate"]) == (4, 5e-5)
    assert set(found["changes"][0]["keys"]) == {"training.max_steps", "training.learning_rate"}
    assert found["recipe"]["training"]["resume"] is False
    assert yaml.safe_load((run / "recipe.yaml").read_text()) == found["recipe"]
    assert "no longer bit-equal" in capsys.readouterr().out
    assert verify(VerifyRequest(str(run)))["status"] == "same"


@pytest.mark.sample("train --training.resume --output runs/gone-", "train --training.max_steps 1-")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["resume"], "resume is told of no run"),
        (["resume", "runs/gone"], "there is no folder runs/gone to resume"),
        (["resume", "empty"], "empty holds no run that began"),
        (["resume", "empty", "--output", "x"], "leave out --output"),
        (["train"], "train is told of no data; give the folder: difftune train PICTURES (embedded/icons to try it)"),
        (["train", "--training.max_steps", "1"], "train is told of no data"),
        (["train", "--training.resume", "--output", "runs/gone"], "difftune resume runs/gone"),
        (["train", "--config", "recipe.yaml"], "train is told of no data"),
        (["bank"], "bank is told of no data"),
        (["pilot"], "pilot is told of no data"),
        (["analyze"], "analyze is told of no data"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_fault_15_11_resuming_nothing_and_training_on_nothing_are_mistakes(
    tmp_path, monkeypatch, capsys, words, expected
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("recipe.yaml").write_text("data: {resolution: 64}\n")
    assert_refused(words, capsys, tmp_path, expected)


@pytest.mark.wide
def test_fault_15_11_a_recipe_or_a_flag_names_the_data(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {path: embedded/icons}\n")
    for words in (["--config", str(recipe)], ["--data.path", "embedded/icons"], ["--data", "{path: embedded/icons}"]):
        assert parse(["train", *words])[1].data.path == "embedded/icons"


# --- 10: beginning from another run ---------------------------------------------------------------------------------


def test_fault_15_10_train_from_a_run_takes_its_recipe_and_its_weights(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["train", "--from", str(root / "lora"), "--training.learning_rate", "1e-12", "--output", "second"])
    found = record(Path("second"))
    assert found["recipe"]["training"]["begin_from"] == str(root / "lora")
    assert found["recipe"]["data"]["path"] == str(root / "data")
    one, two = (load_file(place / WEIGHTS) for place in (root / "lora", Path("second")))
    assert all(two[name].allclose(one[name], atol=1e-6) for name in one)
    assert any(one[name].abs().max() > 1e-3 for name in one if "lora_B" in name)


def test_fault_15_10_train_from_a_step_or_a_file_begins_there(root, tmp_path, monkeypatch, model_dir):
    monkeypatch.chdir(tmp_path)
    still = ["--training.learning_rate", "1e-12", "--training.max_steps", "1", "--training.save_at", "[]"]
    main(["train", "--from", str(root / "lora" / "step-000001"), *still, "--output", "step"])
    values = settings(model_dir, root / "data", Path(), output="file")
    file = str(root / "lora" / "step-000001" / WEIGHTS)
    main(["train", *flags(values), "--from", file, *still])
    kept = load_file(file)
    for name in ("step", "file"):
        found = load_file(Path(name) / WEIGHTS)
        assert all(found[key].allclose(kept[key], atol=1e-6) for key in kept)
    assert not all(kept[k].equal(v) for k, v in load_file(root / "lora" / WEIGHTS).items())


# --- 12: kept steps -------------------------------------------------------------------------------------------------


@pytest.mark.sample("lora")
@pytest.mark.parametrize("name", ["lora", "full", "controlnet"])
def test_fault_15_12_sample_export_and_evaluate_take_a_kept_step(root, tmp_path, name):
    step = str(root / name / "step-000002")
    photo = ["--control", str(root / "data" / "0.png")] if name == "controlnet" else []
    draw = ["sample", "--prompts", '["red 1"]', "--steps", "2", *photo, "--output"]
    main([*draw, str(tmp_path / "step"), "--run", step])
    main([*draw, str(tmp_path / "end"), "--run", str(root / name)])
    pictures = [(tmp_path / place / "000-red-1.png").read_bytes() for place in ("step", "end")]
    assert pictures[0] != pictures[1]
    main(["export", step, "--to", str(tmp_path / "export"), "--base", "copied"])
    export = json.loads((tmp_path / "export" / "export.json").read_text())
    assert export["run"]["steps"] == 2
    assert export["run"]["identity"] != record(root / name)["identity"]
    asked = ["--pictures", "5", "--seeds", "[0]", "--steps", "1", "--output", str(tmp_path / "judged")]
    main(["evaluate", "--runs", json.dumps([step, str(root / name)]), *asked])
    sides = json.loads((tmp_path / "judged" / "evaluation.json").read_text())["sides"]
    assert [side["name"] for side in sides] == [step, str(root / name)]
    assert sides[0]["runs"] != sides[1]["runs"]
    assert verify(VerifyRequest(str(root / name)))["status"] == "same"  # its own folder has the lines of the audit
    assert read_audit(root / name).entries[-1]["command"].startswith("difftune evaluate")


def test_fault_15_12_the_weights_of_a_kept_step_are_what_is_exported(root, tmp_path):
    step = root / "lora" / "step-000001"
    main(["export", str(step), "--to", str(tmp_path / "one"), "--base", "referenced"])
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (step / WEIGHTS).read_bytes()
    main(["export", str(step), "--to", str(tmp_path / "two"), "--format", "kohya"])
    assert (tmp_path / "two" / "lora-step-000001.safetensors").is_file()


@pytest.mark.wide
def test_fault_15_12_analyze_measures_what_a_kept_step_forgot(root, tmp_path):
    few = ["--analysis.rows", "4", "--analysis.draws", "1", "--output"]
    curves = []
    for place in ("lora/step-000001", "lora"):
        main(["analyze", "--run", str(root / place), *few, str(tmp_path / place.replace("/", "-"))])
        found = json.loads((tmp_path / place.replace("/", "-") / "analysis.json").read_text())
        curves.append(found["forgetting"]["mean"])
    assert curves[0] != curves[1]


def test_fault_15_12_the_base_and_all_kept_steps_come_into_one_grid(root, tmp_path):
    words = ["sample", "--run", str(root / "lora"), "--prompts", '["red 1"]', "--steps", "1", "--output"]
    main([*words, str(tmp_path / "pair"), "--compare"])
    main([*words, str(tmp_path / "all"), "--compare", "--kept"])
    pair, every = (Image.open(tmp_path / name / "grid.png") for name in ("pair", "all"))
    assert every.height - pair.height == 2 * (96 + 4)  # two rows more: steps 1 and 2; step 3 is the result
    assert json.loads((tmp_path / "all" / "samples.json").read_text())["kept"] == [1, 2]


def test_fault_15_12_a_step_that_was_not_kept_is_refused(root, tmp_path, capsys):
    words = ["sample", "--prompts", '["red"]', "--output", str(tmp_path / "out"), "--run"]
    assert_refused([*words, str(root / "lora" / "step-000009")], capsys, tmp_path, "kept no weights after 9 steps")
    step = str(root / "lora" / "step-000001")
    assert_refused([*words, step, "--compare", "--kept"], capsys, tmp_path, "is one step of a run; leave it out")
    assert_refused([*words, step, "--kept"], capsys, tmp_path, "--kept needs --compare")


# --- 26: a choice brings its own fields -----------------------------------------------------------------------------

OVER = {
    "constant over tau": ("tuning: {schedule: {kind: power, tau: 0.5}}", ["--tuning.schedule.kind", "constant"]),
    "constant with its own over tau": (
        "tuning: {schedule: {kind: power, tau: 0.5}}",
        ["--tuning.schedule.kind", "constant", "--tuning.schedule.xi", "1"],
    ),
    "a section over tau": ("tuning: {schedule: {kind: power, tau: 0.5}}", ["--tuning.schedule", "{kind: constant}"]),
    "power over constant": ("tuning: {schedule: {kind: constant, psi: 1, xi: 1}}", ["--tuning.schedule.kind=power"]),
    "ia3 over a rank": ("adapter: {kind: lora, rank: 4, dropout: 0.1}", ["--adapter.kind", "ia3"]),
    "tlora over pissa": ("adapter: {kind: lora, rank: 4, init: pissa}", ["--adapter.kind", "tlora"]),
    "lokr over an alpha": ("adapter: {kind: lora, alpha: 4}", ["--adapter.kind", "lokr"]),
    "oft over loha": ("adapter: {kind: loha, rank: 4, alpha: 2}", ["--adapter.kind", "oft"]),
    "supplied over params": (
        "{method: controlnet, control: {annotator: canny, params: {low_threshold: 50}}}",
        ["--control.annotator", "supplied", "--control.column", "edges", "--control.bank_condition", "blank"],
    ),
    "canny over supplied": (
        "{method: controlnet, control: {annotator: supplied, path: edges}}",
        ["--control.annotator=canny"],
    ),
    "full over an adapter": ("{method: lora, adapter: {rank: 4}}", ["--method", "full"]),
    "lora over a control": ("{method: controlnet, control: {annotator: hed, dropout: 0.1}}", ["--method", "lora"]),
    "controlnet over an adapter": ("{method: lora, adapter: {rank: 4}}", ["--method", "controlnet"]),
    "no buckets": ("data: {buckets: true, bucket_step: 64}", ["--data.buckets", "false"]),
    "classes": ("data: {default_caption: a}", ["--data.classes", "folders"]),
    "no stop": ("{method: controlnet, training: {stop_when: converged, stop_after: 5}}", ["--training.stop_when=null"]),
    "no text encoder": (
        "adapter: {text_encoder: true, text_encoder_learning_rate: 0.1}",
        ["--adapter.text_encoder", "false"],
    ),
}


@pytest.mark.sample("tlora over pissa-flags first")
@pytest.mark.parametrize("first", [True, False], ids=["flags first", "recipe first"])
@pytest.mark.parametrize("case", OVER)
def test_fault_15_26_a_choice_on_the_command_line_brings_its_own_fields(tmp_path, capsys, case, first):
    text, words = OVER[case]
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = ["--config", str(tmp_path / "recipe.yaml")]
    _, found = parse(["train", *(words + recipe if first else recipe + words)])
    shared = ["--method", "controlnet"] if case in ("supplied over params", "canny over supplied", "no stop") else []
    _, alone = parse(["train", *words, *shared])
    kept = {"tlora over pissa": {"rank": 4}}.get(case, {})  # what the new kind takes too
    expected = alone.to_dict()
    expected["adapter"] |= kept
    assert found.to_dict() == expected
    assert "left out" in capsys.readouterr().out


def test_fault_15_26_what_fits_the_new_choice_stays_and_what_is_chosen_again_leaves_all(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("adapter: {kind: lora, rank: 4, alpha: 2, dropout: 0.1}")
    recipe = ["--config", str(tmp_path / "recipe.yaml")]
    found = parse(["train", *recipe, "--adapter.kind", "loha"])[1].adapter
    assert (found.rank, found.alpha, found.dropout) == (4, 2.0, 0.0)
    assert "note: adapter.dropout of the recipe" in capsys.readouterr().out
    found = parse(["train", *recipe, "--adapter.kind", "lora"])[1].adapter
    assert (found.rank, found.alpha, found.dropout) == (4, 2.0, 0.1)
    assert capsys.readouterr().out == ""


def test_fault_15_26_a_later_recipe_brings_its_own_fields_too(tmp_path):
    for name, text in (("1", "tuning: {schedule: {tau: 0.5}}"), ("2", "tuning: {schedule: {kind: constant, xi: 1}}")):
        (tmp_path / name).write_text(text)
    _, found = parse(["train", "--config", str(tmp_path / "1"), "--config", str(tmp_path / "2")])
    assert (found.tuning.schedule.tau, found.tuning.schedule.xi) == (None, 1.0)


def test_fault_15_26_what_contradicts_itself_in_one_place_is_still_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("tuning: {schedule: {kind: constant, tau: 0.5}}")
    with pytest.raises(UserError, match="tau is given, but a constant schedule"):
        parse(["train", "--config", str(tmp_path / "recipe.yaml")])
    with pytest.raises(UserError, match="tau is given, but a constant schedule"):
        parse(["train", "--tuning.schedule.kind", "constant", "--tuning.schedule.tau", "1"])


def test_fault_15_26_every_choice_and_what_belongs_to_it_are_keys_of_a_recipe():
    known = keys_of(COMMANDS["train"])
    assert set(CHOICES) <= set(DEFAULTS) <= set(known)
    for choice, values in (("adapter.kind", ("ia3", "lokr")), ("tuning.schedule.kind", ("auto", "measured"))):
        for value in values:
            assert CHOICES[choice]({**DEFAULTS, choice: value}) <= set(DEFAULTS)
    assert left_out([{"adapter.rank": 4}, {"adapter.kind": "ia3"}]) == [{}, {"adapter.rank": None}]
