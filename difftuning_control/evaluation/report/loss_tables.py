"""Tables of a report: losses by noise band, for the target and for the bank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def loss_tables(sides: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
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
