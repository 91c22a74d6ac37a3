"""The page of a report: templates filled in with texts and figures, as one HTML file with nothing fetched or run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from difftuning_control.evaluation.comparison import is_number, mean_spread, seed_values
from difftuning_control.evaluation.metric_table import METRICS
from difftuning_control.evaluation.report.side_names import side_about, side_label
from difftuning_control.system.durable import write_text
from difftuning_control.system.text import harmless

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_WORDS = 90  # characters of a caption shown


def write_page(
    folder: Path, template: str, language: str, texts: Mapping[str, str], file: str = "report.html", **values: Any
) -> Path:
    filled = _environment(tuple(texts.items())).get_template(template)
    page = filled.render(language=language, t=texts, folder=folder, **values)
    path = folder / file
    write_text(path, page)
    return path


@cache
def _environment(texts: tuple[tuple[str, str], ...]) -> Environment:
    """Kept, since a run writes its report many times."""
    return page_environment(dict(texts))


def page_environment(texts: Mapping[str, str]) -> Environment:
    missing = texts["missing"]

    def figure(value: Any, metric: str) -> str:
        form = METRICS[metric].form if metric in METRICS else "{:.4g}"
        return form.format(value) if is_number(value) else missing

    def spread(values: Mapping[int, float], metric: str) -> str:
        mean, deviation = mean_spread(list(values.values()))
        text = figure(mean, metric)
        return text if deviation is None else f"{text} ± {figure(deviation, metric)}"

    def signed(value: Any, digits: int = 1) -> str:
        if not is_number(value):
            return missing
        text = f"{value:+.{digits if abs(value) < 0.9995 else 0}%}".replace("-", "−")
        return text if any(c in "123456789" for c in text) else text[1:]

    def number(value: Any, digits: int = 4) -> str:
        return f"{value:.{digits}g}" if is_number(value) else missing

    def duration(seconds: Any) -> str:
        if not is_number(seconds):
            return missing
        if seconds < 60:
            return texts["duration.seconds"].format(s=f"{seconds:.1f}" if seconds < 10 else round(seconds))
        if seconds < 3600:
            minutes, rest = divmod(round(seconds), 60)
            return texts["duration.minutes"].format(m=minutes, s=rest)
        hours, minutes = divmod(round(seconds / 60), 60)
        return texts["duration.hours"].format(h=hours, m=minutes)

    def interval(low: Any, high: Any) -> str:
        return texts["range"].format(low=signed(low), high=signed(high))

    def value(anything: Any) -> str:
        return anything if isinstance(anything, str) else json.dumps(anything, ensure_ascii=False, default=str)

    environment = escaping_environment(
        Path(__file__).parent / "templates", lambda value: missing if value is None else harmless(str(value))
    )
    environment.filters |= {
        "figure": figure,
        "spread": spread,
        "signed": signed,
        "number": number,
        "duration": duration,
        "value": value,
        "short": lambda text: text if len(text) <= MOST_WORDS else text[:MOST_WORDS] + "…",
        "relative": lambda path: "./" + quote(path),
        "say": lambda key, **given: texts[key].format(**{k: missing if v is None else v for k, v in given.items()}),
        "side": lambda name: side_label(name, texts) if name is not None else missing,
        "about": lambda name: side_about(name, texts) or missing,
        "direction": lambda metric: texts[METRICS[metric].better if metric in METRICS else "neutral"],
        "metric": lambda metric: texts.get(f"metric.{metric}", metric),
        "change": lambda after, before: (
            after / before - 1 if is_number(after) and is_number(before) and before else None
        ),
        "minus": lambda text: text.replace("-", "−"),
        "flatten": flatten,
        "created": lambda text: str(text)[:16].replace("T", " "),
    }
    environment.globals |= {"interval": interval, "seed_values": seed_values, "mean": lambda v: mean_spread(list(v))[0]}
    return environment


def escaping_environment(templates: Path, shown: Callable[[Any], str]) -> Environment:
    """Templates of a folder, in which every value is text unless it is markup already, and none may be missing.

    Args:
        shown: the text of a value, before it is escaped.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # saves jinja2 where no page is written
    from markupsafe import Markup

    return Environment(
        loader=FileSystemLoader(templates),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else shown(value),
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        pairs += flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return pairs


def quoted(value: Any) -> str:
    return repr(harmless(value)) if isinstance(value, str) else repr(value)
