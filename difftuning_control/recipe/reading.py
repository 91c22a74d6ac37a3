"""The text of a recipe: YAML that is read safely, keys that are checked against the dataclasses, and their values."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from difftuning_control.errors import UserError
from difftuning_control.system.untrusted import is_text, read_text

T = TypeVar("T")
DEEPEST, LARGEST = 32, 100_000  # levels and values of a recipe
MOST_LISTED = 24  # all verbs, not all keys
MOST_SUGGESTED = 3  # names in a suggestion; more help nobody


def section_of(hint: Any) -> type | None:
    """The dataclass that a key of this type holds, if it is a section."""
    return next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)  # type: ignore[return-value]


def keys_of(command: type, prefix: str = "") -> dict[str, Any]:
    """All dotted keys of a command, sections included, and their types."""
    hints_by_key = {}
    hints = typing.get_type_hints(command)
    for entry in dataclasses.fields(command):
        hint = hints_by_key[prefix + entry.name] = hints[entry.name]
        if (section := section_of(hint)) is not None:
            hints_by_key |= keys_of(section, f"{prefix}{entry.name}.")
    return hints_by_key


def read_recipe(path: str, known: dict[str, Any]) -> dict[str, Any]:
    """The values of a recipe file whose keys are all known."""
    try:
        text = read_text(path)
    except OSError:
        raise UserError(f"the recipe {path or '(no name given)'} cannot be read; name a YAML file.") from None
    except UnicodeDecodeError:
        raise UserError(f"the recipe {path} is not UTF-8 text; save it as UTF-8.") from None
    values = from_yaml(text, f"the recipe {path}")
    if not isinstance(values, dict):
        instead = "nothing" if values is None else f"a {type(values).__name__}"
        raise UserError(f"the recipe {path} holds {instead}; expected keys and values.")
    check_values(values, "", known, f"the recipe {path}")
    return values


def from_yaml(text: str, where: str) -> Any:
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


def refuse_twice_in(text: str, where: str) -> None:
    """The same of a flag's value; what is no YAML is told of later."""
    import yaml  # as in from_yaml

    node = None
    with suppress(yaml.YAMLError, ValueError, RecursionError):
        node = yaml.compose(text, yaml.SafeLoader)
    _refuse_twice(node, where, set())


def _refuse_twice(node: Any, where: str, seen: set[int]) -> None:
    """Refuse a section that has a key twice, of which YAML keeps the last alone.

    Args:
        seen: the nodes that were looked at, which aliases lead to again.
    """
    import yaml  # as in from_yaml

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


def check_values(part: dict[Any, Any], prefix: str, known: dict[str, Any], where: str) -> None:
    """Unknown keys, and sections or values left empty, which jsonargparse reports in its own terms or not at all."""
    for name, value in part.items():
        key = f"{prefix}{name}"
        if key not in known:
            raise UserError(f"{where} has an unknown key {key}{nearest(key, known)}")
        is_section, optional = section_of(known[key]) is not None, type(None) in typing.get_args(known[key])
        if is_section and isinstance(value, dict):
            check_values(value, f"{key}.", known, where)
        elif not (value is None and optional) and (is_section or value is None):
            shown = "empty" if value is None else value
            raise UserError(f"{key} is {shown} in {where}; expected {expected(known[key])}.")
        elif not _is_clean(value):
            raise UserError(f"{key} has a NUL or half a character (a lone surrogate) in {where}; leave it out.")


def nearest(
    key: str,
    known: Iterable[str],
    mark: str = "",
    others: Mapping[str, str] | None = None,
    short: Mapping[str, str] | None = None,
) -> str:
    """The end of a sentence: the likeliest valid name, also where a right one stands in a wrong section.

    Args:
        mark: in front of each.
        others: what other programs call a key.
        short: short names of keys.
    """
    known, short = sorted(known), short or {}

    def meant(names: list[str]) -> str:
        said = [f"{mark}{k}" + (f" ({mark}{short[k]})" if k in short else "") for k in names]
        return f"; did you mean {' or '.join(said)}?"

    name = key.replace("-", "_")
    if others and others.get(name) in known:
        return meant([others[name]])
    if close := difflib.get_close_matches(name, short.values(), 1, 0.75):
        return meant([k for k, said in short.items() if said == close[0]])
    same_leaf = [k for k in known if k.rpartition(".")[2] == name]
    if "." not in key and 0 < len(same_leaf) <= MOST_SUGGESTED:
        return meant(same_leaf)
    section, _, name = key.rpartition(".")
    beside = {k.rpartition(".")[2]: k for k in known if section and k.rpartition(".")[0] == section}
    if close := difflib.get_close_matches(name, beside, 1, 0.85):
        return meant([beside[close[0]]])
    leaf = [k.rsplit(".", 1)[-1] for k in known]
    same = difflib.get_close_matches(key.rsplit(".", 1)[-1], leaf, 1, 0.7)
    candidates = [k for k, name in zip(known, leaf) if name in same] or known
    close = candidates if same and "." not in key else difflib.get_close_matches(key, candidates, 1, 0 if same else 0.5)
    if close and len(close) <= MOST_SUGGESTED:
        return meant(close)
    return f"; expected one of {', '.join(known if len(known) <= MOST_LISTED else [*known[:12], '…'])}."


def expected(hint: Any) -> str:
    """A key's type in a user's words."""
    if (section := section_of(hint)) is not None:
        return f"a section with {', '.join(f.name for f in dataclasses.fields(section))}"
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is dict:
        return "a section of names and values"
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(json.dumps(p) for p in parts)}"
    if typing.get_origin(hint) is list:
        return f"a list: [{expected(parts[0])}, …]"
    if parts:
        return " or ".join("null" if part is type(None) else expected(part) for part in parts)
    return {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "null"}[
        hint
    ]


def build(section: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """A dataclass from the values of its fields, with those of its sections as dictionaries or as their dataclasses.

    Raises:
        UserError: for a key that is unknown or a value of another type, named in full.
    """
    hints = typing.get_type_hints(section)
    given: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints or name not in {f.name for f in dataclasses.fields(section)}:  # type: ignore[arg-type]
            known = [f"{prefix}{f.name}" for f in dataclasses.fields(section)]  # type: ignore[arg-type]
            raise UserError(f"there is no key {key}{nearest(key, known)}")
        inner = section_of(hints[name])
        if inner is not None and isinstance(value, Mapping):
            given[name] = build(inner, value, f"{key}.")
        elif inner is not None and isinstance(value, inner):
            given[name] = value
        else:
            given[name] = _as_type(value, hints[name], key)
    return section(**given)


def _as_type(value: Any, hint: Any, key: str) -> Any:
    """The value, where it is of the type; as a float a whole number too, or a text such as 1e-4, as YAML reads it."""
    parts, origin = typing.get_args(hint), typing.get_origin(hint)
    with suppress(ValueError):
        if origin is list and isinstance(value, (list, tuple)):
            return [_as_type(v, parts[0], key) for v in value]
        if origin is typing.Literal and value in parts:
            return value
        if origin is dict and isinstance(value, Mapping):
            return dict(value)
        if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return float(value)
        if hint in (int, bool, str) and type(value) is hint:
            return value
        if hint is type(None) and value is None:
            return None
    if origin not in (list, dict, typing.Literal) and parts:
        for part in sorted(parts, key=lambda p: p is float):  # a whole number stays one where it may
            with suppress(UserError):
                return _as_type(value, part, key)
    raise UserError(f"{key} is {'empty' if value is None else value}; expected {expected(hint)}.")
