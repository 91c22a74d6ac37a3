"""The guidance that suits a side of a pilot: two ways or three, each at the scale that a search finds.

Ordinary guidance draws with ε = ε_tuned(∅) + w (ε_tuned(c) − ε_tuned(∅)); Domain Guidance (Domain Guidance: A Simple
Transfer Approach for a Pre-trained Diffusion Model, arXiv:2504.01521) takes ε(∅) from the pretrained model instead, and
a mixture of both from the model with the adapter at a part of its strength. Each way's scale w is the one of the lowest
mean KID over the seeds on the prompts of the search (see `race`); the figures are those on the final prompts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from difftuning_control.evaluation.figures import summarise
from difftuning_control.recipe.studies import PilotConfig
from difftuning_control.runs.finished import tuned_model
from difftuning_control.system.durable import write_json
from difftuning_control.verbs.pilot.judge import Guidance
from difftuning_control.verbs.pilot.race import Row, race
from difftuning_control.verbs.pilot.settings import pilot_identity

if TYPE_CHECKING:
    from difftuning_control.verbs.pilot.side_runs import SideRuns

ORDINARY, DOMAIN, MIXTURE = "ordinary", "domain", "mixture"
KEPT = ("kid", "domain_hit")  # of the search


def strengths_of(config: PilotConfig) -> dict[str, float]:
    """Of each way that a pilot tries, the strength of what was tuned in the unconditional branch."""
    strengths = {ORDINARY: 1.0, DOMAIN: 0.0}
    return strengths if config.unconditional_strength is None else strengths | {MIXTURE: config.unconditional_strength}


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
        runs, strengths = self.runs, strengths_of(self.runs.config)
        recipe = runs.recipe_of(self.side, self.rate, seed)
        folder = Path(recipe.output)
        done, identity = folder / "guidance.json", [pilot_identity(recipe, runs.config), self.length]
        kept: dict[str, Any] = {"identity": identity, "search": [], "final": []}
        if done.exists():
            found = json.loads(done.read_text(encoding="utf-8"))
            kept = found if found["identity"] == identity else kept
        part = "final" if final else "search"
        rows: list[Row] = [row for row in kept[part] if row["strength"] == strengths.get(row["way"])]
        kept[part] = rows  # without a mixture of another strength
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
                    guidance = Guidance(scale, runs.family, strengths[way])
                    found = runs.judge.figures(tuned, seed, final, guidance)[0]
                    found = found if final else {name: found[name] for name in KEPT}
                    rows.append({"way": way, "scale": scale, "strength": strengths[way], "seed": seed} | found)
            write_json(done, kept)
            runs.clock.spent()
        return [next(row for row in rows if _of(row) == pair) for pair in asked]


def guidance_of_side(runs: SideRuns, side: str, rate: float, length: int) -> dict[str, Any]:
    """A side's guidance as `pilot.json` holds it: the search, and of each way the scale, the rows and their summary.

    Args:
        rate, length: learning rate and steps at which the side is at its best.
    """
    guided = GuidedRuns(runs, side, rate, length)
    first, ways = runs.config.seeds[0], list(strengths_of(runs.config))
    candidates = [(way, scale) for way in ways for scale in runs.config.guidance_scales]
    tried = {_of(row): [row] for row in guided.draw(first, candidates, final=False)}
    scales: dict[str, float] = {}
    for way in ways:
        of_way = {pair: rows for pair, rows in tried.items() if pair[0] == way}
        best = race(of_way, runs.config.seeds, _mean_kid, lambda pair, seed: guided.draw(seed, [pair], final=False))
        assert best is not None  # no draw fails
        scales[way] = best[1]
    final = [guided.draw(seed, list(scales.items()), final=True) for seed in runs.config.seeds]
    chosen = {
        way: {"scale": scale, "runs": (drawn := [rows[i] for rows in final]), "summary": summarise(_figures(drawn))}
        for i, (way, scale) in enumerate(scales.items())
    }
    return {"steps": length, "search": [_over_seeds(rows) for rows in tried.values()], "ways": chosen}


def best_way(guidance: dict[str, Any]) -> tuple[str, float]:
    """The way of guidance that had the lowest KID in the search at its scale, and that scale.

    Other scales do not count: a figure of one seed may be lower than a mean over all, where the others are harder.
    """
    scales = {way: drawn["scale"] for way, drawn in guidance["ways"].items()}
    chosen = [row for row in guidance["search"] if row["scale"] == scales[row["way"]]]
    return _of(min(chosen, key=lambda row: row["kid"]))


def _of(row: Row) -> tuple[str, float]:
    return row["way"], row["scale"]


def _figures(rows: Sequence[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name not in ("way", "scale", "strength")} for row in rows]


def _mean_kid(rows: Sequence[Row]) -> float:
    return fmean(row["kid"] for row in rows)


def _over_seeds(rows: Sequence[Row]) -> Row:
    """One row of the search: means over the seeds that were tried."""
    way, scale = _of(rows[0])
    return {"way": way, "scale": scale, "seeds": len(rows)} | {name: fmean(row[name] for row in rows) for name in KEPT}
