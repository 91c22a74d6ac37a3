"""The table of an evaluation: one row a side, one column a figure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from difftuning_control.system.text import harmless

COLUMNS: dict[str, Callable[[float], str]] = {
    "kid": lambda v: f"{1000 * v:.1f}",
    "fid": lambda v: f"{v:.1f}",
    "domain_hit": lambda v: f"{v:.0%}",
    "pair_similarity": lambda v: f"{v:.3f}",
    "memorisation": lambda v: f"{v:.3f}",
    "coverage": lambda v: f"{v:.2f}",
    "diversity": lambda v: f"{v:.3f}",
    "clip_score": lambda v: f"{v:.1f}",
    **dict.fromkeys(("f1", "ssim", "rmse", "cosine", "miou"), lambda v: f"{v:.3f}"),
}


def cells(result: dict[str, Any]) -> list[list[str]]:
    """A row with the names of the figures, and one for each side: mean ± standard deviation over seeds; KID × 1000."""
    sides = [result["base"], *result["sides"]]
    names = [c for c in COLUMNS if c != "diversity" and all(c in s["summary"] for s in sides)]
    lines = [["", *("kid ×1000" if n == "kid" else n for n in names), "diversity", "bank loss", "apart"]]
    for side in sides:
        row = [harmless(side["name"])]
        for name in names:
            value = side["summary"][name]
            shown = COLUMNS[name](value["mean"])
            row.append(shown if value["spread"] is None else f"{shown} ±{COLUMNS[name](value['spread'])}")
        row.append("" if side["diversity"] is None else COLUMNS["diversity"](side["diversity"]))
        rise = side.get("forgetting", {}).get("mean")
        row.append("" if rise is None else f"{sum(rise) / len(rise):+.1%}")
        lines.append([*row, f"{side['outside']:.3f}" if "outside" in side else ""])
    return lines


def table(result: dict[str, Any]) -> str:
    """The summary as text."""
    lines = cells(result)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        for line in lines
    )
