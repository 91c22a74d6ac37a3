"""Which guidance suits a tuned model: ordinary and Domain Guidance at the same scales, chosen by the same search.

Ordinary guidance draws with ε = ε_tuned(∅) + w (ε_tuned(c) − ε_tuned(∅)); Domain Guidance (Domain Guidance: A Simple
Transfer Approach for a Pre-trained Diffusion Model, arXiv:2504.01521) takes ε(∅) from the pretrained model instead.
Each way's scale w is the one of the lowest KID on the prompts of the search with the first seed; the figures are those
on the final prompts, over all seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from difftuning_control.evaluation.figures import summarise
from difftuning_control.pilot_judge import Judge

if TYPE_CHECKING:
    from difftuning_control.families.family import Family

ORDINARY, DOMAIN = "ordinary", "domain"
KEPT = ("kid", "domain_hit")  # of the search


def search_scales(judge: Judge, base: Family, tuned: Family, seed: int, scales: Sequence[float]) -> list[dict]:
    """Every scale in both ways on the prompts of the search: rows of way, scale, kid and domain_hit."""
    rows = []
    for way in (ORDINARY, DOMAIN):
        for scale in scales:
            found = judge.figures(tuned, seed, False, scale, base if way == DOMAIN else None)[0]
            rows.append({"way": way, "scale": scale} | {name: found[name] for name in KEPT})
    return rows


def best_scales(searched: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The scale of the lowest KID, for each way."""
    found = {way: [row for row in searched if row["way"] == way] for way in (ORDINARY, DOMAIN)}
    return {way: min(rows, key=lambda row: row["kid"])["scale"] for way, rows in found.items()}


def judge_scales(
    judge: Judge, base: Family, tuned: Family, seed: int, scales: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Figures on the final prompts, each way at its scale."""
    return {
        way: {"seed": seed} | judge.figures(tuned, seed, True, scale, base if way == DOMAIN else None)[0]
        for way, scale in scales.items()
    }


def guidance_of(guided: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A side's guidance as `pilot.json` holds it: the search, and each way's scale, runs and summary.

    Args:
        guided: one entry a seed with `search` (of the first), `scales` and `ways`.
    """
    ways = {
        way: {"scale": scale, "runs": (runs := [entry["ways"][way] for entry in guided]), "summary": summarise(runs)}
        for way, scale in guided[0]["scales"].items()
    }
    return {"search": guided[0]["search"], "ways": ways}
