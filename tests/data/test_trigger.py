"""Words that stand for what is learnt: in captions, and not in what a bank is drawn for."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import yaml
from PIL import Image

from difftuning_control.cli import main
from difftuning_control.data.prepare import prepare_bank
from difftuning_control.data.sources import load_images
from difftuning_control.data.stream import Stream
from difftuning_control.errors import UserError
from difftuning_control.families.fitting import fitted
from difftuning_control.families.loading import load_family
from difftuning_control.recipe.captioning import Captioning
from difftuning_control.recipe.inputs import BankConfig, DataConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.requests import VerifyRequest
from difftuning_control.runs.identity import write_recipe
from difftuning_control.runs.verify import verify
from difftuning_control.training.inputs import prepare_inputs
from difftuning_control.training.setup import build_objective, make_accelerator
from difftuning_control.verbs.parse import parse
from difftuning_control.verbs.train import train
from support.pictures import write_pictures
from support.tiny_models import tiny_dit


@pytest.mark.parametrize(
    ("text", "caption", "without"),
    [
        ("a dog", "zbx style a dog", "a dog"),
        ("a dog, ZBX Style", "a dog, ZBX Style", "a dog,"),
        ("zbx style: a dog", "zbx style: a dog", "a dog"),
        ("xzbx styles", "zbx style xzbx styles", "xzbx styles"),
        ("  ", "zbx style", ""),
        (None, "zbx style", ""),
    ],
)
def test_a_caption_has_the_trigger_once(text, caption, without):
    captioning = Captioning(trigger="zbx style")
    assert captioning.of(text) == caption
    assert captioning.of(caption) == caption
    assert captioning.untriggered(caption) == without


def test_it_stands_before_the_caption_of_pictures_that_have_none():
    both = Captioning("a dog", "zbx")
    assert (both.of(None), both.of_none, Captioning("a dog").of(" "), Captioning().of_none) == (
        "zbx a dog",
        "zbx a dog",
        "a dog",
        None,
    )
    assert Captioning("a dog", None).untriggered("a dog") == "a dog"


@pytest.mark.parametrize(
    ("trigger", "caption", "without"),
    [
        ("猫", "一只猫的照片", "一只 的照片"),
        ("고양이", "고양이는 앉아 있다", "는 앉아 있다"),
        ("🐕", "a dog🐕 on grass", "a dog on grass"),
        ("zbx dog", "a zbx  dog\non grass", "a on grass"),
        ("caf\u00e9", "a cafe\u0301 at night", "a at night"),
        ("[zbx]", "a [zbx] dog", "a dog"),
    ],
)
def test_it_is_found_as_a_reader_finds_it(trigger, caption, without):
    captioning = Captioning(trigger=trigger)
    assert captioning.of(caption) == caption
    assert captioning.untriggered(caption) == without


@pytest.mark.parametrize(
    ("trigger", "caption"),
    [("cafe", "a cafe\u0301"), ("क", "की किताब"), ("zbx", "zbx1"), ("zbx", "a_zbx"), ("dog", "dogs")],
)
def test_a_part_of_another_word_is_not_it(trigger, caption):
    captioning = Captioning(trigger=trigger)
    assert captioning.of(caption) == f"{trigger} {caption}"
    assert captioning.untriggered(caption) == caption


def test_signs_in_it_are_no_pattern():
    assert Captioning(trigger="<s1>.*").of("a dog") == "<s1>.* a dog"
    assert Captioning(trigger="<s1>.*").untriggered("<s1>.* a dog") == "a dog"


@pytest.mark.parametrize(("given", "kept"), [("  zbx \n style ", "zbx style"), ("zbx", "zbx")])
def test_it_is_one_line(given, kept):
    assert DataConfig(trigger=given).trigger == kept


@pytest.mark.parametrize("given", ["", "  "])
def test_an_empty_one_is_refused(given):
    with pytest.raises(UserError, match=r"data\.trigger is empty; expected a word or a few, or null"):
        DataConfig(trigger=given)


def test_pictures_without_a_caption_are_named_by_it_and_counted(tmp_path: Path):
    write_pictures(tmp_path, 3)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "0.txt").write_text("red")
    data = load_images(str(tmp_path), trigger="zbx")
    assert [e.caption for e in data.examples] == ["zbx red", "zbx", "zbx"]
    assert data.notes == [f"2 of 3 pictures of {tmp_path} have no caption, and so 'zbx' alone"]
    assert load_images(str(tmp_path), trigger="zbx", default_caption="blue").notes == []
    with pytest.raises(UserError, match=r"write one, or give one for all with --data\.default_caption or --trigger"):
        load_images(str(tmp_path))


def test_a_stream_has_it_too(tmp_path: Path):
    write_pictures(tmp_path / "set", 3)
    stream = Stream(DataConfig(str(tmp_path / "set"), stream=True, trigger="zbx"), 0, 0)
    captions = stream.captions(3)
    assert all(caption.startswith("zbx ") for caption in captions)
    assert {e.caption for step in range(9) for e in stream.pictures(step, range(1), 1, map)} == set(captions)


@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_name_of_the_column_is_not_taken_for_no_captions(tmp_path: Path, stream: bool):
    write_pictures(tmp_path / "set", 3)
    config = DataConfig(str(tmp_path / "set"), trigger="zbx", caption_column="caption")

    def read() -> list[str]:
        if stream:
            return Stream(replace(config, stream=True), 0, 0).captions(3)
        columns = {"caption_column": "caption", "trigger": "zbx"}
        return [e.caption for e in load_images(config.path, **columns).examples]

    with pytest.raises(UserError, match=r"no column 'caption', only .*text.*; name it with --data\.caption_column"):
        read()
    rows = [json.loads(line) for line in (tmp_path / "set" / "metadata.jsonl").read_text().splitlines()]
    lines = [json.dumps({"file_name": row["file_name"]}) for row in rows]
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(lines))
    assert read() == ["zbx"] * 3


def test_pictures_of_a_stream_that_have_it_alone_are_said(tmp_path: Path):
    write_pictures(tmp_path / "set", 3)
    rows = [json.loads(line) for line in (tmp_path / "set" / "metadata.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | ({"text": {1: "", 2: "zbx"}[i]} if i else {})) for i, row in enumerate(rows)]
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(lines))
    stream = Stream(DataConfig(str(tmp_path / "set"), stream=True, trigger="zbx"), 0, 0)
    for step in range(9):
        stream.pictures(step, range(1), 1, map)
    those = f"of the pictures that were read of {tmp_path / 'set'}"
    assert stream.notes() == [f"1 {those} has no caption, and so 'zbx' alone"]


def test_captions_of_a_shard_may_end_as_kohyas_do(tmp_path: Path):
    write_pictures(tmp_path / "set", 2)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i in range(2):
            (tmp_path / "set" / f"{i}.caption").write_text(f"red {i}")
            (tmp_path / "set" / f"{i}.txt").write_text("")  # hides no caption
            for end in ("png", "txt", "caption"):
                tar.add(tmp_path / "set" / f"{i}.{end}", f"{i}.{end}")
    (tmp_path / "tars").mkdir()
    (tmp_path / "0.tar").rename(tmp_path / "tars" / "0.tar")
    assert Stream(DataConfig(str(tmp_path / "tars"), stream=True), 0, 0).captions(2) == ["red 0", "red 1"]


def test_a_data_set_without_captions_has_it_alone(tmp_path: Path):
    write_pictures(tmp_path / "set", 3)
    (tmp_path / "set" / "metadata.jsonl").unlink()
    paths = [str(tmp_path / "set" / f"{i}.png") for i in range(3)]
    pictures = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    pictures.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="no column 'text', only image"):
        load_images(str(tmp_path / "saved"))
    assert [e.caption for e in load_images(str(tmp_path / "saved"), trigger="zbx").examples] == ["zbx"] * 3
    pictures.add_column("caption", ["red"] * 3).save_to_disk(str(tmp_path / "named"))
    with pytest.raises(UserError, match="no column 'text', only image, caption"):
        load_images(str(tmp_path / "named"), trigger="zbx")


def test_a_bank_is_drawn_for_the_captions_without_it(tmp_path: Path):
    family = load_family("embedded")
    data = DataConfig(cache=str(tmp_path), trigger="zbx")
    captions = ["zbx dog", "zbx", "a zbx cat"]
    bank = prepare_bank(family, BankConfig(3, steps=1), data, captions, 64, size=3)
    assert bank.prompts == ["dog", "", "a cat"]
    plain = prepare_bank(family, BankConfig(3, steps=1), replace(data, trigger=None), ["dog", "", "a cat"], 64, size=3)
    assert plain.folder == bank.folder  # so it is drawn once for both


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trigger")
    write_pictures(folder / "mine", 6)
    (folder / "mine" / "metadata.jsonl").unlink()
    words = ["train", str(folder / "mine"), "--trigger=zbx", "--steps=2", "--batch=2", f"--out={folder / 'run'}"]
    words += [f"--data.cache={folder / 'cache'}", "--bank.size=6", "--bank.steps=1", "--training.sample_steps=1"]
    main(words)
    return folder / "run"


def test_a_run_on_pictures_without_captions(run: Path):
    record = json.loads((run / "run.json").read_text())
    assert record["recipe"]["data"]["trigger"] == "zbx"
    card = (run / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["instance_prompt"] == "zbx"
    assert "Say **zbx** in a prompt." in card
    assert verify(VerifyRequest(str(run)))["status"] == "same"


def test_sampling_says_that_a_prompt_lacks_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["sample", str(run), "red", "a zbx ball ", "--steps=1", f"--out={tmp_path / 'drawn'}"])
    assert "note: this run learnt 'zbx', which 'red' does not say" in " ".join(capsys.readouterr().out.split())
    main(["sample", "--model=embedded", "--prompts", '[" red", ""]', "--steps=1", f"--out={tmp_path / 'base'}"])
    assert "does not say" not in capsys.readouterr().out


def test_pictures_without_captions_that_a_run_is_judged_on_get_it_too(run: Path, tmp_path: Path):
    write_pictures(tmp_path / "other", 7)
    (tmp_path / "other" / "metadata.jsonl").unlink()
    for i, path in enumerate(sorted((tmp_path / "other").glob("*.png"))):  # none that were tuned on
        Image.new("RGB", (64, 64), (20 * i, 0, 99)).save(path)
    words = ["evaluate", "--runs", json.dumps([str(run)]), f"--data={tmp_path / 'other'}", "--pictures=6", "--steps=1"]
    main([*words, f"--out={tmp_path / 'judged'}"])
    assert json.loads((tmp_path / "judged" / "evaluation.json").read_text())["status"] == "complete"


def test_retention_on_the_pictures_own_prompts_leaves_it_out(tmp_path: Path):
    write_pictures(tmp_path / "mine", 6)
    tuning = {"retention": "teacher", "retention_rows": "pictures", "retention_prompts": "own", "retention_ratio": 0.5}
    recipe = Recipe.from_dict({"data": {"path": str(tmp_path / "mine"), "trigger": "zbx"}, "tuning": tuning})
    recipe = replace(recipe, data=replace(recipe.data, cache=str(tmp_path / "cache")))
    recipe = fitted(replace(recipe, training=replace(recipe.training, max_steps=1)))
    family = load_family("embedded")
    objective = build_objective(recipe, family.process)
    inputs = prepare_inputs(recipe, family, objective, make_accelerator(recipe))
    assert inputs.targets.captions == [f"zbx {caption}" for caption in inputs.targets.retained_captions]
    assert {*inputs.targets.captions, *inputs.targets.retained_captions} <= set(inputs.embeddings.index)


@pytest.mark.parametrize("text", ["1e3", "-2E5", "3", "true", "1_0e2", "a: b #c", "'q'"])
def test_text_that_looks_like_something_else_is_read_back_from_a_runs_recipe(tmp_path: Path, text: str):
    write_recipe(tmp_path, Recipe(data=DataConfig("mine", trigger=text)))
    assert parse(["train", "--config", str(tmp_path / "recipe.yaml")])[1].data.trigger == text


def test_a_model_that_is_told_classes_has_no_use_for_it(pictures: Path, tmp_path: Path):
    tiny_dit().save_pretrained(tmp_path / "dit")
    recipe = Recipe.from_dict({"model": {"id": str(tmp_path / "dit")}, "data": {"path": str(pictures)}})
    recipe = replace(recipe, data=replace(recipe.data, trigger="zbx"), output=str(tmp_path / "o"))
    with pytest.raises(UserError, match=r"data\.trigger is given, but this model is told classes and no prompts"):
        train(recipe)
    assert not (tmp_path / "o").exists()


def test_its_short_name_is_for_verbs_that_read_pictures():
    for verb in ("train", "bank", "pilot"):
        assert parse([verb, "mine", "--trigger", "zbx"])[1].data.trigger == "zbx"
