"""The spellings of a command's options: short names, words without a key, bare switches, all as dotted keys.

difftune train PICTURES --model ID --lr 1e-4     difftune sample RUN "a red apple" "a dog"
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from difftuning_control.errors import UserError
from difftuning_control.recipe.reading import nearest, section_of

_RECIPE = {
    "lr": "training.learning_rate",
    "steps": "training.max_steps",
    "batch": "training.batch_size",
    "rank": "adapter.rank",
    "out": "output",
}
_DATA = {"trigger": "data.trigger", "masks": "data.masks"}
SHORT: dict[str, dict[str, str]] = {
    "train": _RECIPE | _DATA | {"from": "training.begin_from"},
    "resume": {name: key for name, key in _RECIPE.items() if name != "out"},
    **dict.fromkeys(("bank", "analyze", "pilot"), _RECIPE | _DATA),
    **{verb: {"out": "output"} for verb in ("sample", "evaluate", "demo", "bench")},
}
SECTIONS = {"model": "model.id", "data": "data.path"}  # what a section's name alone means, where its value is a text
WORD = {  # what a word without a key is, at such a verb
    "train": "data.path",
    "bank": "data.path",
    "pilot": "data.path",
    "resume": "run",
    "export": "run",
    "verify": "run",
    "runs": "folder",
    "recipes": "name",
    "ui": "folder",
    "completion": "shell",
}
OTHERS = {  # what trainers of others call it
    "pretrained_model_name_or_path": "model.id",
    "instance_data_dir": "data.path",
    "train_data_dir": "data.path",
    "trigger_word": "data.trigger",
    "masked_training": "data.masks",
    "masked_loss": "data.masks",
    "alpha_mask": "data.masks",
    "unmasked_weight": "data.outside_mask",
    "instance_prompt": "data.trigger",
    "class_tokens": "data.trigger",
    "images": "data.path",
    "pictures": "data.path",
    "max_train_steps": "training.max_steps",
    "num_train_epochs": "training.max_steps",
    "epochs": "training.max_steps",
    "train_batch_size": "training.batch_size",
    "network_dim": "adapter.rank",
    "network_alpha": "adapter.alpha",
    "output_dir": "output",
    "validation_prompt": "training.sample_prompts",
    "report_to": "training.trackers",
    "num_inference_steps": "steps",
    "prompt": "prompts",
    "cfg": "guidance_scale",
}
SWITCH = re.compile(r"(?i)true|false|yes|no|on|off|null|[-+.\d]+")  # what can be meant as a switch's value


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Args:
        key: dotted; empty for a word that the verb has no use for.
        value: its text; None of a bare switch.
        said: how it was spelled.
    """

    key: str
    value: str | None
    said: str

    @property
    def flags(self) -> list[str]:
        """As jsonargparse reads it."""
        if not self.key:
            return [self.value or ""]
        return [f"--{self.key}" if self.value is None else f"--{self.key}={self.value}"]


def spelled(verb: str, words: list[str], known: Mapping[str, Any]) -> list[Option]:
    """The options of a command, in order.

    Args:
        known: the types of the verb's dotted keys.

    Raises:
        UserError: for an option that there is not, or one that is given in two spellings with two values.
    """
    options = list(_options(verb, words, known))
    options = _place_words(verb, options)
    by_key: dict[str, Option] = {}
    for option in options:
        earlier = by_key.setdefault(option.key, option)
        if option.key and earlier.said != option.said and not _same(earlier.value, option.value):
            raise UserError(
                f"{earlier.said} is {earlier.value} and {option.said} is {option.value}, which are one setting; give "
                "one of them."
            )
    return options


def _options(verb: str, words: list[str], known: Mapping[str, Any]) -> Iterator[Option]:
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "-h":
            word = "--help"
        if not word.startswith("--"):
            yield Option("", word, "")
            continue
        name, equals, value = word[2:].partition("=")
        key = _key_of(verb, name, known)
        takes = bool(rest) and not rest[0].startswith("--")
        if known.get(key) is bool and (verb in WORD or verb == "sample"):
            takes = takes and SWITCH.fullmatch(rest[0]) is not None
        text = value if equals else rest.pop(0) if takes and key not in ("help", "print_config") else None
        if key in SECTIONS and section_of(known.get(key)) is not None and text and not _is_section(text):
            key = SECTIONS[key]
        if text is None and known.get(key) is bool:
            text = "true"
        yield Option(key, text, f"--{name}")


def _key_of(verb: str, name: str, known: Mapping[str, Any]) -> str:
    """The dotted key that a name stands for."""
    if name in known or name in ("help", "print_config", "config"):
        return name
    plain = name.replace("-", "_")
    key = SHORT.get(verb, {}).get(name, plain)
    if key not in known:
        short = {key: said for said, key in SHORT.get(verb, {}).items()}
        raise UserError(f"there is no option --{name}{nearest(name, known, '--', OTHERS, short)}")
    return key


def _is_section(text: str) -> bool:
    import yaml  # saves it where no section is named

    try:
        return isinstance(yaml.safe_load(text), (dict, type(None)))
    except (yaml.YAMLError, ValueError):
        return "{" in text


def _same(one: str | None, other: str | None) -> bool:
    try:
        return one == other or float(one or "") == float(other or "")
    except ValueError:
        return False


def _place_words(verb: str, options: list[Option]) -> list[Option]:
    """Give the words without a key their keys; of a verb that takes none they stay as they are."""
    words = [option.value or "" for option in options if not option.key]
    if not words:
        return options
    keyed = [option for option in options if option.key]
    if verb == "sample":
        return [*keyed, *_run_and_prompts(words, {option.key for option in keyed})]
    key = WORD.get(verb)
    if key is None:
        return options
    if len(words) > 1:
        what = {"data.path": "folder of pictures", "shell": "shell"}.get(key, "folder")
        raise UserError(f"{verb} takes one {what}, and {len(words)} are named: {', '.join(words[:4])}; name one.")
    if any(option.key == key for option in keyed):
        raise UserError(f"{key} is given twice; give it once, as --{key} or without a key.")
    return [replace(option, key=key, said="a word") if not option.key else option for option in options]


def _run_and_prompts(words: list[str], keys: set[str]) -> Iterator[Option]:
    """The words of `sample`: a run, unless a run or a model has its key, and prompts."""
    if not any(key.partition(".")[0] in ("run", "model") for key in keys):
        yield Option("run", words.pop(0), "a word")
    if words and "prompts" in keys:
        raise UserError("prompts are given both as words and with --prompts; give them in one way.")
    if words:
        yield Option("prompts", json.dumps(words, ensure_ascii=False), "words")
