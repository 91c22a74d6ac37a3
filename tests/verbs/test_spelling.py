"""The natural commands: pictures, run and prompts as words, short names beside dotted keys, and fitting suggestions."""

import pytest

from difftuning_control import __version__
from difftuning_control.cli import main
from difftuning_control.errors import UserError
from difftuning_control.recipe.recipe import FITTED
from difftuning_control.verbs.parse import parse
from difftuning_control.verbs.spelling import SECTIONS, SHORT


def test_short_names_mean_the_dotted_keys():
    values = {"lr": "1e-4", "steps": "7", "batch": "6", "rank": "3", "out": "there", "model": "org/model"}
    words = ["train", "pics", *(word for name, value in values.items() for word in (f"--{name}", value))]
    keys = SHORT["train"] | {"model": SECTIONS["model"]}
    dotted = ["train", "--data.path=pics", *(f"--{keys[name]}={value}" for name, value in values.items())]
    short, long = parse(words)[1], parse(dotted)[1]
    assert short == long
    assert (short.model.id, short.data.path, short.training.learning_rate) == ("org/model", "pics", 1e-4)
    assert short.left_open == long.left_open
    named = {"training.learning_rate", "training.max_steps", "training.batch_size"}
    assert set(FITTED) - set(short.left_open) == named


def test_a_section_can_still_be_given_whole():
    command = parse(["train", "pics", "--model", "{id: org/model, variant: fp16}"])[1]
    assert (command.model.id, command.model.variant) == ("org/model", "fp16")


@pytest.mark.parametrize(
    "words",
    [
        ["--lr", "1e-3", "--training.learning_rate", "1e-4"],
        ["--steps=3", "--training.max_steps=4"],
        ["--model", "a/b", "--model.id", "c/d"],
    ],
    ids=" ".join,
)
def test_two_spellings_with_two_values_are_a_mistake(words):
    with pytest.raises(UserError, match="which are one setting; give one of them"):
        parse(["train", "pics", *words])


def test_two_spellings_of_one_value_are_none():
    assert parse(["train", "p", "--lr", "1e-4", "--training.learning_rate", "0.0001"])[1].training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "b"], "train takes one folder of pictures, and 2 are named: a, b; name one"),
        (["a", "--data.path", "b"], "data.path is given twice"),
    ],
    ids=["two words", "word and key"],
)
def test_pictures_are_named_once(words, said):
    with pytest.raises(UserError, match=said):
        parse(["train", *words])


def test_sample_takes_a_run_and_prompts_as_words():
    command = parse(["sample", "runs/mine", "--compare", "a red apple", "a dog", "--seed", "3"])[1]
    assert (command.run, command.prompts) == ("runs/mine", ["a red apple", "a dog"])
    assert (command.compare, command.seed) == (True, 3)
    alone = parse(["sample", "--model", "embedded", "a red apple"])[1]
    assert (alone.run, alone.prompts, alone.model.id) == (None, ["a red apple"], "embedded")
    assert parse(["sample", "r", "--compare", "3 apples"])[1].prompts == ["3 apples"]
    keyed = parse(["sample", "--run", "r", "one", "two"])[1]
    assert (keyed.run, keyed.prompts) == ("r", ["one", "two"])


def test_a_prompt_is_text_whatever_it_looks_like():
    assert parse(["sample", "r", "7", "null", "[a]", 'say "hi"'])[1].prompts == ["7", "null", "[a]", 'say "hi"']


def test_prompts_come_in_one_way():
    with pytest.raises(UserError, match="both as words and with --prompts"):
        parse(["sample", "r", "one", "--prompts", '["two"]'])


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--learning-rate", "--training.learning_rate (--lr)"),
        ("--learning_rate", "--training.learning_rate (--lr)"),
        ("--max_train_steps", "--training.max_steps (--steps)"),
        ("--train_batch_size", "--training.batch_size (--batch)"),
        ("--network_dim", "--adapter.rank (--rank)"),
        ("--instance_data_dir", "--data.path"),
        ("--output_dir", "--output (--out)"),
        ("--mixed_precision", "--training.mixed_precision"),
    ],
)
def test_what_others_call_it_leads_here(option, meant):
    with pytest.raises(UserError) as found:
        parse(["train", "pics", option, "1"])
    assert str(found.value) == f"there is no option {option}; did you mean {meant}?"


@pytest.mark.parametrize("option", ["--x", "--path", "--q", "--foo_bar"])
def test_no_suggestion_is_a_list_of_everything(option):
    with pytest.raises(UserError) as found:
        parse(["train", "pics", option, "1"])
    assert str(found.value).count(" or --") <= 2


def test_the_version_is_said(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"difftune {__version__}\n"
