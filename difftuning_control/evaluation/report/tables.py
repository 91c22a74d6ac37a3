"""The table of an evaluation: one row a side, one column a figure."""

from __future__ import annotations

from typing import Any

from difftuning_control.evaluation.metric_table import METRICS
from difftuning_control.system.text import harmless


def table_rows(result: dict[str, Any]) -> list[list[str]]:
    """A row with the names of the figures, and one for each side: mean ± standard deviation over seeds; KID × 1000.

    Where pictures of the new domain were not judged, their diversity is left out too.
    """
    sides = [result["base"], *result["sides"]]
    common = [m for m in METRICS.values() if m.cell is not None and all(m.name in s["summary"] for s in sides)]
    shown = [m for m in common if m.name != "diversity"]  # which is of all seeds together
    within = [*(m.heading for m in shown), "diversity"] if common else []
    lines = [["", *within, "bank loss", "apart", "still drawn"]]
    for side in sides:
        row = [harmless(side["name"])]
        for metric in shown:
            value = side["summary"][metric.name]
            mean = metric.as_cell(value["mean"])
            row.append(mean if value["spread"] is None else f"{mean} ±{metric.as_cell(value['spread'])}")
        if within:
            row.append("" if side["diversity"] is None else METRICS["diversity"].as_cell(side["diversity"]))
        rise = side.get("forgetting", {}).get("mean")
        row.append("" if rise is None else f"{sum(rise) / len(rise):+.1%}")
        row.append(f"{side['outside']:.3f}" if "outside" in side else "")
        lines.append([*row, f"{side['still_drawn']:.0%}" if "still_drawn" in side else ""])
    return lines


def table(result: dict[str, Any]) -> str:
    """The summary as text."""
    lines = table_rows(result)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        for line in lines
    )
