"""The guidance that suits a side of a pilot: two ways, each at the scale that a search finds, and the figures of both.

Ordinary guidance draws with ε = ε_tuned(∅) + w (ε_tuned(c) − ε_tuned(∅)); Domain Guidance (Domain Guidance: A Simple
Transfer Approach for a Pre-trained Diffusion Model, arXiv:2504.01521) takes ε(∅) from the pretrained model instead.
Each way's scale w is the one of the lowest mean KID over the seeds on the prompts of the search (see `race`); the
figures are those on the final prompts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from difftuning_control.evaluation.figures import summarise
from difftuning_control.runs.finished import tuned_model
from difftuning_control.system.durable import write_json
from difftuning_control.verbs.pilot.race import Row, race
from difftuning_control.verbs.pilot.settings import pilot_identity

if TYPE_CHECKING:
    from difftuning_control.verbs.pilot.side_runs import SideRuns

ORDINARY, DOMAIN = "ordinary", "domain"
KEPT = ("kid", "domain_hit")  # of the search


@dataclass
class GuidedRuns:
    """A side's runs of all seeds, drawn with other guidance; what is drawn is kept beside each run.

    Args:
        runs: of all sides.
        side, rate, length: whose weights.
    """

    runs: SideRuns
    side: str
    rate: float
    length: int

    def draw(self, seed: int, asked: Sequence[tuple[str, float]], final: bool) -> list[Row]:
        """Rows of `way`, `scale`, `seed` and the figures of one run, one for each way and scale that is asked."""
        runs = self.runs
        recipe = runs.recipe_of(self.side, self.rate, seed)
        folder = Path(recipe.output)
        done, identity = folder / "guidance.json", [pilot_identity(recipe, runs.config), self.length]
        kept: dict[str, Any] = {"identity": identity, "search": [], "final": []}
        if done.exists():
            found = json.loads(done.read_text(encoding="utf-8"))
            kept = found if found["identity"] == identity else kept
        rows: list[Row] = kept["final" if final else "search"]
        missing = [pair for pair in asked if pair not in {_of(row) for row in rows}]
        if missing:
            step = None if self.length == runs.lengths[-1] else self.length
            record, phases = runs.with_weights(recipe, step), runs.clock.phases
            with (
                phases("sampling"),
                tuned_model(runs.family, folder, record, step) as tuned,
                phases.counting(tuned.denoiser),
            ):
                for way, scale in missing:
                    source = runs.family if way == DOMAIN else None
                    found = runs.judge.figures(tuned, seed, final, scale, source)[0]
                    found = found if final else {name: found[name] for name in KEPT}
                    rows.append({"way": way, "scale": scale, "seed": seed} | found)
            write_json(done, kept)
            runs.clock.spent()
        return [next(row for row in rows if _of(row) == pair) for pair in asked]


def guidance_of_side(runs: SideRuns, side: str, rate: float, length: int) -> dict[str, Any]:
    """A side's guidance as `pilot.json` holds it: the search, and of both ways the scale, the rows and their summary.

    Args:
        rate, length: learning rate and steps at which the side is at its best.
    """
    guided = GuidedRuns(runs, side, rate, length)
    first = runs.config.seeds[0]
    candidates = [(way, scale) for way in (ORDINARY, DOMAIN) for scale in runs.config.guidance_scales]
    tried = {_of(row): [row] for row in guided.draw(first, candidates, final=False)}
    scales: dict[str, float] = {}
    for way in (ORDINARY, DOMAIN):
        of_way = {pair: rows for pair, rows in tried.items() if pair[0] == way}
        best = race(of_way, runs.config.seeds, _mean_kid, lambda pair, seed: guided.draw(seed, [pair], final=False))
        assert best is not None  # no draw fails
        scales[way] = best[1]
    final = [guided.draw(seed, list(scales.items()), final=True) for seed in runs.config.seeds]
    ways = {
        way: {"scale": scale, "runs": (drawn := [rows[i] for rows in final]), "summary": summarise(drawn)}
        for i, (way, scale) in enumerate(scales.items())
    }
    return {"steps": length, "search": [_over_seeds(rows) for rows in tried.values()], "ways": ways}


def best_way(guidance: dict[str, Any]) -> tuple[str, float]:
    """The way of guidance with the lowest KID in the search, and its scale."""
    way = min(guidance["search"], key=lambda row: row["kid"])["way"]
    return way, guidance["ways"][way]["scale"]


def _of(row: Row) -> tuple[str, float]:
    return row["way"], row["scale"]


def _mean_kid(rows: Sequence[Row]) -> float:
    return fmean(row["kid"] for row in rows)


def _over_seeds(rows: Sequence[Row]) -> Row:
    """One row of the search: means over the seeds that were tried."""
    way, scale = _of(rows[0])
    return {"way": way, "scale": scale, "seeds": len(rows)} | {name: fmean(row[name] for row in rows) for name in KEPT}
