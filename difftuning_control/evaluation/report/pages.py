"""Reports of a pilot and of an analysis: one HTML file each, with everything inside and nothing fetched or run."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from PIL import Image, UnidentifiedImageError

from difftuning_control.errors import UserError
from difftuning_control.evaluation.comparison import PLAIN, compare, is_number, mean_spread, seed_values, verdict
from difftuning_control.evaluation.report.words import load_words
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.system.durable import write_text
from difftuning_control.system.text import harmless

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["verdict", "write_analysis_report", "write_pilot_report"]

# metric: which way is better, and how it is printed
METRICS = {
    "kid": ("lower", "{:.4f}"),
    "fid": ("lower", "{:.1f}"),
    "domain_hit": ("higher", "{:.1%}"),
    "domain_judge": ("neutral", "{:.1%}"),
    "pair_similarity": ("higher", "{:.3f}"),
    "density": ("higher", "{:.2f}"),
    "coverage": ("higher", "{:.2f}"),
    "diversity": ("higher", "{:.3f}"),
    "memorisation": ("neutral", "{:.3f}"),
    "target_loss": ("lower", "{:.4f}"),
    "bank_loss": ("lower", "{:.4f}"),
    "pictures": ("neutral", "{:.0f}"),
    "f1": ("higher", "{:.3f}"),
    "ssim": ("higher", "{:.3f}"),
    "rmse": ("lower", "{:.3f}"),
    "cosine": ("higher", "{:.3f}"),
    "miou": ("higher", "{:.3f}"),
}
LARGEST = 320  # side of a picture in the report, in pixels
COLUMNS = 8  # pictures in a row
MOST_WORDS = 90  # characters of a caption shown
ADVICE = ("uncertain", "no_gap", "wide", "not_monotone", "flat", "rising")  # what matters most first
UNWANTED = (
    "output",
    "data.cache",
    "training.resume",
    "training.seed",
    "training.save_at",
)  # in a command to go on with


def write_pilot_report(result: Mapping[str, Any], folder: Path, language: str = "en") -> Path:
    """`report.html` of a pilot in its folder, which holds the pictures that the result names.

    Raises:
        UserError: if the pilot is not finished, a picture is missing, or the language is unknown.
    """
    words = load_words(language)
    _need_complete(result)
    from difftuning_control.evaluation.report import charts

    sides, best = list(result["sides"]), verdict(result)
    by_name = {s["name"]: s for s in sides}
    rises = [r for s in sides if (r := _change(s, "bank")) is not None]
    lengths = sorted({r["steps"] for s in sides for r in s["runs"]})
    analysis, budget = result.get("analysis"), result.get("budget")
    primary, base = result["primary"], result["base"]
    shown = [primary, *(m for m in ("domain_hit", "pair_similarity", "bank_loss") if m != primary)]
    shown = [m for m in shown if any(seed_values(s, m) for s in sides)]
    drawn: dict[str, Any] = {
        "sides": [(charts.sides_chart(sides, m, words, base.get(m)), m) for m in shown],
        "lengths": [(charts.length_chart(sides, m, words), m) for m in shown[:2]] if len(lengths) > 1 else [],
        "forgetting": None,
    }
    if rises:
        allowed = budget["allowed"] if budget and len(budget["allowed"]) == len(rises[0]["u"]) else None
        drawn["forgetting"] = charts.forgetting_chart(rises, allowed, words)
    budget_u: list[float] = []
    if budget:
        count = len(budget["allowed"])
        budget_u = [(i + 0.5) / count for i in range(count)]
        if budget.get("multipliers"):
            drawn["multipliers"] = charts.multipliers_chart({"u": budget_u, **budget["multipliers"]}, words)
    if analysis:
        drawn |= _analysis_charts(analysis, words)
    chosen = by_name.get(best["side"])
    return _write(
        folder,
        "pilot.html.j2",
        language,
        words,
        result=result,
        verdict=best,
        chosen=chosen,
        by_name=by_name,
        charts=drawn,
        lengths=lengths,
        rises=rises,
        rise={r["label"]: fmean(r["mean"]) for r in rises},
        metrics=_measured([base, *(r for s in sides for r in s["runs"])]),
        pictures=_pictures(result.get("pictures"), folder),
        analysis=analysis,
        budget=budget,
        budget_u=budget_u,
        bands=_bands(sides),
        settings=[*_flatten(result["settings"], "pilot."), *_flatten(result.get("recipe") or {})],
        steps=_next_steps(result, best, by_name),
        searched=_measured([row for s in sides for row in s["search"]]),
        judge=base.get("domain_judge"),
        guidance=_guidance(sides, result["settings"].get("lengths", [])),
        analysis_file=next((n for n in ("analysis.json", "analysis/analysis.json") if (folder / n).is_file()), None),
    )


def write_analysis_report(analysis: Mapping[str, Any], folder: Path, language: str = "en") -> Path:
    """`report.html` of an analysis in its folder.

    Raises:
        UserError: if the analysis is not finished, or the language is unknown.
    """
    words = load_words(language)
    if analysis.get("status") != "complete":
        raise UserError(
            f"the analysis is not finished (its status is {_quoted(analysis.get('status'))}), so there is nothing to "
            "report; run the same command again."
        )
    advice = [c for c in ADVICE if c in analysis["advice"]]
    command_of = next((c for c in ("rising", "not_monotone") if c in advice), None)
    train = None
    if command_of:
        recipe = {
            "model": {"id": analysis["model"]},
            "data": {"path": analysis["data"]["path"]},
            "tuning": {"schedule": {"kind": "measured", "path": str(folder / "schedule.json")}},
        }
        train = _train_command(recipe)
    return _write(
        folder,
        "analysis.html.j2",
        language,
        words,
        analysis=analysis,
        advice=advice,
        charts=_analysis_charts(analysis, words),
        command_of=command_of,
        train=train,
        schedule_file=(folder / "schedule.json").is_file(),
    )


def _need_complete(result: Mapping[str, Any]) -> None:
    again = "run the same command again, which goes on where it stopped."
    if result.get("status") != "complete":
        raise UserError(f"the pilot is not finished (its status is {_quoted(result.get('status'))}); {again}")
    if not result["sides"]:
        raise UserError(f"the pilot has no side that was tuned, so there is nothing to report; {again}")
    seeds, lengths = result["settings"].get("seeds", []), result["settings"].get("lengths", [])
    for side in result["sides"]:
        done = {(r["seed"], r["steps"]) for r in side["runs"]}
        absent = [(s, n) for s in seeds for n in lengths if (s, n) not in done]
        if not side["runs"] or not any(n == side["best_length"] for _, n in done):
            raise UserError(
                f"the pilot is not finished (the side {_quoted(side['name'])} has no finished run); {again}"
            )
        if absent:
            missing = f"the side {_quoted(side['name'])} lacks seed {absent[0][0]} at {absent[0][1]} steps"
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise UserError(f"the pilot is not finished ({missing}{more}); {again}")


def _quoted(value: Any) -> str:
    return repr(harmless(value)) if isinstance(value, str) else repr(value)


def _analysis_charts(analysis: Mapping[str, Any], words: Mapping[str, str]) -> dict[str, Any]:
    from difftuning_control.evaluation.report import charts

    u = [i / 20 for i in range(21)]
    paper = {"label": words["schedule.paper"], "u": u, "psi": u, "xi": [1 - x for x in u]}
    kind = analysis["schedule"].get("kind", "measured")
    label = words["schedule.measured"] if kind == "measured" else words["schedule.kind"].format(kind=kind)
    found: dict[str, Any] = {
        "gap": charts.gap_chart(analysis, words),
        "loss": charts.loss_chart(analysis, words),
        "schedule": charts.schedule_chart([{**analysis["schedule"], "label": label}, paper], words),
    }
    if forgetting := analysis.get("forgetting"):
        item = {**forgetting, "label": "tuned"}
        found["forgetting_run"] = charts.forgetting_chart([item], forgetting.get("budget"), words)
    if staged := analysis.get("staged"):
        values = {m: staged["tuned_above"].get(m, []) for m in ("kid", "domain_hit", "pair_similarity")}
        shown = [m for m, v in values.items() if any(is_number(x) for x in v)]
        found["staged"] = [(charts.staged_chart(staged, words, m), m) for m in shown]
    if multipliers := analysis.get("multipliers"):
        found["multipliers_run"] = charts.multipliers_chart(multipliers, words)
    return found


def _change(side: Mapping[str, Any], role: str) -> dict[str, Any] | None:
    """tuned / base − 1 of a role's loss by band at the best length: mean over the seeds and a spread each way."""
    rows, u = [], None
    for run in side["runs"]:
        losses = (run.get("losses") or {}).get(role)
        if run["steps"] == side["best_length"] and losses and all(v > 0 for v in losses["base"]["loss"]):
            u = losses["base"]["u"]
            rows.append([t / b - 1 for t, b in zip(losses["tuned"]["loss"], losses["base"]["loss"])])
    if u is None:
        return None
    stats = [mean_spread(column) for column in zip(*rows)]
    mean = [m or 0.0 for m, _ in stats]
    return {
        "label": side["name"],
        "u": u,
        "mean": mean,
        "spread": [s for _, s in stats],
        "low": [m - (s or 0) for m, s in zip(mean, (s for _, s in stats))],
        "high": [m + (s or 0) for m, s in zip(mean, (s for _, s in stats))],
    }


def _bands(sides: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For target and bank: the bands, the pretrained model's loss, and each side's mean loss."""
    tables = []
    for role in ("target", "bank"):
        columns: dict[str, list[float]] = {}
        u: list[float] = []
        for side in sides:
            runs = [
                r["losses"][role]
                for r in side["runs"]
                if r["steps"] == side["best_length"] and (r.get("losses") or {}).get(role)
            ]
            if runs:
                u = runs[0]["base"]["u"]
                columns.setdefault("base", runs[0]["base"]["loss"])
                columns[side["name"]] = [sum(v) / len(v) for v in zip(*(r["tuned"]["loss"] for r in runs))]
        if columns:
            tables.append({"role": role, "u": u, "columns": columns})
    return tables


def _guidance(sides: Sequence[Mapping[str, Any]], lengths: Sequence[int]) -> dict[str, Any] | None:
    """Each side's ways of guidance and how Domain Guidance compares with the ordinary one; None if none was tried."""
    tables = []
    for side in sides:
        if not side.get("guidance"):
            continue
        rows: list[dict[str, Any]] = []
        for way, found in side["guidance"]["ways"].items():
            runs = [row | {"steps": max(lengths)} for row in found["runs"]]
            row = {"name": way, "way": way, "scale": found["scale"], "runs": runs, "best_length": max(lengths)}
            rows.append(row | {"against": compare(row, rows[0], "kid", len(sides)) if rows else None})
        tables.append({"name": side["name"], "rows": rows})
    metrics = [
        m
        for m in ("kid", "domain_hit", "pair_similarity", "memorisation")
        if any(seed_values(row, m) for table in tables for row in table["rows"])
    ]
    return {"sides": tables, "metrics": metrics} if tables else None


def _pictures(pictures: Mapping[str, Any] | None, folder: Path) -> list[dict[str, Any]]:
    """Blocks of at most COLUMNS prompts, with the rows of each as data URIs."""
    if not pictures or not pictures.get("rows"):
        return []
    prompts = pictures["prompts"]
    rows = [{"name": r["name"], "uris": [_data_uri(folder, f) for f in r["files"]]} for r in pictures["rows"]]
    return [
        {"prompts": prompts[i : i + COLUMNS], "rows": [r | {"uris": r["uris"][i : i + COLUMNS]} for r in rows]}
        for i in range(0, len(prompts), COLUMNS)
    ]


def _data_uri(folder: Path, file: str, largest: int = LARGEST) -> str:
    path = folder / file
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"the picture {harmless(file)} of the pilot lies outside its folder {folder}; move it there.")
    try:
        with Image.open(path) as picture:
            picture.load()
            content = path.read_bytes()
            if picture.format != "PNG" or max(picture.size) > largest:
                small = picture.convert("RGB")
                small.thumbnail((largest, largest), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                small.save(buffer, "PNG", optimize=True)
                content = buffer.getvalue()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        raise UserError(
            f"the picture {harmless(str(path))} of the pilot is missing or damaged; put it back, or start "
            "afresh with --overwrite."
        ) from None
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _measured(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [m for m in METRICS if any(is_number(row.get(m)) for row in rows)]


def _next_steps(
    result: Mapping[str, Any], best: Mapping[str, Any], by_name: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """What to do after a pilot: a key of the words, what fills it, and a command or None."""
    code, retention = "next.train", best["retention"]
    name = best["side"]
    if best["code"] == "none":
        level = {c["side"] for c in best["comparisons"] if not (c["clear"] and not c["better"])}
        if retention and retention["clear"] and retention["side"] in level:
            name, code = retention["side"], "next.train_retention"
        else:
            name, code = (PLAIN if PLAIN in by_name else best["side"]), "next.train_plain"
    steps: list[dict[str, Any]] = [{"code": "next.look", "values": {}, "command": None}]
    if name in by_name:
        side = by_name[name]
        if code == "next.train_plain" and name != PLAIN:
            code = "next.train"
        values = {"side": name, "time": _run_seconds(side)}
        steps.append({"code": code, "values": values, "command": _final_command(result, side)})
        lengths = result["settings"].get("lengths", [])
        if len(lengths) > 1 and side["best_length"] == max(lengths):
            steps.append({"code": "next.longer", "values": {"side": name, "steps": max(lengths)}, "command": None})
    if best["code"] == "none":
        seeds = ", ".join(map(str, result["settings"].get("seeds", [])))
        steps.append({"code": "next.seeds", "values": {"seeds": seeds}, "command": None})
    steps.append({"code": "next.keep", "values": {}, "command": result.get("command")})
    return steps


def _run_seconds(side: Mapping[str, Any]) -> float:
    seconds = [r["seconds"] for r in side["runs"] if r["steps"] == side["best_length"] and is_number(r.get("seconds"))]
    return sum(seconds) / len(seconds) if seconds else math.nan


def _final_command(result: Mapping[str, Any], side: Mapping[str, Any]) -> str:
    """`difftune train` with the recipe of a side at its best length."""
    recipe = {k: dict(v) if isinstance(v, Mapping) else v for k, v in (result.get("recipe") or {}).items()}
    recipe["model"] = {**recipe.get("model", {}), "id": result["model"]}
    recipe["data"] = {**recipe.get("data", {}), "path": result["data"]["path"]}
    recipe["method"] = result["settings"].get("method", "lora")
    recipe["tuning"] = {**recipe.get("tuning", {}), **side["tuning"]}
    training = {"learning_rate": side["learning_rate"], "max_steps": side["best_length"]}
    if "batch_size" in result["settings"]:
        training["batch_size"] = result["settings"]["batch_size"]
    recipe["training"] = {**recipe.get("training", {}), **training}
    return _train_command(recipe)


def _train_command(recipe: Mapping[str, Any]) -> str:
    """The shortest `difftune train` of a recipe: model, data, and what differs from the defaults."""
    defaults = dict(_flatten(Recipe().to_dict()))
    always = ("model.id", "data.path", "training.learning_rate", "training.max_steps")
    flags = []
    for key, value in _flatten({k: recipe[k] for k in recipe if k in {f.name for f in dataclasses.fields(Recipe)}}):
        known = key in defaults and key not in UNWANTED and value is not None
        if known and (key in always or value != defaults[key]):
            text = value if isinstance(value, str) else json.dumps(value)
            flags.append((always.index(key) if key in always else len(always), f"--{key} {shlex.quote(text)}"))
    flags.sort(key=lambda f: f[0])
    return " ".join(["difftune train", *(f for _, f in flags), "--output runs/final"])


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return found


def _write(folder: Path, template: str, language: str, words: Mapping[str, str], **values: Any) -> Path:
    page = _environment(words).get_template(template).render(language=language, t=words, folder=folder, **values)
    path = folder / "report.html"
    write_text(path, page)
    return path


def _environment(words: Mapping[str, str]) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    missing = words["missing"]

    def finalize(value: Any) -> Any:  # everything printed passes here before it is escaped
        return value if isinstance(value, Markup) else missing if value is None else harmless(str(value))

    def figure(value: Any, metric: str) -> str:
        return METRICS.get(metric, ("neutral", "{:.4g}"))[1].format(value) if is_number(value) else missing

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
            return words["duration.seconds"].format(s=f"{seconds:.1f}" if seconds < 10 else round(seconds))
        if seconds < 3600:
            minutes, rest = divmod(round(seconds), 60)
            return words["duration.minutes"].format(m=minutes, s=rest)
        hours, minutes = divmod(round(seconds / 60), 60)
        return words["duration.hours"].format(h=hours, m=minutes)

    def interval(low: Any, high: Any) -> str:
        return words["range"].format(low=signed(low), high=signed(high))

    def value(found: Any) -> str:
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finalize,
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
        "say": lambda key, **given: words[key].format(**{k: missing if v is None else v for k, v in given.items()}),
        "side": lambda name: words.get(f"side.{name}", name) if name is not None else missing,
        "direction": lambda metric: words[METRICS.get(metric, ("neutral", ""))[0]],
        "metric": lambda metric: words.get(f"metric.{metric}", metric),
        "minus": lambda text: text.replace("-", "−"),
        "flatten": _flatten,
        "created": lambda text: str(text)[:16].replace("T", " "),
    }
    environment.globals |= {"interval": interval, "seed_values": seed_values, "mean": lambda v: mean_spread(list(v))[0]}
    return environment
