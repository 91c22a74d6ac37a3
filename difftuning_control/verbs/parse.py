"""From the words of a command line and its YAML recipe to a verb's dataclass; every mistake is named with its cure."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import sys
import typing
from contextlib import suppress
from typing import Any

from difftuning_control.errors import UserError
from difftuning_control.system.home import at_home
from difftuning_control.system.terminal import say
from difftuning_control.system.untrusted import is_text, read_text
from difftuning_control.verbs.choices import as_flags, flat, left_out
from difftuning_control.verbs.commands import ALIASES, COMMANDS, POSITIONAL
from difftuning_control.verbs.resume import recipe_to_begin, recipe_to_resume

PROGRAM = "difftune"
ABOUT = "From a recipe to a tuned model, and what was gained. A mistake is one sentence and exit code 2."
DEEPEST, LARGEST = 32, 100_000  # levels and values of a recipe


def parse(arguments: list[str]) -> tuple[str, Any]:
    """The verb and its filled-in dataclass.

    Raises:
        UserError: for an unknown verb, key or value, naming the nearest valid one.
    """
    import jsonargparse  # saves it where no command line is read

    known: dict[str, Any] = {}
    dropped: list[str] = []
    if not all(map(is_text, arguments)):
        raise UserError("the command has bytes that are no UTF-8 text; rename such files and folders.")
    if arguments and not arguments[0].startswith("-"):
        if arguments[0] not in COMMANDS:
            raise UserError(f"there is no verb {arguments[0]!r}{_nearest(arguments[0], COMMANDS)}")
        known = keys_of(COMMANDS[arguments[0]])
        arguments = _arrange(arguments, known, dropped)
    parser = jsonargparse.ArgumentParser(prog=PROGRAM, description=ABOUT, exit_on_error=False)
    verbs = parser.add_subcommands(dest="verb", required=True)
    for name, command in COMMANDS.items():
        sub = jsonargparse.ArgumentParser(description=_first_line(command), exit_on_error=False)
        if arguments[:1] == [name]:  # the others' arguments take long to put together, and nobody will see them
            sub.add_argument("--config", action="config", help="a recipe in YAML; other flags override its values")
            sub.add_class_arguments(command, as_group=False)
        verbs.add_subcommand(name, sub, help=_first_line(command))
    if not arguments:
        parser.print_help()
        sys.exit(2)
    try:
        found = parser.parse_args(arguments)
        verb = found.verb
        values = parser.instantiate(found)[verb]
        settings = {f.name: values[f.name] for f in dataclasses.fields(COMMANDS[verb]) if f.name in values}
        command = COMMANDS[verb](**settings)
        if dropped and os.environ.get("RANK", "0") == "0":
            say(f"note: {', '.join(dropped)} of the recipe belong to what was chosen there, and are left out")
        return verb, command
    except UserError:
        raise
    except RecursionError:
        raise UserError("a value of the command is nested too deeply; give a flat one.") from None
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise UserError(_one_sentence(str(error), known)) from None


def _first_line(command: type) -> str:
    return (command.__doc__ or "").strip().splitlines()[0]


def _section_of(hint: Any) -> type | None:
    """The dataclass that a key of this type holds, if it is a section."""
    return next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)  # type: ignore[return-value]


def keys_of(command: type, prefix: str = "") -> dict[str, Any]:
    """All dotted keys of a command, sections included, and their types."""
    found = {}
    hints = typing.get_type_hints(command)
    for entry in dataclasses.fields(command):
        hint = found[prefix + entry.name] = hints[entry.name]
        if (section := _section_of(hint)) is not None:
            found |= keys_of(section, f"{prefix}{entry.name}.")
    return found


def _arrange(arguments: list[str], known: dict[str, Any], tell: list[str]) -> list[str]:
    """Check the keys, put --config first, so that flags override it from any place, and let a bare switch mean true.

    Args:
        tell: is given the keys of recipes that a choice made over them leaves out.
    """
    recipes: list[list[str]] = []
    layers: list[dict[str, Any]] = []  # the values of each recipe, then those of the flags
    given: dict[str, Any] = {}
    flags, rest, word = [], arguments[1:], POSITIONAL.get(arguments[0])
    while rest:
        argument = rest.pop(0)
        key, equals, value = argument[2:].partition("=")
        if argument.startswith("--") and key not in known:
            named = ALIASES.get(arguments[0], {}).get(key, key.replace("-", "_"))
            if named in known:
                key, argument = named, f"--{named}{equals}{value}"
        bare = not equals and (not rest or rest[0].startswith("--"))
        if key in ("help", "print_config"):
            flags.append(argument)
        elif not argument.startswith("--"):
            flags.append(f"--{word}={argument}" if word is not None else argument)
        elif key == "config":
            value = at_home(value if equals or bare else rest.pop(0))
            values = _check_recipe(value, known)
            recipes.append([f"--config={value}", *_place_of_study(arguments[0], values)])
            layers.append(flat(values))
        elif key not in known:
            raise UserError(f"there is no option --{key}{_nearest(key, known, '--')}")
        else:
            if typing.get_origin(known[key]) in (dict, list) and not bare:
                _refuse_twice_in(value if equals else rest[0], f"--{key}")
            if _section_of(known[key]) is not None and not bare:
                _check_values({key: _from_yaml(value if equals else rest[0], f"--{key}")}, "", known, f"--{key}")
            flags.append(f"{argument}=true" if bare and known[key] is bool else argument)
            flags += [rest.pop(0)] if not equals and not bare else []
            given |= _read_flag(key, value if equals else "true" if bare else flags[-1])
    if sum(flag.partition("=")[0] == f"--{word}" for flag in flags) > 1:
        raise UserError(f"{word} is given twice; give it once, as --{word} or without a key.")
    for path, more in _recipe_of_run(arguments[0], flags, given, bool(recipes)):
        recipes.insert(0, [f"--config={path}", *more])
        layers.insert(0, flat(_check_recipe(path, known)))
    resets = left_out([*layers, given])
    for recipe, reset in zip([*recipes, []], resets):
        recipe[:0] = as_flags(reset)
        tell += [key for key in reset if key not in tell]
    return [arguments[0], *(word for recipe in recipes for word in recipe), *as_flags(resets[-1]), *flags]


def _read_flag(key: str, text: str) -> dict[str, Any]:
    """The value of a flag by dotted key, as YAML reads it; of a section those of its keys."""
    import yaml  # saves it where the recipe is of flags alone

    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # text, or what is refused later
        value = text
    return flat({key: value})


def _recipe_of_run(verb: str, flags: list[str], given: dict[str, Any], has_recipe: bool) -> list[tuple[str, list[str]]]:
    """The recipe that a run has in its folder, for `resume RUN`, and for `train --from RUN` without one of its own."""
    if verb == "resume":
        run = _word_of(flags, "run")
        if {"-h", "--help"} & set(flags):
            return []
        if not run:
            raise UserError("resume is told of no run; name the folder of one: difftune resume RUN.")
        if "output" in given:
            raise UserError("a run goes on in its own folder; leave out --output.")
        return [(recipe_to_resume(run), [])]
    start = _word_of(flags, "training.begin_from")
    if verb == "train" and not has_recipe and start and (found := recipe_to_begin(start)) is not None:
        return [(found[0], as_flags(found[1]))]
    return []


def _word_of(flags: list[str], key: str) -> str | None:
    """The text of a flag, as it was given last."""
    found = None
    for flag, following in zip(flags, [*flags[1:], ""]):
        name, equals, value = flag.partition("=")
        if name == f"--{key}":
            found = value if equals else following
    return found


def _place_of_study(verb: str, recipe: dict[str, Any]) -> list[str]:
    """A study of a recipe that was written for training goes beside the training's output, not into it."""
    section = {"analyze": "analysis", "pilot": "pilot"}.get(verb)
    if section is None or section in recipe or "output" not in recipe:
        return []
    return [f"--output={recipe['output']}-{section}"]


def _check_recipe(path: str, known: dict[str, Any]) -> dict[str, Any]:
    """The values of a recipe file whose keys are all known."""
    try:
        text = read_text(path)
    except OSError:
        raise UserError(f"the recipe {path or '(no name given)'} cannot be read; name a YAML file.") from None
    except UnicodeDecodeError:
        raise UserError(f"the recipe {path} is not UTF-8 text; save it as UTF-8.") from None
    values = _from_yaml(text, f"the recipe {path}")
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise UserError(f"the recipe {path} holds {found}; expected keys and values.")
    _check_values(values, "", known, f"the recipe {path}")
    return values


def _from_yaml(text: str, where: str) -> Any:
    import yaml  # saves it where the recipe is of flags alone

    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise UserError(f"{where} is nested more than {DEEPEST} levels deep; give a flatter one.")
        _refuse_twice(yaml.compose(text, yaml.SafeLoader), where, set())
        values = yaml.safe_load(text)
        if _expanded(values, {}) > LARGEST:
            raise UserError(f"{where} has aliases (*) that stand for more than {LARGEST} values; write them out.")
        return values
    except UserError:
        raise
    except ValueError as error:  # a date or a number that there is not
        raise UserError(f"{where} has a value that cannot be read ({str(error).partition(';')[0]}).") from None
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where} is not valid YAML: {error.problem}{line}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}.") from None


def _refuse_twice_in(text: str, where: str) -> None:
    """The same of a flag's value; what is no YAML is told of later."""
    import yaml  # as in _from_yaml

    node = None
    with suppress(yaml.YAMLError, ValueError, RecursionError):
        node = yaml.compose(text, yaml.SafeLoader)
    _refuse_twice(node, where, set())


def _refuse_twice(node: Any, where: str, seen: set[int]) -> None:
    """Refuse a section that has a key twice, of which YAML keeps the last alone.

    Args:
        seen: the nodes that were looked at, which aliases lead to again.
    """
    import yaml  # as in _from_yaml

    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))
    lines: dict[Any, int] = {}
    for part in node.value:
        if isinstance(node, yaml.MappingNode):
            key, part = part
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
            line = key.start_mark.line + 1
            if name in lines:
                raise UserError(
                    f"{where} has the key {key.value} twice, in line {lines[name]} and in line {line}, and only one "
                    "of them can hold; put them together."
                )
            lines[name] = line
        _refuse_twice(part, where, seen)


def _expanded(value: Any, sizes: dict[int, float]) -> float:
    """How many values a YAML value has when its aliases are written out; infinite where it holds itself."""
    if not isinstance(value, (dict, list, set, tuple)):
        return 1
    if id(value) not in sizes:
        sizes[id(value)] = math.inf  # until it is known
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(_expanded(part, sizes) for part in parts)
    return sizes[id(value)]


def _is_clean(value: Any) -> bool:
    """Whether all texts in a value are Unicode without a NUL, which no path and no argument may have."""
    if isinstance(value, dict):
        return all(_is_clean(part) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_clean, value))
    return not isinstance(value, str) or ("\0" not in value and is_text(value))


def _check_values(part: dict[Any, Any], prefix: str, known: dict[str, Any], where: str) -> None:
    """Unknown keys, and sections or values left empty, which jsonargparse reports in its own terms or not at all."""
    for name, value in part.items():
        key = f"{prefix}{name}"
        if key not in known:
            raise UserError(f"{where} has an unknown key {key}{_nearest(key, known)}")
        is_section, optional = _section_of(known[key]) is not None, type(None) in typing.get_args(known[key])
        if is_section and isinstance(value, dict):
            _check_values(value, f"{key}.", known, where)
        elif not (value is None and optional) and (is_section or value is None):
            found = "empty" if value is None else value
            raise UserError(f"{key} is {found} in {where}; expected {_expected(known[key])}.")
        elif not _is_clean(value):
            raise UserError(f"{key} has a NUL or half a character (a lone surrogate) in {where}; leave it out.")


def _nearest(key: str, known: typing.Iterable[str], mark: str = "") -> str:
    """The end of a sentence: the likeliest valid name, also where a right one stands in a wrong section."""
    known = sorted(known)
    section, _, name = key.rpartition(".")
    beside = {k.rpartition(".")[2]: k for k in known if section and k.rpartition(".")[0] == section}
    if close := difflib.get_close_matches(name, beside, 1, 0.85):
        return f"; did you mean {mark}{beside[close[0]]}?"
    leaf = [k.rsplit(".", 1)[-1] for k in known]
    same = difflib.get_close_matches(key.rsplit(".", 1)[-1], leaf, 1, 0.7)
    candidates = [k for k, name in zip(known, leaf) if name in same] or known
    close = candidates if same and "." not in key else difflib.get_close_matches(key, candidates, 1, 0 if same else 0.5)
    if close:
        return f"; did you mean {' or '.join(mark + k for k in close)}?"
    return f"; expected one of {', '.join(known[:12])}{', …' if len(known) > 12 else ''}."


def _expected(hint: Any) -> str:
    """A key's type in a user's words."""
    if (section := _section_of(hint)) is not None:
        return f"a section with {', '.join(f.name for f in dataclasses.fields(section))}"
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is dict:
        return "a section of names and values"
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(json.dumps(p) for p in parts)}"
    if typing.get_origin(hint) is list:
        return f"a list: [{_expected(parts[0])}, …]"
    if parts:
        return " or ".join("null" if part is type(None) else _expected(part) for part in parts)
    return {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}[hint]


def _one_sentence(message: str, known: dict[str, Any]) -> str:
    """jsonargparse's several lines in one; where they name a key and its value, in the words of this program."""
    text = " ".join(message.split())
    found = re.search(r'key "([\w.]+)".* value: ?(.*)', text)
    if found is not None and found[1] in known:
        return f"{found[1]} is {found[2].rstrip('.') or 'empty'}; expected {_expected(known[found[1]])}."
    return text.replace("Parser key", "key") + ("" if text.endswith(".") else ".")
