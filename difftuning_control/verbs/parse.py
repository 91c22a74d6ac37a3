"""From the words of a command line and its YAML recipe to a verb's dataclass; every mistake is named with its cure."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import typing
from typing import Any

from difftuning_control.errors import UserError
from difftuning_control.recipe.reading import (
    check_values,
    expected,
    from_yaml,
    keys_of,
    nearest,
    read_recipe,
    refuse_twice_in,
    section_of,
)
from difftuning_control.recipe.recipe import FITTED, Recipe
from difftuning_control.system.home import at_home
from difftuning_control.system.terminal import say
from difftuning_control.system.untrusted import is_text
from difftuning_control.system.version import VERSION
from difftuning_control.verbs.choices import as_flags, flat, left_out
from difftuning_control.verbs.commands import COMMANDS
from difftuning_control.verbs.help import HELP, HELP_ALL, USAGE, help_page
from difftuning_control.verbs.resume import recipe_to_begin, recipe_to_resume
from difftuning_control.verbs.spelling import SHORT, Option, spelled

PROGRAM = "difftune"
MODE = "recipe"  # of jsonargparse: how it reads values
ABOUT = "From a recipe to a tuned model, and what was gained. A mistake is one sentence and exit code 2."


def parse(arguments: list[str]) -> tuple[str, Any]:
    """The verb and its filled-in dataclass.

    Raises:
        UserError: for an unknown verb, key or value, naming the nearest valid one.
    """
    import jsonargparse  # saves it where no command line is read

    known: dict[str, Any] = {}
    dropped: list[str] = []
    named: set[str] = set()
    if not all(map(is_text, arguments)):
        raise UserError("the command has bytes that are no UTF-8 text; rename such files and folders.")
    if arguments and not arguments[0].startswith("-"):
        if arguments[0] not in COMMANDS:
            raise UserError(f"there is no verb {arguments[0]!r}{nearest(arguments[0], COMMANDS)}")
        _show_page(arguments)
        arguments = [word if word != HELP_ALL else "--help" for word in arguments]
        known = keys_of(COMMANDS[arguments[0]])
        arguments = _arrange(arguments, known, dropped, named)
    if not arguments:
        make_parser("").print_help()
        sys.exit(2)
    try:
        parser = make_parser(arguments[0])
        namespace = parser.parse_args(arguments)
        verb = namespace.verb
        values = parser.instantiate(namespace)[verb]
        settings = {f.name: values[f.name] for f in dataclasses.fields(COMMANDS[verb]) if f.name in values}
        command = COMMANDS[verb](**settings)
        if isinstance(command, Recipe):
            command.left_open = tuple(key for key in FITTED if key not in named)
        if dropped and os.environ.get("RANK", "0") == "0":
            say(f"note: {', '.join(dropped)} of the recipe belong to what was chosen there, and are left out")
        return verb, command
    except UserError:
        raise
    except RecursionError:
        raise UserError("a value of the command is nested too deeply; give a flat one.") from None
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise UserError(_one_sentence(str(error), known)) from None


def make_parser(verb: str) -> Any:
    """jsonargparse's parser of all verbs.

    Args:
        verb: whose options it has; of `*` all have theirs, which takes seconds to put together.
    """
    import jsonargparse  # as in parse
    import yaml  # as jsonargparse does

    jsonargparse.set_loader(MODE, _from_yaml, (yaml.YAMLError,))
    parser = jsonargparse.ArgumentParser(prog=PROGRAM, description=ABOUT, exit_on_error=False, parser_mode=MODE)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {VERSION}")
    verbs = parser.add_subcommands(dest="verb", required=True)
    for name, command in COMMANDS.items():
        usage = f"{PROGRAM} {name} {USAGE.get(name, '[options]')}"
        about = _first_line(command)
        sub = jsonargparse.ArgumentParser(description=about, exit_on_error=False, usage=usage, parser_mode=MODE)
        if verb in (name, "*"):
            sub.add_argument("--config", action="config", help="a recipe in YAML; other flags override its values")
            sub.add_class_arguments(command, as_group=False)
        if verb == "*":
            for short, key in SHORT.get(name, {}).items():
                sub.add_argument(f"--{short}", help=key)
        verbs.add_subcommand(name, sub, help=_first_line(command))
    return parser


def _from_yaml(text: str) -> Any:
    """A value as jsonargparse reads YAML; what begins with # is text, and no comment where nothing else is there."""
    import jsonargparse  # as in parse

    value = jsonargparse.get_loader("yaml")(text)
    return text if value is None and text.lstrip().startswith("#") else value


def _show_page(arguments: list[str]) -> None:
    """End with the page of what people use of a verb, if that is asked for and all of its help is longer."""
    if HELP.intersection(arguments) and HELP_ALL not in arguments:
        shown = help_page(arguments[0], COMMANDS[arguments[0]])
        if shown is not None:
            print(shown)
            sys.exit(0)


def _first_line(command: type) -> str:
    return (command.__doc__ or "").strip().splitlines()[0]


def _arrange(arguments: list[str], known: dict[str, Any], tell: list[str], named: set[str]) -> list[str]:
    """Check the keys, put --config first, so that flags override it from any place, and let a bare switch mean true.

    Args:
        tell: is given the keys of recipes that a choice made over them leaves out.
        named: is given the dotted keys that recipes and flags name.
    """
    verb = arguments[0]
    recipes: list[list[str]] = []
    layers: list[dict[str, Any]] = []  # the values of each recipe, then those of the flags
    given: dict[str, Any] = {}
    options = spelled(verb, arguments[1:], known)
    flags = []
    for option in options:
        if option.key == "config":
            path = at_home(option.value or "")
            values = read_recipe(path, known)
            recipes.append([f"--config={path}", *_place_of_study(verb, values)])
            layers.append(flat(values))
            continue
        flags += option.flags
        if option.key in known and option.value is not None:
            if typing.get_origin(known[option.key]) in (dict, list):
                refuse_twice_in(option.value, option.said)
            if section_of(known[option.key]) is not None:
                values = {option.key: from_yaml(option.value, option.said)}
                check_values(values, "", known, option.said)
            given |= _read_flag(option.key, option.value)
    for path, more in _recipe_of_run(verb, options, given, bool(recipes)):
        recipes.insert(0, [f"--config={path}", *more])
        layers.insert(0, flat(read_recipe(path, known)))
    resets = left_out([*layers, given])
    for recipe, reset in zip([*recipes, []], resets):
        recipe[:0] = as_flags(reset)
        tell += [key for key in reset if key not in tell]
    named |= {key for layer in (*layers, given) for key in layer}
    return [verb, *(word for recipe in recipes for word in recipe), *as_flags(resets[-1]), *flags]


def _read_flag(key: str, text: str) -> dict[str, Any]:
    """The value of a flag by dotted key, as YAML reads it; of a section those of its keys."""
    import yaml  # saves it where the recipe is of flags alone

    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # text, or what is refused later
        value = text
    return flat({key: value})


def _recipe_of_run(
    verb: str, options: list[Option], given: dict[str, Any], has_recipe: bool
) -> list[tuple[str, list[str]]]:
    """The recipe that a run has in its folder, for `resume RUN`, and for `train --from RUN` without one of its own."""
    texts = {option.key: option.value for option in options}
    if verb == "resume":
        if "help" in texts:
            return []
        if not texts.get("run"):
            raise UserError("resume is told of no run; name the folder of one: difftune resume RUN.")
        if "output" in given:
            raise UserError("a run goes on in its own folder; leave out --output.")
        return [(recipe_to_resume(texts["run"] or ""), [])]
    start = texts.get("training.begin_from")
    if verb == "train" and not has_recipe and start and (recipe := recipe_to_begin(start)) is not None:
        return [(recipe[0], as_flags(recipe[1]))]
    return []


def _place_of_study(verb: str, recipe: dict[str, Any]) -> list[str]:
    """A study of a recipe that was written for training goes beside the training's output, not into it."""
    section = {"analyze": "analysis", "pilot": "pilot"}.get(verb)
    if section is None or section in recipe or "output" not in recipe:
        return []
    return [f"--output={recipe['output']}-{section}"]


def _one_sentence(message: str, known: dict[str, Any]) -> str:
    """jsonargparse's several lines in one; where they name a key and its value, in the words of this program."""
    text = " ".join(message.split())
    match = re.search(r'key "([\w.]+)".* value: ?(.*)', text)
    if match is not None and match[1] in known:
        return f"{match[1]} is {match[2].rstrip('.') or 'empty'}; expected {expected(known[match[1]])}."
    return text.replace("Parser key", "key") + ("" if text.endswith(".") else ".")
