"""The texts of reports, one JSON file a language in `languages/`, and the check that a file has them all."""

from __future__ import annotations

import json
import string
from pathlib import Path

from difftuning_control.errors import UserError
from difftuning_control.system.text import harmless

FOLDER = Path(__file__).parent / "languages"


def languages(folder: Path = FOLDER) -> list[str]:
    """The names of the languages that there are."""
    return sorted(p.stem for p in folder.glob("*.json"))


def load_texts(language: str, folder: Path = FOLDER) -> dict[str, str]:
    """The texts of a language; `en.json` says which there must be.

    Raises:
        UserError: if there is no such language, or its file lacks a key or a placeholder.
    """
    if language not in languages(folder):
        raise UserError(
            f"the language {harmless(language)!r} is unknown; choose one of {', '.join(languages(folder))}, "
            f"or add {folder}/<language>.json."
        )
    texts = _read(folder / f"{language}.json")
    for key, model in _read(folder / "en.json").items():
        if key not in texts:
            raise UserError(f"the language file {folder / language}.json lacks {key!r}; add it as en.json has it.")
        if placeholders(texts[key]) != placeholders(model):
            wanted = ", ".join(sorted(placeholders(model))) or "none"
            raise UserError(
                f"the language file {folder / language}.json has other placeholders in {key!r} than en.json ({wanted})."
            )
    return texts


def _read(path: Path) -> dict[str, str]:
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"the language file {path} is not JSON ({error}); mend or remove it.") from None
    if not isinstance(texts, dict) or not all(isinstance(v, str) for v in texts.values()):
        raise UserError(f"the language file {path} is not a JSON object of strings; shape it as en.json.")
    return texts


def placeholders(text: str) -> set[str]:
    """The names in braces; {"?"} if the braces do not pair."""
    try:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError:
        return {"?"}
