"""Quality gates: the limits of a recipe against the figures of its finished run, on data that was held out.

kid, fidelity, memorisation   of pictures drawn as `difftune evaluate` draws them, means over the seeds
retention_loss                the rise of the loss on held-out bank samples, the mean over the noise bands

A gate is passed or failed by the figure as it was measured; whether that is beyond the noise is said beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from difftuning_control.errors import GatesFailedError, UserError
from difftuning_control.evaluation.band_losses import LossChanges
from difftuning_control.evaluation.comparison import threshold
from difftuning_control.evaluation.metric_table import is_upper_limit
from difftuning_control.recipe.gates import GatesConfig
from difftuning_control.runs.gate_results import GateResult, GateResults
from difftuning_control.runs.record import RunRecord

FIDELITY = ("f1", "cosine", "rmse", "miou", "ssim")  # the main figure of each kind, before those that it has besides


def judge(gates: GatesConfig, side: Mapping[str, Any], losses: LossChanges | None = None) -> GateResults:
    """Each limit against a side's figures.

    Args:
        side: with a `summary` and perhaps `forgetting`, as in evaluation.json.
        losses: of the run, which say what it forgot where `forgetting` does not.
    """
    results = {}
    for name, limit in gates.limits.items():
        value, at_most = figure(name, side, losses), is_upper_limit(_metric_of(name, side))
        known = value is not None and math.isfinite(value)
        passed = value is not None and known and (value <= limit if at_most else value >= limit)
        clear = is_clear(name, side, limit) if known else None
        at = "most" if at_most else "least"
        results[name] = GateResult(value=value, limit=limit, at=at, passed=passed, clear=clear)
    passed = all(gate.passed for gate in results.values())
    return GateResults(passed=passed, figures=results, asked=dataclasses.asdict(gates))


def figure(name: str, side: Mapping[str, Any], losses: LossChanges | None = None) -> float | None:
    """A gate's figure; None where it was not measured."""
    if name == "retention_loss":
        return retention_loss(losses or {}, side.get("forgetting"))
    summary = _summary_of(name, side)
    return summary["mean"] if summary is not None else None


def _summary_of(name: str, side: Mapping[str, Any]) -> dict[str, Any] | None:
    """Mean, spread and number of runs of a gate's figure."""
    summary: dict[str, Any] | None = side["summary"].get(_metric_of(name, side))
    return summary


def _metric_of(name: str, side: Mapping[str, Any]) -> str:
    """The metric that a gate is on: of fidelity the main figure of the run's conditions."""
    if name != "fidelity":
        return name
    return next((main for main in FIDELITY if main in side["summary"]), FIDELITY[0])


def is_clear(name: str, side: Mapping[str, Any], limit: float) -> bool | None:
    """Whether a gate's figure is beyond its limit, on either side, by more than noise; None where that is not known."""
    if name == "retention_loss":
        low, high = (side.get("forgetting", {}).get(end) for end in ("low", "high"))
        # the bands share their rows, so the interval of their mean is at most the mean of their intervals
        return not sum(low) / len(low) <= limit <= sum(high) / len(high) if low and high else None
    summary = _summary_of(name, side)
    if summary is None or summary.get("spread") is None:
        return None
    return abs(summary["mean"] - limit) > threshold(summary["runs"], 1) * summary["spread"] / math.sqrt(summary["runs"])


def retention_loss(losses: LossChanges, forgetting: Mapping[str, Any] | None = None) -> float | None:
    """The rise of the loss on held-out bank samples over the base's, the mean over the noise bands.

    Args:
        losses: of the run.
        forgetting: as in evaluation.json, which is measured on more rows and comes first.
    """
    rises: list[float] = (forgetting or {}).get("mean", [])
    if not rises and "bank" in losses:
        rises = losses["bank"].rises
    return sum(rises) / len(rises) if rises else None


def stop_if_failed(judged: GateResults | None, run: str | Path) -> None:
    """Raises GatesFailedError: if the run was judged and fails."""
    if judged is not None and not judged.passed:
        raise GatesFailedError(f"{run} fails its gates ({judged.failed}); it is marked, and not exported unasked.")


def check_passed(record: RunRecord, run: str | Path) -> None:
    """Refuse a run that failed its gates, or was not judged by those that its recipe has.

    Raises:
        UserError: naming what fails.
    """
    judged = record.gates
    if judged is not None and not judged.passed:
        raise UserError(
            f"the run {run} fails its gates ({judged.failed}); tune it better, or say --despite-gates, which is "
            "written down."
        )
    if judged is None and record.recipe.gates.limits:
        raise UserError(
            f"the run {run} has not been judged by its gates; have it judged with difftune resume, or say "
            "--despite-gates, which is written down."
        )
