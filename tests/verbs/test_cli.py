"""The `difftune` command: what it takes from recipes and flags, and each verb end to end on a tiny model."""

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from difftuning_control.cli import main
from difftuning_control.errors import UserError
from difftuning_control.families.fitting import fitted
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.finished import finished_run
from difftuning_control.verbs.commands import COMMANDS, only
from difftuning_control.verbs.parse import keys_of, parse
from difftuning_control.verbs.run_lines import print_run
from difftuning_control.verbs.spelling import OTHERS, SHORT
from support.command_line import files_for_all, flags, settings
from support.feature_models import save_tiny_dinov2
from support.pictures import write_pictures

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").rglob("*.yaml"))
HEAVY = ("controlnet_aux", "matplotlib", "torchmetrics", "datasets", "accelerate", "diffusers")


def write_recipe(path: Path, values: object) -> str:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return str(path)


# --- recipes and flags ----------------------------------------------------------------------------------------------


@pytest.mark.wide
def test_without_anything_the_defaults_are_those_of_the_recipe():
    verb, command = parse(["train"])
    assert verb == "train"
    assert command.overwrite is False
    assert command.data.path == ""  # which the command refuses: what is trained on is named
    command.data.path = Recipe().data.path
    assert {k: v for k, v in command.to_dict().items() if k != "overwrite"} == Recipe().to_dict()


@pytest.mark.sample("key value-flags first")
@pytest.mark.parametrize("first", [True, False], ids=["flags first", "recipe first"])
@pytest.mark.parametrize("joined", [True, False], ids=["key=value", "key value"])
def test_flags_override_the_recipe_from_either_side(tmp_path, first, joined):
    values = {"training": {"max_steps": 7, "batch_size": 9}, "output": "from recipe"}
    recipe = ["--config", write_recipe(tmp_path / "recipe.yaml", values)]
    over = ["--training.max_steps", "3", "--output", "from flag"]
    if joined:
        recipe, over = (["=".join(pair) for pair in zip(part[::2], part[1::2])] for part in (recipe, over))
    _, command = parse(["train", *(over + recipe if first else recipe + over)])
    assert (command.training.max_steps, command.training.batch_size, command.output) == (3, 9, "from flag")


@pytest.mark.wide
def test_a_later_recipe_overrides_an_earlier_one_key_by_key(tmp_path):
    one = write_recipe(tmp_path / "1.yaml", {"training": {"max_steps": 7, "seed": 1}})
    two = write_recipe(tmp_path / "2.yaml", {"training": {"max_steps": 8}})
    _, command = parse(["train", "--config", one, "--config", two])
    assert (command.training.max_steps, command.training.seed) == (8, 1)


@pytest.mark.sample("controlnet_canny")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_example_is_a_valid_recipe(path):
    verb = "pilot" if "pilot" in yaml.safe_load(path.read_text()) else "train"
    _, command = parse([verb, "--config", str(path)])
    assert command.output.startswith(("runs/", "build/"))


@pytest.mark.sample("--overwrite false--")
@pytest.mark.parametrize(
    ("words", "key", "expected"),
    [
        (["--training.mixed_precision", "no"], "training.mixed_precision", "no"),
        (["--training.learning_rate", "1e-4"], "training.learning_rate", 1e-4),
        (["--training.learning_rate", "1"], "training.learning_rate", 1.0),
        (["--training.max_grad_norm", "null"], "training.max_grad_norm", None),
        (["--training.sample_prompts", '["red apple", "a: b"]'], "training.sample_prompts", ["red apple", "a: b"]),
        (["--data.default_caption", "true"], "data.default_caption", "true"),
        (["--data.path", "2024"], "data.path", "2024"),
        (["--data.flip", "true"], "data.flip", True),
        (["--data.flip"], "data.flip", True),
        (["--data.flip=false"], "data.flip", False),
        (["--overwrite"], "overwrite", True),
        (["--overwrite", "false"], "overwrite", False),
        (["--overwrite", "--data.skip_bad"], "data.skip_bad", True),
        (["--tuning.schedule", "{kind: paper, tau: 2}"], "tuning.schedule.tau", 2.0),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_values_on_the_command_line_mean_what_they_say(words, key, expected):
    _, found = parse(["train", *words])
    for name in key.split("."):
        found = getattr(found, name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.sample("training: {ema_decay: null}-ema_decay-None")
@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("training: {learning_rate: 1e-4}", "learning_rate", 1e-4),
        ('training: {mixed_precision: "no"}', "mixed_precision", "no"),
        ("training: {ema_decay: null}", "ema_decay", None),
        ("training: {sample_prompts: [red apple, żółw]}", "sample_prompts", ["red apple", "żółw"]),
    ],
)
def test_values_in_a_recipe_mean_what_they_say(tmp_path, text, key, expected):
    _, command = parse(["train", "--config", write_recipe(tmp_path / "recipe.yaml", text)])
    assert getattr(command.training, key) == expected


@pytest.mark.sample("sample")
@pytest.mark.parametrize("verb", COMMANDS)
def test_every_leaf_in_a_wrong_section_leads_to_the_right_one(verb):
    known = keys_of(COMMANDS[verb])
    leaves = {key.rsplit(".", 1)[-1]: key for key in known if "." in key}
    unique = {leaf: key for leaf, key in leaves.items() if sum(k.rsplit(".", 1)[-1] == leaf for k in known) == 1}
    for leaf, key in unique.items():
        for wrong in (leaf, f"data.{leaf}", f"training.{leaf}", f"model.schedule.{leaf}"):
            misspelt = wrong.removesuffix("s") in known  # training.seeds is training.seed with a letter too many
            if wrong not in known and wrong not in SHORT.get(verb, {}) and not misspelt:
                meant = OTHERS[wrong] if OTHERS.get(wrong) in known else key  # where other trainers call it so
                with pytest.raises(UserError, match=rf"no option --{wrong}; did you mean --{meant}( \(--\w+\))?\?$"):
                    parse([verb, f"--{wrong}", "1"])


@pytest.mark.sample("data.path")
@pytest.mark.parametrize("key", [k for k in keys_of(COMMANDS["train"]) if "." in k])
def test_a_key_with_a_letter_missing_is_recognised(key):
    for place in range(key.rindex(".") + 2, len(key)):
        misspelt = key[:place] + key[place + 1 :]
        if len(key.rsplit(".", 1)[-1]) > 3 and misspelt not in keys_of(COMMANDS["train"]):
            with pytest.raises(UserError, match=rf"did you mean --{key}( \(--\w+\))?\?$"):
                parse(["train", f"--{misspelt}", "1"])


@pytest.mark.sample("resume --help-all")
@pytest.mark.parametrize("words", [["--help"], *([verb, "--help-all"] for verb in COMMANDS)], ids=" ".join)
def test_help_lists_what_there_is_and_leaves_with_zero(capsys, words):
    with pytest.raises(SystemExit, match="0"):
        main(words)
    shown = capsys.readouterr().out
    wanted = list(COMMANDS) if len(words) == 1 else [f"--{k}" for k in keys_of(COMMANDS[words[0]])]
    assert [w for w in wanted if w not in shown] == []


def test_nothing_at_all_shows_the_help_and_leaves_with_two(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "train" in capsys.readouterr().out


# --- the verbs, end to end ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def trained(root: Path, model_dir: Path, pictures: Path) -> Path:
    """A finished run of two steps with a grid."""
    with files_for_all():
        main(["train", *flags(settings(model_dir, pictures, root, **{"training.sample_every": 2}))])
    return root / "run"


@pytest.mark.skipif(os.name == "nt", reason="it has no such permissions")
def test_who_may_read_a_run_may_read_its_weights(trained):
    """safetensors writes for the owner alone."""
    files = [p for p in trained.rglob("*") if p.is_file() and not p.name.startswith(".")]
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o644}
    assert any(p.suffix == ".safetensors" for p in files)


def test_train_leaves_the_files_that_the_design_names(trained):
    run = json.loads((trained / "run.json").read_text())
    assert run["status"] == "complete"
    assert {p.name for p in trained.iterdir()} == {
        "pytorch_lora_weights.safetensors",
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "README.md",
        "samples",
        "inputs.jsonl",
        "audit.jsonl",
        "report.html",
    }
    assert len((trained / "metrics.jsonl").read_text().splitlines()) >= 2


def test_a_run_says_how_to_ask_what_is_still_drawn(trained, capsys):
    print_run(finished_run(trained), "runs/my icons")
    command = """difftune evaluate --runs '["runs/my icons"]'"""
    assert command in capsys.readouterr().out
    assert parse(shlex.split(command)[1:])[1].runs == ["runs/my icons"]


def test_an_evaluation_of_few_pictures_judges_what_needs_none(trained, root, capsys):
    words = ["evaluate", "--runs", json.dumps([str(trained)]), "--features", str(save_tiny_dinov2(root / "features"))]
    words += ["--seeds", "[0]", "--steps", "1", "--outside", json.dumps(list("abcde")), "--output"]
    main([*words, str(root / "judged")])
    said = capsys.readouterr().out
    assert "note: too few pictures were held out to judge the new style by (2, 6 are needed)" in said
    assert "still drawn" in said
    assert "kid ×1000" not in said
    assert "diversity" not in said
    found = json.loads((root / "judged" / "evaluation.json").read_text())
    assert (found["settings"]["pictures"], found["settings"]["real"], found["base"]["summary"]) == (0, 0, {})
    (side,) = found["sides"]
    assert {"outside", "still_drawn"} <= set(side)
    assert side["runs"] == []
    with Image.open(root / "judged" / "grid.png") as grid:
        assert grid.width > 5 * 96  # a column a prompt
    with pytest.raises(SystemExit, match="2"):
        main([*words, str(root / "not"), "--data", str(write_pictures(root / "few", 3, seed=7))])
    assert "an evaluation needs at least 6 held-out pictures; there are 3." in capsys.readouterr().err
    assert not (root / "not").exists()


@pytest.mark.wide
def test_the_recipe_that_a_run_writes_repeats_it(trained, root, model_dir, pictures):
    _, again = parse(["train", "--config", str(trained / "recipe.yaml")])
    _, first = parse(["train", *flags(settings(model_dir, pictures, root, **{"training.sample_every": 2}))])
    first = fitted(only(Recipe, first))  # as the run was told of no learning rate, and no resolution
    assert only(Recipe, again) == replace(first, data=replace(first.data, resolution=16))
    main(["train", "--config", str(trained / "recipe.yaml"), "--output", str(root / "again")])
    weights = [(folder / "pytorch_lora_weights.safetensors").read_bytes() for folder in (trained, root / "again")]
    assert weights[0] == weights[1]


@pytest.mark.wide
def test_sample_draws_a_run_beside_its_base(trained, root, capsys):
    prompts = ["red 1", "Two  words!"]
    main(
        [
            "sample",
            "--run",
            str(trained),
            "--compare",
            "--steps",
            "2",
            "--prompts",
            json.dumps(prompts),
            "--output",
            str(root / "samples"),
        ]
    )
    assert "2 pictures" in capsys.readouterr().out
    names = {p.name for p in (root / "samples").iterdir()}
    assert names == {"000-red-1.png", "001-two-words.png", "grid.png", "samples.json"}
    assert Image.open(root / "samples" / "000-red-1.png").size == (16, 16)
    assert json.loads((root / "samples" / "samples.json").read_text())["prompts"] == prompts


@pytest.mark.wide
def test_sample_draws_a_pretrained_model_the_same_for_the_same_seed(root, model_dir):
    words = ["sample", "--model.id", str(model_dir), "--steps", "2", "--prompts", '["red"]', "--output"]
    drawn = []
    for name, seed in (("s1", 3), ("s2", 3), ("s3", 4)):
        main([*words, str(root / name), "--seed", str(seed)])
        drawn.append((root / name / "000-red.png").read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.wide
def test_a_bank_drawn_ahead_is_the_one_that_training_uses(root, model_dir, pictures, capsys):
    for place in ({}, {"bank.path": root / "bank"}):
        name = f"banked-{len(place)}"
        values = settings(model_dir, pictures, root, **place, **{"output": root / name, "training.seed": 5})
        main(["bank", *flags(values)])
        folder = Path(capsys.readouterr().out.removeprefix("done: ").partition(" holds 6 samples of ")[0])
        assert not (root / name).exists()
        before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
        main(["train", *flags(values)])
        assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
        assert json.loads((root / name / "run.json").read_text())["bank"]["folder"] == str(folder)
        capsys.readouterr()


@pytest.mark.wide
def test_all_weights_can_be_tuned_and_sampled(root, model_dir, pictures):
    values = settings(model_dir, pictures, root, method="full", output=root / "full")
    main(["train", *flags(values)])
    assert (root / "full" / "pipeline" / "model_index.json").is_file()
    main(["sample", "--run", str(root / "full"), "--steps", "2", "--prompts", '["red"]', "--output", str(root / "fs")])
    assert (root / "fs" / "000-red.png").is_file()


@pytest.mark.wide
def test_overwrite_replaces_what_a_run_wrote_and_nothing_else(trained, root, model_dir, pictures):
    output = root / "overwritten"
    shutil.copytree(trained, output)
    (output / "notes.txt").write_text("mine")
    (output / "mine").mkdir()
    (output / "mine" / "checkpoint-1.txt").write_text("mine")
    for name in ("step-notes.md", "checkpoint-best.png", "checkpoint-000001"):
        (output / name).write_text("mine")
    (output / "step-000001").mkdir()
    before = load_file(output / "pytorch_lora_weights.safetensors")
    main(["train", *flags(settings(model_dir, pictures, root, output=output, **{"training.seed": 9})), "--overwrite"])
    assert (output / "notes.txt").read_text() == (output / "mine" / "checkpoint-1.txt").read_text() == "mine"
    for name in ("step-notes.md", "checkpoint-best.png", "checkpoint-000001"):
        assert (output / name).read_text() == "mine"
    assert not (output / "samples").exists()
    assert not (output / "step-000001").exists()
    assert json.loads((output / "run.json").read_text())["seed"] == 9
    assert len((output / "metrics.jsonl").read_text().splitlines()) < 6
    after = load_file(output / "pytorch_lora_weights.safetensors")
    assert any(not after[name].equal(before[name]) for name in before)


def test_resuming_a_finished_run_gives_it_back(trained, root, model_dir, pictures, capsys):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    main(["train", "--config", str(trained / "recipe.yaml"), "--training.resume"])
    assert "(complete)" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*")} == before


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, difftuning_control, difftuning_control.cli; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_a_value_of_several_types_is_told_with_all_of_them():
    with pytest.raises(UserError, match=r"expected a finite number or a list: \[a finite number, …\] or null"):
        parse(["train", "--tuning.forgetting_budget", "abc"])
