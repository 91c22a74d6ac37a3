"""The report of an analysis: the transfer gap, what it says, and what a run learnt and forgot, in one HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from difftuning_control.errors import UserError
from difftuning_control.evaluation.comparison import is_number
from difftuning_control.evaluation.report import findings
from difftuning_control.evaluation.report.commands import pilot_command
from difftuning_control.evaluation.report.language import load_texts
from difftuning_control.evaluation.report.page import quoted, write_page


def write_analysis_report(analysis: Mapping[str, Any], folder: Path, language: str = "en") -> Path:
    """`report.html` of an analysis in its folder.

    Raises:
        UserError: if the analysis is not finished, or the language is unknown.
    """
    texts = load_texts(language)
    if analysis.get("status") != "complete":
        raise UserError(
            f"the analysis is not finished (its status is {quoted(analysis.get('status'))}), so there is nothing to "
            "report; run the same command again."
        )
    advice, gap, forgetting = findings.advice_of(analysis), findings.gap_bands(analysis), analysis.get("forgetting")
    limits = findings.budget_of_run(forgetting) if forgetting and forgetting.get("budget") else []
    command_of = next((code for code in findings.COMPARED if code in advice), None)
    pilot = None
    if command_of:
        recipe = {"model": {"id": analysis["model"]}, "data": {"path": analysis["data"]["path"]}}
        pilot = pilot_command(recipe, findings.COMPARED[command_of])
    return write_page(
        folder,
        "analysis.html.j2",
        language,
        texts,
        analysis=analysis,
        advice=advice,
        bands=gap,
        gap=findings.gap_sentences(gap),
        extremes=findings.extreme_cards(analysis),
        limits=limits,
        limit_sentences=findings.budget_sentences(limits),
        charts=analysis_charts(analysis, texts),
        command_of=command_of,
        pilot=pilot,
        schedule_file=(folder / "schedule.json").is_file(),
    )


def analysis_charts(analysis: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """The SVG of each chart by name, those of a run where one was measured; gap is None where no band was."""
    from difftuning_control.evaluation.report import charts  # brings matplotlib, which nothing else here needs

    u = [i / 20 for i in range(21)]
    paper = {"label": texts["schedule.paper"], "u": u, "psi": u, "xi": [1 - x for x in u]}
    kind = analysis["schedule"].get("kind", "measured")
    label = texts["schedule.measured"] if kind == "measured" else texts["schedule.kind"].format(kind=kind)
    charts_by_name: dict[str, Any] = {
        "gap": charts.gap_chart(analysis, texts) if findings.gap_bands(analysis) else None,
        "loss": charts.loss_chart(analysis, texts),
        "schedule": charts.schedule_chart([{**analysis["schedule"], "label": label}, paper], texts),
    }
    if forgetting := analysis.get("forgetting"):
        item = {**forgetting, "label": "tuned"}
        charts_by_name["forgetting_run"] = charts.forgetting_chart([item], forgetting.get("budget"), texts)
    if staged := analysis.get("staged"):
        values = {m: staged["tuned_above"].get(m, []) for m in ("kid", "domain_hit", "pair_similarity")}
        shown = [m for m, v in values.items() if any(is_number(x) for x in v)]
        charts_by_name["staged"] = [(charts.staged_chart(staged, texts, m), m) for m in shown]
    if multipliers := analysis.get("multipliers"):
        charts_by_name["multipliers_run"] = charts.multipliers_chart(multipliers, texts)
    return charts_by_name
