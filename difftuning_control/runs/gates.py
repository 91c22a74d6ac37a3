"""Quality gates: the limits of a recipe against the figures of its finished run, on data that was held out.

kid, fidelity, memorisation   of pictures drawn as `difftune evaluate` draws them, means over the seeds
retention_loss                the rise of the loss on held-out bank samples, the mean over the noise bands

A gate is passed or failed by the figure as it was measured; whether that is beyond the noise is said beside it.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from difftuning_control.errors import GatesFailedError, UserError
from difftuning_control.evaluation.comparison import threshold
from difftuning_control.evaluation.metric_table import is_upper_limit
from difftuning_control.recipe.training import GatesConfig
from difftuning_control.runs.record import RunRecord

FIDELITY = ("f1", "cosine", "rmse", "miou", "ssim")  # the main figure of each kind, before those that it has besides


def judge(gates: GatesConfig, side: dict[str, Any]) -> dict[str, Any]:
    """Each limit against a side's figures: `passed` (all of them), `figures` (each with value, limit, at, passed and
    clear), and the `asked` gates.

    `clear` is whether the figure is apart from its limit by more than noise: that of the seeds, or of the rows behind a
    loss; None where it was measured once, so that the noise is not known.

    Args:
        side: with a `summary` and perhaps `forgetting` as in evaluation.json, or `losses` as in a run's record.
    """
    figures = {}
    for name, limit in gates.limits.items():
        value, at_most = figure(name, side), is_upper_limit(_metric_of(name, side))
        known = value is not None and math.isfinite(value)
        passed = value is not None and known and (value <= limit if at_most else value >= limit)
        clear = is_clear(name, side, limit) if known else None
        at = "most" if at_most else "least"
        figures[name] = {"value": value, "limit": limit, "at": at, "passed": passed, "clear": clear}
    passed = all(judged["passed"] for judged in figures.values())
    return {"passed": passed, "figures": figures, "asked": dataclasses.asdict(gates)}


def figure(name: str, side: dict[str, Any]) -> float | None:
    """A gate's figure; None where it was not measured."""
    if name == "retention_loss":
        return retention_loss(side)
    summary = _summary_of(name, side)
    return summary["mean"] if summary is not None else None


def _summary_of(name: str, side: dict[str, Any]) -> dict[str, Any] | None:
    """Mean, spread and number of runs of a gate's figure."""
    return side["summary"].get(_metric_of(name, side))


def _metric_of(name: str, side: dict[str, Any]) -> str:
    """The metric that a gate is on: of fidelity the main figure of the run's conditions."""
    if name != "fidelity":
        return name
    return next((main for main in FIDELITY if main in side["summary"]), FIDELITY[0])


def is_clear(name: str, side: dict[str, Any], limit: float) -> bool | None:
    """Whether a gate's figure is beyond its limit, on either side, by more than noise; None where that is not known."""
    if name == "retention_loss":
        low, high = (side.get("forgetting", {}).get(end) for end in ("low", "high"))
        # the bands share their rows, so the interval of their mean is at most the mean of their intervals
        return not sum(low) / len(low) <= limit <= sum(high) / len(high) if low and high else None
    summary = _summary_of(name, side)
    if summary is None or summary.get("spread") is None:
        return None
    return abs(summary["mean"] - limit) > threshold(summary["runs"], 1) * summary["spread"] / math.sqrt(summary["runs"])


def retention_loss(side: dict[str, Any]) -> float | None:
    """The rise of the loss on held-out bank samples over the base's, the mean over the noise bands."""
    rises: list[float] = side.get("forgetting", {}).get("mean", [])
    bank = side.get("losses", {}).get("bank")
    if not rises and bank is not None:
        rises = [after / before - 1 for before, after in zip(bank["base"]["loss"], bank["tuned"]["loss"])]
    return sum(rises) / len(rises) if rises else None


def failed(judged: dict[str, Any]) -> str:
    """The gates that a run fails, in words: `kid is 0.21, at most 0.1 asked`; empty where it passes."""
    return ", ".join(line for name, line in gate_lines(judged).items() if not judged["figures"][name]["passed"])


def gate_lines(judged: dict[str, Any]) -> dict[str, str]:
    """Each gate in words."""
    return {
        name: f"{name} is {'unknown' if entry['value'] is None else format(entry['value'], '.4g')}, at "
        f"{entry['at']} {entry['limit']:g} asked{' (within the noise)' if entry.get('clear') is False else ''}"
        for name, entry in judged["figures"].items()
    }


def stop_if_failed(judged: dict[str, Any] | None, run: str | Path) -> None:
    """Raises GatesFailedError: if the run was judged and fails."""
    if judged is not None and not judged["passed"]:
        raise GatesFailedError(f"{run} fails its gates ({failed(judged)}); it is marked, and not exported unasked.")


def check_passed(record: RunRecord, run: str | Path) -> None:
    """Refuse a run that failed its gates, or was not judged by those that its recipe has.

    Raises:
        UserError: naming what fails.
    """
    judged = record.gates
    if judged is not None and not judged["passed"]:
        raise UserError(
            f"the run {run} fails its gates ({failed(judged)}); tune it better, or say --despite-gates, which is "
            "written down."
        )
    if judged is None and record.recipe.gates.limits:
        raise UserError(
            f"the run {run} has not been judged by its gates; have it judged with difftune resume, or say "
            "--despite-gates, which is written down."
        )
