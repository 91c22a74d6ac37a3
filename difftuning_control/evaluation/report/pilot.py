"""The report of a pilot: its verdict, its figures, its pictures and what to do next, in one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from difftuning_control.errors import UserError
from difftuning_control.evaluation.band_losses import losses_at_best
from difftuning_control.evaluation.comparison import PLAIN, compare_sides, is_number, seed_values, verdict
from difftuning_control.evaluation.metric_table import METRICS
from difftuning_control.evaluation.pilot_figures import PilotBudget, is_at_an_end
from difftuning_control.evaluation.report import findings
from difftuning_control.evaluation.report.analysis import analysis_charts
from difftuning_control.evaluation.report.language import load_texts
from difftuning_control.evaluation.report.loss_tables import loss_tables
from difftuning_control.evaluation.report.page import flatten, quoted, write_page
from difftuning_control.evaluation.report.pictures import picture_blocks
from difftuning_control.evaluation.report.pilot_run import PilotRun
from difftuning_control.evaluation.report.pilot_steps import next_steps
from difftuning_control.evaluation.report.vote import write_vote_page


def write_pilot_report(pilot: PilotRun, folder: Path, language: str = "en") -> Path:
    """`report.html` of a pilot in its folder, which holds the pictures that its record names, and `vote.html`.

    Raises:
        UserError: if the pilot is not finished, a picture is missing, or the language is unknown.
    """
    texts = load_texts(language)
    _need_complete(pilot)
    sides, best = list(pilot.sides), verdict(pilot)
    by_name = {s["name"]: s for s in sides}
    rises = [r for s in sides if (r := findings.loss_change(s, "bank")) is not None]
    lengths = sorted({r["steps"] for s in sides for r in s["runs"]})
    analysis, budget, base = pilot.analysis, pilot.budget, pilot.base
    chosen = by_name.get(best["side"])
    gap = findings.gap_bands(analysis) if analysis else []
    told = [r for r in rises if r["label"] in (PLAIN, best["side"])]
    pictures = picture_blocks(pilot.pictures, folder)
    voting = write_vote_page(pilot, folder, language)
    return write_page(
        folder,
        "pilot.html.j2",
        language,
        texts,
        pilot=pilot,
        verdict=best,
        chosen=chosen,
        by_name=by_name,
        charts=_charts(pilot, rises, len(lengths) > 1, texts),
        lengths=lengths,
        rises=rises,
        rise={r["label"]: findings.mean_change(r) for r in rises},
        forgetting=[*filter(None, map(findings.forgetting_sentence, told))],
        gap=findings.gap_sentences(gap),
        advice=findings.advice_of(analysis) if analysis else [],
        compared=findings.compared_already(by_name),
        metrics=_measured([base, *(r for s in sides for r in s["runs"])]),
        pictures=pictures,
        vote=None if voting is None else voting.name,
        analysis=analysis,
        budget=budget,
        limits=_limits(budget, by_name) if budget is not None else None,
        bands=loss_tables({s["name"]: losses_at_best(s) for s in sides}),
        settings=[*flatten(pilot.settings, "pilot."), *flatten(pilot.recipe_values or {})],
        steps=next_steps(pilot, best, by_name, bool(pictures)),
        searched=_measured([row for s in sides for row in s["search"]]),
        over_seeds=any("seeds" in row for s in sides for row in s["search"]),  # not in records of earlier versions
        at_the_end=[s for s in sides if _at_the_end(s)],
        judge=base.get("domain_judge"),
        guidance=_guidance(sides, pilot.settings.get("lengths", [])),
        outside=_outside(pilot, folder),
        analysis_file=next((n for n in ("analysis.json", "analysis/analysis.json") if (folder / n).is_file()), None),
    )


def _charts(
    pilot: PilotRun, rises: Sequence[Mapping[str, Any]], by_length: bool, texts: Mapping[str, str]
) -> dict[str, Any]:
    """The charts of the page, as SVG.

    Args:
        rises: what each side forgot, by `findings.loss_change`.
        by_length: also the figures over the lengths of the runs.
    """
    from difftuning_control.evaluation.report import charts  # brings matplotlib, which nothing else here needs

    sides, primary, budget = list(pilot.sides), pilot.primary, pilot.budget
    shown = [primary, *(m for m in ("domain_hit", "pair_similarity", "bank_loss") if m != primary)]
    shown = [m for m in shown if any(seed_values(s, m) for s in sides)]
    drawn: dict[str, Any] = {
        "sides": [(charts.sides_chart(sides, m, texts, pilot.base.get(m)), m) for m in shown],
        "lengths": [(charts.length_chart(sides, m, texts), m) for m in shown[:2]] if by_length else [],
        "forgetting": None,
    }
    if rises:
        allowed = budget.allowed if budget is not None and len(budget.allowed) == len(rises[0]["u"]) else None
        drawn["forgetting"] = charts.forgetting_chart(rises, allowed, texts)
    if budget is not None and budget.multipliers:
        count = len(budget.allowed)
        u = [(i + 0.5) / count for i in range(count)]
        drawn["multipliers"] = charts.multipliers_chart({"u": u, **budget.multipliers}, texts)
    return drawn | (analysis_charts(pilot.analysis, texts) if pilot.analysis else {})


def _limits(budget: PilotBudget, by_name: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Whether the budget was kept, band by band, and what it cost."""
    limited, plain = by_name.get(budget.side), by_name.get(PLAIN)
    rows = findings.budget_of_pilot(budget, limited)
    if limited is not None and plain is not None:  # at the length that the price is of
        plain = {**plain, "best_length": limited["best_length"]}
    cost = findings.budget_cost(limited, plain, budget.target_cost, len(by_name) - 1)
    return {"rows": rows, "sentences": [*findings.budget_sentences(rows), *filter(None, [cost])]}


def _need_complete(pilot: PilotRun) -> None:
    again = "run the same command again, which goes on where it stopped."
    if pilot.status != "complete":
        raise UserError(f"the pilot is not finished (its status is {quoted(pilot.status)}); {again}")
    if not pilot.sides:
        raise UserError(f"the pilot has no side that was tuned, so there is nothing to report; {again}")
    seeds, lengths = pilot.settings.get("seeds", []), pilot.settings.get("lengths", [])
    for side in pilot.sides:
        done = {(r["seed"], r["steps"]) for r in side["runs"]}
        absent = [(s, n) for s in seeds for n in lengths if (s, n) not in done]
        if not side["runs"] or not any(n == side["best_length"] for _, n in done):
            raise UserError(f"the pilot is not finished (the side {quoted(side['name'])} has no finished run); {again}")
        if absent:
            missing = f"the side {quoted(side['name'])} lacks seed {absent[0][0]} at {absent[0][1]} steps"
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise UserError(f"the pilot is not finished ({missing}{more}); {again}")


def _guidance(sides: Sequence[Mapping[str, Any]], lengths: Sequence[int]) -> dict[str, Any] | None:
    """Each side's ways of guidance and how the others compare with the ordinary one; None if none was tried."""
    tables = []
    for side in sides:
        if not side.get("guidance"):
            continue
        rows: list[dict[str, Any]] = []
        for way, drawn in side["guidance"]["ways"].items():
            steps = side["guidance"].get("steps", max(lengths))
            runs = [row | {"steps": steps} for row in drawn["runs"]]
            row = {"name": way, "way": way, "scale": drawn["scale"], "runs": runs, "best_length": steps}
            compared = len(sides) * (len(side["guidance"]["ways"]) - 1)
            rows.append(row | {"against": compare_sides(row, rows[0], "kid", compared) if rows else None})
        tables.append({"name": side["name"], "rows": rows})
    metrics = [
        m
        for m in ("kid", "domain_hit", "pair_similarity", "memorisation")
        if any(seed_values(row, m) for table in tables for row in table["rows"])
    ]
    return {"sides": tables, "metrics": metrics} if tables else None


def _outside(pilot: PilotRun, folder: Path) -> dict[str, Any] | None:
    """What the base and the sides draw outside the new domain; None if they were not asked."""
    if pilot.outside is None:
        return None
    asked = [("base", pilot.base.get("outside")), *((side["name"], side.get("outside")) for side in pilot.sides)]
    rows = [
        {"name": name, "runs": [{**row, "steps": 0} for row in drawn["runs"]], "best_length": 0}
        for name, drawn in asked
        if drawn
    ]
    pictures, metrics = picture_blocks(pilot.outside, folder), ("outside_kid", "still_drawn")
    return {"rows": rows, "metrics": metrics, "pictures": pictures, "count": dict(asked)["base"]["prompts"]}


def _at_the_end(side: Mapping[str, Any]) -> bool:
    """Whether the chosen learning rate is the lowest or the highest of several that were tried."""
    tried = {row["learning_rate"] for row in side["search"]}.union(side.get("diverged", ()))
    return is_at_an_end(side["learning_rate"], tried)


def _measured(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [m for m in METRICS if any(is_number(row.get(m)) for row in rows)]
