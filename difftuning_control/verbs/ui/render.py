"""HTML from templates in which every value is text: captions, names and logs never become markup."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from difftuning_control.evaluation.report.page import escaping_environment
from difftuning_control.system.text import harmless

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> str:
    """A template of the folder `templates`, filled in."""
    return _environment().get_template(f"{template}.html.j2").render(**values)


@cache
def _environment() -> Environment:
    def shown(value: Any) -> str:
        return "" if value is None else "\n".join(map(harmless, str(value).split("\n")))

    environment = escaping_environment(Path(__file__).parent / "templates", shown)
    environment.filters["pick"] = pick
    return environment


def pick(name: str) -> str:
    """A name as `data-pick` holds it: in characters that `harmless` leaves as they are."""
    return quote(name, errors="surrogatepass")


def picked(event: Any) -> str:
    """The name that was chosen on the page, from gradio's event."""
    return unquote(str(event._data.get("value")), errors="surrogatepass")
