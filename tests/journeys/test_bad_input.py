"""Each mistake is one clear sentence and exit code 2; nothing is written in the output, and nothing is lost."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from difftuning_control.cli import main
from difftuning_control.data.bank import BankRequest, KnowledgeBank
from difftuning_control.data.sources import load_images
from difftuning_control.families.loading import family_of
from difftuning_control.runs.folder import OutputFolder
from difftuning_control.training import preparation
from difftuning_control.verbs.commands import COMMANDS
from support.command_line import flags, settings
from support.pictures import captioned_by_text_files, rewrite_metadata, write_pictures
from support.refusals import assert_refused, refusal, snapshot
from support.tiny_sd import tiny_pipeline

Maker = Callable[..., list[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "data", count=8)


@pytest.fixture
def train(tmp_path: Path, model_dir: Path, folder: Path) -> Maker:
    """The words of a training that would succeed: `train(**{"data.path": …})`."""
    return lambda **changes: ["train", *flags(settings(model_dir, folder, tmp_path, **changes))]


def test_the_undisturbed_command_succeeds(train, tmp_path):
    main(train())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "complete"


# --- pictures and captions ------------------------------------------------------------------------------------------


def row_named(folder: Path, name: str) -> None:
    rewrite_metadata(folder, lambda rows: rows[3].update(file_name=name))


def cut(kind: str, share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "3.png"
        Image.effect_noise((40, 40), 80).save(path, kind)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return damage


def animated(folder: Path) -> None:
    frames = [Image.effect_noise((16, 16), 50) for _ in range(3)]
    frames[0].save(folder / "3.png", "GIF", save_all=True, append_images=frames[1:])


def foreign_picture(folder: Path) -> Path:
    """A picture beside the folder, not in it."""
    path = folder.parent / "private.png"
    Image.new("RGB", (16, 16), "blue").save(path)
    return path


def linked(folder: Path) -> None:
    target = foreign_picture(folder)
    (folder / "3.png").unlink()
    (folder / "3.png").symlink_to(target)


def linked_without_metadata(folder: Path) -> None:
    captioned_by_text_files(folder)
    linked(folder)


def linked_caption(folder: Path) -> None:
    captioned_by_text_files(folder)
    (folder.parent / "private.txt").write_text("secret")
    (folder / "3.txt").unlink()
    (folder / "3.txt").symlink_to("../private.txt")


def linked_folder(folder: Path) -> None:
    captioned_by_text_files(folder)
    shutil.copytree(folder, folder.parent / "more")
    (folder / "3.png").unlink()
    (folder / "3.png").symlink_to(folder.parent / "more")


def dangling(folder: Path) -> None:
    captioned_by_text_files(folder)
    (folder / "3.png").unlink()
    (folder / "3.png").symlink_to("nowhere.png")


def caption_not_utf8(folder: Path) -> None:
    captioned_by_text_files(folder)
    (folder / "3.txt").write_bytes("grün".encode("latin-1"))


def caption_gone(folder: Path) -> None:
    captioned_by_text_files(folder)
    (folder / "3.txt").unlink()


def caption_blank(folder: Path) -> None:
    captioned_by_text_files(folder)
    (folder / "3.txt").write_text(" \n")


BAD_PICTURES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated png": (cut("PNG", 0.5), "is damaged"),
    "png cut at its head": (cut("PNG", 0.02), "is not a picture that can be read"),
    "truncated jpeg": (cut("JPEG", 0.6), "is damaged"),
    "zero bytes": (lambda f: (f / "3.png").write_bytes(b""), "is empty (0 bytes)"),
    "text file": (lambda f: (f / "3.png").write_text("not a picture"), "is not a picture that can be read"),
    "animated": (animated, "is animated (3 frames)"),
    "caption null": (lambda f: rewrite_metadata(f, lambda r: r[3].update(text=None)), "has no caption"),
    "caption left out": (lambda f: rewrite_metadata(f, lambda r: r[3].pop("text")), "has no caption"),
    "caption empty": (lambda f: rewrite_metadata(f, lambda r: r[3].update(text="  ")), "has no caption"),
    "caption a list": (lambda f: rewrite_metadata(f, lambda r: r[3].update(text=["a"])), "has a list for a caption"),
    "caption file gone": (caption_gone, "has no caption"),
    "caption file empty": (caption_blank, "has no caption"),
    "caption file not UTF-8": (caption_not_utf8, "has a caption, 3.txt, that is not UTF-8 text; save it as UTF-8"),
    "gone": (lambda f: (f / "3.png").unlink(), "is named by metadata.jsonl but does not exist"),
    "a link to outside": (linked, "is named by metadata.jsonl but lies outside the folder"),
    "a link to outside without metadata": (linked_without_metadata, "leads outside the folder"),
    "a caption linked to outside": (linked_caption, "leads outside the folder"),
    "a linked folder": (linked_folder, "leads outside the folder"),
    "a dangling link": (dangling, "cannot be read (No such file or directory)"),
}


@pytest.mark.sample("truncated jpeg")
@pytest.mark.parametrize("case", BAD_PICTURES)
def test_a_picture_that_cannot_be_used_is_named_with_its_fault(train, folder, tmp_path, capsys, case):
    spoil, fault = BAD_PICTURES[case]
    spoil(folder)
    assert_refused(train(), capsys, tmp_path, f"3.png in {folder} {fault}", "leave such files out: --data.skip_bad")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_skip_bad_leaves_such_a_picture_out_and_names_it(folder, case):
    spoil, fault = BAD_PICTURES[case]
    spoil(folder)
    data = load_images(str(folder), skip_bad=True)
    assert [e.name for e in data.examples] == [f"{i}.png" for i in range(8) if i != 3]
    assert list(data.skipped) == ["3.png"]
    assert fault in data.skipped["3.png"]


@pytest.mark.sample("deep/../../private.png")
@pytest.mark.parametrize("name", ["../private.png", "deep/../../private.png", "absolute"])
def test_metadata_that_name_a_picture_outside_are_refused(train, folder, tmp_path, capsys, name):
    target = foreign_picture(folder)
    name = str(target) if name == "absolute" else name
    row_named(folder, name)
    assert_refused(train(), capsys, tmp_path, f"{name} in {folder} is named by metadata.jsonl but lies outside the fol")
    assert list(load_images(str(folder), skip_bad=True).skipped) == [name]


@pytest.mark.wide
def test_with_skip_bad_a_run_trains_on_the_rest_and_records_what_it_left_out(train, folder, tmp_path):
    (folder / "3.png").write_bytes(b"")
    (folder / "5.png").unlink()
    main([*train(), "--data.skip_bad"])
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    faults = {"3.png": "is empty (0 bytes)", "5.png": "is named by metadata.jsonl but does not exist"}
    assert (run["status"], run["data"]["skipped"]) == ("complete", faults)
    assert run["data"]["pictures"] + run["data"]["held_out"] == 6


def test_several_faults_are_counted_in_one_sentence(train, folder, tmp_path, capsys):
    for i in (1, 4, 6):
        (folder / f"{i}.png").write_bytes(b"")
    assert_refused(train(), capsys, tmp_path, "1.png", "and 2 more files with a problem")


def not_text(folder: Path) -> None:
    (folder / "metadata.jsonl").write_bytes('{"file_name": "0.png", "text": "grün"}'.encode("latin-1"))


def csv_without_names(folder: Path) -> None:
    (folder / "metadata.jsonl").unlink()
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "text"), ("0.png", "red")])


def metadata_linked(folder: Path) -> None:
    shutil.move(folder / "metadata.jsonl", folder.parent / "private.jsonl")
    (folder / "metadata.jsonl").symlink_to("../private.jsonl")


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing": (shutil.rmtree, ("does not exist; give a folder of pictures",)),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("x")), ("is a file; expected a folder of pictures",)),
    "empty": (lambda f: (shutil.rmtree(f), f.mkdir()), ("has no usable picture, but nothing; expected", ".png")),
    "non-images only": (
        lambda f: (shutil.rmtree(f), f.mkdir(), (f / "a.md").write_text("x"), (f / "b.pdf").write_text("x")),
        ("has no usable picture, but 2 other files; expected", ".jpg"),
    ),
    "metadata not UTF-8": (not_text, ("metadata.jsonl is not UTF-8 text; save it as UTF-8",)),
    "metadata broken": (
        lambda f: (f / "metadata.jsonl").write_text('{"file_name": "0.png",'),
        ("metadata.jsonl cannot be read", "expected one JSON object a line"),
    ),
    "metadata empty": (lambda f: (f / "metadata.jsonl").write_text("\n"), ("file_name in every row", "columns none")),
    "metadata of numbers": (lambda f: (f / "metadata.jsonl").write_text("5\n"), ("needs a file_name in every row",)),
    "metadata without file_name": (
        lambda f: rewrite_metadata(f, lambda rows: [r.pop("file_name") for r in rows]),
        ("metadata.jsonl needs a file_name in every row; found the columns text",),
    ),
    "csv without file_name": (csv_without_names, ("metadata.csv needs a file_name", "found the columns image, text")),
    "one row without file_name": (
        lambda f: rewrite_metadata(f, lambda rows: rows[3].pop("file_name")),
        ("metadata.jsonl needs a file_name in every row",),
    ),
    "caption column missing": (
        lambda f: rewrite_metadata(f, lambda rows: [r.update(title=r.pop("text")) for r in rows]),
        ("has no column 'text', only file_name, title; name it with --data.caption_column",),
    ),
    "two kinds of metadata": (
        lambda f: (f / "metadata.csv").write_text("file_name,text\n"),
        ("has both metadata.jsonl and metadata.csv; keep one",),
    ),
    "metadata linked to outside": (metadata_linked, ("metadata.jsonl leads outside the folder, to", "copy it into")),
}


@pytest.mark.sample("metadata linked to outside", "a file")
@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_that_cannot_serve_is_refused(train, folder, tmp_path, capsys, case):
    spoil, words = BAD_FOLDERS[case]
    spoil(folder)
    assert_refused(train(), capsys, tmp_path, str(folder), *words)


def test_a_folder_with_unusable_pictures_alone_is_refused_even_with_skip_bad(train, folder, tmp_path, capsys):
    for path in folder.glob("*.png"):
        path.write_bytes(b"")
    assert_refused([*train(), "--data.skip_bad"], capsys, tmp_path, "no usable picture (8 skipped as unusable)")


@pytest.mark.sample("no_such_pictures")
@pytest.mark.parametrize("name", ["no_such_pictures", "nobody/no_such_set"])
def test_a_name_that_is_neither_a_folder_nor_a_data_set_at_hand_is_refused(train, tmp_path, capsys, name):
    words = train(**{"data.path": name})
    assert_refused(words, capsys, tmp_path, f"{name} is no folder here and cannot be loaded as a data set")


def test_a_caption_that_is_too_long_is_refused_unless_it_may_be_cut(train, folder, tmp_path, capsys):
    rewrite_metadata(folder, lambda rows: rows[3].update(text="red " * 30))
    assert_refused(
        train(),
        capsys,
        tmp_path,
        "the caption of 3.png has 32 tokens, the text encoder takes 16",
        "shorten it",
        "--data.truncate_captions true",
    )
    assert_refused(["bank", *train()[1:]], capsys, tmp_path, "the caption of 3.png has 32 tokens")
    main([*train(), "--data.truncate_captions", "true"])
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()


# --- models ---------------------------------------------------------------------------------------------------------


def index_says(name: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / "model_index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": name}))

    return change


def pickled(model: Path) -> None:
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()


BAD_MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no directory": (shutil.rmtree, ("does not exist; give a diffusers directory, a Hub id or `embedded`",)),
    "a file": (lambda m: (shutil.rmtree(m), m.write_text("x")), ("is a file; expected a diffusers directory",)),
    "no index": (lambda m: (m / "model_index.json").unlink(), ("has no model_index.json; expected a saved diffusers",)),
    "a broken index": (lambda m: (m / "model_index.json").write_text("{"), ("could not be loaded", "expected `embe")),
    "another class": (
        index_says("KandinskyPipeline"),
        ("is a KandinskyPipeline, which cannot be tuned yet; supported: StableDiffusionPipeline",),
    ),
    "a custom class": (index_says(["mine", "MyPipeline"]), ("is a MyPipeline, which cannot be tuned yet",)),
    "a part missing": (lambda m: shutil.rmtree(m / "unet"), ("could not be loaded", "safetensors weights")),
    "damaged weights": (
        lambda m: (m / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 100),
        ("could not be loaded",),
    ),
    "pickled weights": (pickled, ("as a pickle (diffusion_pytorch_model.bin)", "is never loaded", "convert it: ")),
}


@pytest.mark.sample("another class")
@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_directory_that_is_no_supported_model_is_refused(train, model_dir, tmp_path, capsys, case):
    spoil, words = BAD_MODELS[case]
    model = Path(shutil.copytree(model_dir, tmp_path / "model"))
    spoil(model)
    assert_refused(train(**{"model.id": model}), capsys, tmp_path, str(model), *words)


@pytest.mark.sample("sample-no-such-model")
@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model"])
@pytest.mark.parametrize("verb", ["train", "bank", "sample"])
def test_a_model_that_cannot_be_downloaded_is_refused(train, tmp_path, capsys, name, verb):
    words = train(**{"model.id": name})[1:]
    if verb == "sample":
        words = ["--model.id", name, "--prompts", '["red"]', "--output", str(tmp_path / "run")]
    assert_refused(
        [verb, *words],
        capsys,
        tmp_path,
        f"the model {name} is no directory here and could not be downloaded",
        "a Hub id that this machine can reach",
    )


def test_a_resolution_that_the_model_cannot_take_is_refused(train, tmp_path, capsys):
    words = train(**{"data.resolution": 18})
    assert_refused(words, capsys, tmp_path, "data.resolution is 18; this model takes multiples of", "its own is 16")


# --- outputs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, pictures: Path) -> Path:
    root = tmp_path_factory.mktemp("finished")
    main(["train", *flags(settings(model_dir, pictures, root))])
    return root / "run"


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """A finished run at the output of `train`."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def mark_running(output: Path) -> None:
    record = json.loads((output / "run.json").read_text()) | {"status": "running"}
    (output / "run.json").write_text(json.dumps(record))


def test_an_output_that_holds_a_run_is_refused_without_overwrite(train, output, tmp_path, capsys):
    assert_refused(train(), capsys, tmp_path, f"{output} already holds a run (complete)", "--overwrite", "another fold")


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--training.resume", "true"]])
def test_an_output_that_holds_something_else_is_refused_always(train, tmp_path, capsys, more):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    assert_refused([*train(), *more], capsys, tmp_path, "is not empty and holds no run; choose another folder")


def test_an_output_that_is_a_file_is_refused(train, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert_refused(
        train(), capsys, tmp_path, f"the output {tmp_path / 'run'} is a file or lies below one; name a folder"
    )


@pytest.mark.parametrize("more", [["--overwrite"], ["--training.resume"]])
def test_an_output_in_use_is_refused(train, output, pictures, tmp_path, capsys, more):
    mark_running(output)
    held = OutputFolder(output, resume=True, overwrite=True)
    try:
        shown = refusal([*train(**{"data.path": pictures}), *more], capsys, tmp_path)
    finally:
        held.release()
    assert shown == f"the output {output} is in use by another run; wait for it, or choose another folder."


def test_an_output_in_use_from_its_first_moment_is_refused(train, tmp_path, capsys):
    held = OutputFolder(tmp_path / "run", resume=False, overwrite=False)
    try:
        assert_refused(train(), capsys, tmp_path, "is in use by another run")
    finally:
        held.release()


@pytest.mark.sample("output")
@pytest.mark.parametrize("key", ["output", "data.cache", "bank.path"])
def test_a_place_below_a_file_is_refused(train, tmp_path, capsys, key):
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in refusal(train(**{key: tmp_path / "file" / "below"}), capsys, tmp_path)


@pytest.mark.parametrize(("key", "expected"), [("data.cache", "a folder"), ("bank.path", "a folder of a bank or of p")])
def test_a_file_in_place_of_a_folder_is_refused(train, tmp_path, capsys, key, expected):
    (tmp_path / "file").write_text("mine")
    words = train(**{key: tmp_path / "file"})
    assert_refused(words, capsys, tmp_path, f"{key} is {tmp_path / 'file'}, a file; expected {expected}")


def test_a_run_with_another_recipe_is_not_resumed(train, output, tmp_path, capsys):
    words = [*train(**{"adapter.rank": 2}), "--training.resume"]
    assert_refused(words, capsys, tmp_path, f"the run in {output} had another recipe", "--overwrite")


def test_a_bank_that_training_would_not_read_is_not_drawn(train, tmp_path, capsys):
    words = ["bank", *train(**{"tuning.retention_ratio": 0, "tuning.retention_weight": 0})[1:]]
    assert_refused(words, capsys, tmp_path, "training by this recipe reads no bank", "give --bank.path")


def test_what_may_not_change_is_said_before_a_bank_is_drawn(train, output, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preparation, "prepare_inputs", lambda *args: pytest.fail("drawn for nothing"))
    words = [*train(**{"bank.steps": 3}), "--training.resume"]
    assert_refused(words, capsys, tmp_path, "bank.steps was 2 and is 3; only training.max_steps", "--overwrite")


SAMPLE = ["sample", "--prompts", '["red"]', "--steps", "2"]


def test_sampling_refuses_a_run_that_is_missing_or_unfinished(output, tmp_path, capsys):
    words = [*SAMPLE, "--output", str(tmp_path / "samples"), "--run"]
    assert_refused([*words, str(tmp_path)], capsys, tmp_path, "holds no run", "give the output folder of difftune")
    mark_running(output)
    assert_refused([*words, str(output)], capsys, tmp_path, "is running, not complete; go on with difftune resume")


def test_sampling_into_the_current_folder_goes_beside_it_where_it_holds_something(output, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    main([*SAMPLE, "--run", str(output), "--output", "."])
    assert [p.name for p in Path().iterdir()] == ["mine.txt"]
    assert (tmp_path / "here-2" / "samples.json").is_file()


def test_sampling_keeps_what_its_output_holds(output):
    def kept() -> dict[str, bytes | str | None]:
        return {name: content for name, content in snapshot(output).items() if name != "audit.jsonl"}

    before = kept()
    main([*SAMPLE, "--run", str(output), "--output", str(output)])
    assert kept() == before
    assert (output.with_name(f"{output.name}-2") / "samples.json").is_file()


# --- banks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bank(train: Maker, tmp_path: Path, folder: Path) -> Path:
    main(["bank", *train(**{"bank.path": tmp_path / "bank"})[1:]])
    return tmp_path / "bank"


def of_another_base(bank: Path) -> None:
    shutil.rmtree(bank)
    KnowledgeBank.build(family_of(tiny_pipeline(seed=1)), bank, BankRequest(size=6, steps=2, resolution=16))


def flipped(bank: Path) -> None:
    shard = bank / "bank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-6] ^= 1
    shard.write_bytes(content)


def something_else(bank: Path) -> None:
    shutil.rmtree(bank)
    bank.mkdir()
    (bank / "notes.md").write_text("mine")


BAD_BANKS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "another base": (of_another_base, ("was drawn from another base (its denoiser", "build a bank of this base")),
    "a damaged shard": (flipped, ("bank-00000.safetensors is damaged; delete the bank", "build it again")),
    "a missing shard": (lambda b: (b / "bank-00000.safetensors").unlink(), ("bank-00000.safetensors is missing",)),
    "another folder": (something_else, ("has no usable picture, but 1 other files",)),
}


@pytest.mark.sample("another base")
@pytest.mark.parametrize("case", BAD_BANKS)
def test_a_bank_that_does_not_fit_is_refused_and_kept(train, bank, tmp_path, capsys, case):
    spoil, words = BAD_BANKS[case]
    spoil(bank)
    assert_refused(train(**{"bank.path": bank}), capsys, tmp_path, str(bank), *words)


@pytest.mark.sample("bank.steps-3")
@pytest.mark.parametrize(("key", "value"), [("bank.size", 7), ("bank.steps", 3), ("bank.seed", 4)])
def test_a_bank_drawn_with_other_settings_is_refused_and_kept(train, bank, tmp_path, capsys, key, value):
    words = train(**{"bank.path": bank, key: value})
    assert_refused(words, capsys, tmp_path, f"holds a bank with another {key.split('.')[1]}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "expected captions, empty, general, or a text file with one prompt a line"),
        (b"\n \n", "has no prompt; write one a line"),
        (b"gr\xfcn", "is not UTF-8 text; save it as UTF-8"),
    ],
)
def test_a_prompt_file_that_cannot_serve_is_refused(train, tmp_path, capsys, content, expected):
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    assert_refused(train(**{"bank.prompts": tmp_path / "prompts.txt"}), capsys, tmp_path, "prompts.txt", expected)


# --- the command line and recipes -----------------------------------------------------------------------------------


@pytest.mark.sample("bank --bank.stpes 3-")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], "there is no verb 'trian'; did you mean train?"),
        (["frobnicate"], f"expected one of {', '.join(sorted(COMMANDS))}."),
        (["train", "stray"], "stray"),
        (["train", "--training.max_step", "3"], "--training.max_step; did you mean --training.max_steps (--steps)?"),
        (["train", "--data.max_steps", "3"], "--data.max_steps; did you mean --training.max_steps (--steps)?"),
        (["train", "--training.rank", "3"], "no option --training.rank; did you mean --adapter.rank (--rank)?"),
        (["train", "--rnk=3"], "no option --rnk; did you mean --adapter.rank (--rank)?"),
        (["train", "--batch_size", "3"], "did you mean --bank.batch_size or --training.batch_size (--batch)?"),
        (["train", "--qqq", "3"], "there is no option --qqq; expected one of adapter, "),
        (["train", "--data", "{pth: x}"], "--data has an unknown key data.pth; did you mean data.path?"),
        (["train", "--model", "embedded"], "train is told of no data; give the folder: difftune train PICTURES"),
        (["train", "--training.max_steps"], "--training.max_steps"),
        (["train", "--training.max_steps", "1.5"], "training.max_steps is 1.5; expected a whole number."),
        (["train", "--training.max_steps", "many"], "training.max_steps is many; expected a whole number."),
        (["train", "--training.max_steps", ""], "training.max_steps is empty; expected a whole number."),
        (["train", "--training.learning_rate", "fast"], "training.learning_rate is fast; expected a finite number."),
        (["train", "--data.flip=maybe"], "data.flip is maybe; expected true or false."),
        (["train", "--data.resolution", "x"], "data.resolution is x; expected a whole number or null."),
        (["train", "--method", "dora"], 'method is dora; expected one of "lora", "full", "controlnet".'),
        (["train", "--training.trackers", "tensorboard"], "training.trackers is tensorboard; expected a list"),
        (["train", "--training.trackers", "[mlflow]"], 'expected a list: [one of "tensorboard", "wandb", …]'),
        (["train", "--training.max_steps", "0"], "training.max_steps is 0; expected at least 1."),
        (["train", "--training.learning_rate", "-1"], "training.learning_rate is -1.0; expected a finite number abov"),
        (["train", "--training.seed", "-1"], "training.seed is -1; expected 0 to"),
        (["train", "--data.holdout", "1"], "data.holdout is 1.0; expected at least 0 and less than 1."),
        (["train", "--data.resolution", "4"], "data.resolution is 4; expected at least 8 pixels."),
        (["train", "--tuning.retention_ratio", "1.5"], "tuning.retention_ratio is 1.5; expected"),
        (["train", "--tuning.retention_weight", "0"], "set both to 0 for plain fine-tuning, or both above 0."),
        (["train", "--tuning.schedule.tau", "-1"], "tuning.schedule: tau is -1.0"),
        (
            ["train", "--tuning.schedule.xi", "1"],
            "xi is given, but a power schedule uses only tau, retention_tau and psi.",
        ),
        (["train", "--bank.size", "0"], "bank.size is 0; expected at least 1."),
        (["train", "--adapter.rank", "0"], "adapter.rank is 0; expected at least 1."),
        (["bank", "--bank.stpes", "3"], "no option --bank.stpes; did you mean --bank.steps?"),
        (["sample"], "there is no prompt; give one: difftune sample RUN"),
        (["sample", "--prompts", "red"], "prompts is red; expected a list: [text, …]."),
        ([*SAMPLE, "--run", "x", "--model.id", "y"], "give --run or --model.id, not both"),
        ([*SAMPLE, "--compare"], "--compare needs --run"),
        ([*SAMPLE, "--resolution", "4"], "resolution is 4; expected at least 8 pixels."),
        ([*SAMPLE, "--guidance_scale", "-1"], "guidance_scale is -1.0; expected at least 0."),
        ([*SAMPLE, "--seed", "-1"], "seed is -1; expected 0 to"),
        ([*SAMPLE, "--steps", "0"], "steps is 0; expected at least 1."),
        (["demo", "--steps", "0"], "steps is 0; expected at least 1."),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_command_that_cannot_be_meant_is_refused(tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    assert_refused(words, capsys, tmp_path, expected)


BAD_RECIPES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "cannot be read; name a YAML file."),
    "empty": (b"# nothing\n", "holds nothing; expected keys and values."),
    "a list": (b"- method: lora\n", "holds a list; expected keys and values."),
    "a text": (b"lora\n", "holds a str; expected keys and values."),
    "not YAML": (b"training: {max_steps: 7\n\n", "is not valid YAML:"),
    "tabs": (b"training:\n\tmax_steps: 7\n", "is not valid YAML: found character '\\t' that cannot start any token"),
    "objects": (b"output: !!python/object/apply:os.getcwd []\n", "is not valid YAML: could not determine"),
    "not UTF-8": (b"output: gr\xfcn\n", "is not UTF-8 text; save it as UTF-8."),
    "unknown key": (b"traning: {max_steps: 7}\n", "has an unknown key traning; did you mean training?"),
    "unknown leaf": (b"training: {max_step: 7}\n", "unknown key training.max_step; did you mean training.max_steps?"),
    "wrong section": (b"data: {rank: 7}\n", "has an unknown key data.rank; did you mean adapter.rank?"),
    "deep": (b"tuning: {schedule: {kid: paper}}\n", "tuning.schedule.kid; did you mean tuning.schedule.kind?"),
    "no section": (b"model: embedded\n", "model is embedded in the recipe"),
    "section left empty": (b"bank:\n", "bank is empty in the recipe"),
    "section a list": (b"training: [1]\n", "training is [1] in the recipe"),
    "value left empty": (b"bank: {prompts: }\n", "bank.prompts is empty in the recipe"),
    "wrong type": (b"training: {max_steps: seven}\n", "training.max_steps is seven; expected a whole number."),
    "yes for no": (b"training: {mixed_precision: no}\n", 'is False; expected one of "no", "fp16", "bf16".'),
    "out of range": (b"training: {max_steps: 0}\n", "training.max_steps is 0; expected at least 1."),
}


@pytest.mark.sample("wrong type")
@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_recipe_that_cannot_be_meant_is_refused(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    content, expected = BAD_RECIPES[case]
    if content is not None:
        Path("recipe.yaml").write_bytes(content)
    assert_refused(["train", "--config", "recipe.yaml"], capsys, tmp_path, expected)


def test_a_recipe_may_not_be_left_out_after_its_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (["--config"], ["--config", "--overwrite"]):
        assert_refused(["train", *words], capsys, tmp_path, "the recipe (no name given) cannot be read")


@pytest.mark.wide
def test_the_command_itself_prints_one_line_and_leaves_with_two(train, folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"limit": 4}}))
    (folder / "3.png").unlink()
    words = [sys.executable, "-m", "difftuning_control.cli", *train(), "--config", str(recipe)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert [line.partition(" ")[0] for line in done.stdout.splitlines()] == ["looking", "not", "loading", "reading"]
    assert done.stderr.startswith(f"difftune: 3.png in {folder} is named by metadata.jsonl but does not exist")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
