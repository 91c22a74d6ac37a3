"""Words that stand for what is learnt: in captions, and not in what a bank is drawn for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from difftuning_control.cli import main
from difftuning_control.data.prepare import prepare_bank
from difftuning_control.data.sources import load_images
from difftuning_control.data.stream import Stream
from difftuning_control.errors import UserError
from difftuning_control.families.loading import load_family
from difftuning_control.recipe.captioning import Captioning
from difftuning_control.recipe.inputs import BankConfig, DataConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.requests import VerifyRequest
from difftuning_control.runs.verify import verify
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
    words += [f"--data.cache={folder / 'cache'}", "--bank.size=4", "--bank.steps=1", "--training.sample_steps=1"]
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
    main(["sample", str(run), "red", "a zbx ball", "--steps=1", f"--out={tmp_path / 'drawn'}"])
    assert "note: this run learnt 'zbx', which 'red' does not say" in " ".join(capsys.readouterr().out.split())


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
