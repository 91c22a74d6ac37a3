"""The voting page of a pilot: pairs of pictures of two sides without their names, for eyes that do not know them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from difftuning_control.evaluation.comparison import PLAIN, lower_is_better, seed_values, verdict
from difftuning_control.evaluation.pilot_figures import VOTE
from difftuning_control.evaluation.report.language import load_texts
from difftuning_control.evaluation.report.page import write_page
from difftuning_control.evaluation.report.pictures import data_uri
from difftuning_control.evaluation.report.pilot_run import PilotRun
from difftuning_control.system.text import harmless

SEED = 0  # of the order of pairs, and of left and right


def rival_of(pilot: PilotRun) -> str | None:
    """The side that is shown beside plain fine-tuning: the verdict's, or where that is plain the best of the others;
    None where plain fine-tuning has nothing beside it."""
    sides = {side["name"]: side for side in pilot.sides}
    if PLAIN not in sides:
        return None
    named = verdict(pilot)["side"]
    if named not in (None, PLAIN):
        return str(named)
    means = {n: fmean(v.values()) for n, s in sides.items() if n != PLAIN and (v := seed_values(s, pilot.primary))}
    best = min if lower_is_better(pilot.primary) else max
    return best(means, key=lambda name: means[name]) if means else None


def vote_pairs(pilot: PilotRun, folder: Path, rival: str) -> list[dict[str, Any]]:
    """Every prompt that the report shows, at every seed whose pictures were kept, in an order without meaning.

    Each has `prompt`, the `true` picture (None without one), `left`, `right`, and `first`, which says whether plain
    fine-tuning drew the left one.

    Raises:
        UserError: if a picture is missing.
    """
    pictures = pilot.pictures
    if pictures is None:
        return []
    truth = next((row.files for row in pictures.rows if row.name == "truth"), None)
    true = [data_uri(folder, file) for file in truth] if truth is not None else [None] * len(pictures.prompts)
    sides = {side["name"]: side for side in pilot.sides}
    places = [_places(sides[name]) for name in (PLAIN, rival)]
    chance, pairs = random.Random(SEED), []
    seeds = [s for s in sorted(set(places[0]) & set(places[1])) if all((folder / p[s]).is_dir() for p in places)]
    for seed in seeds:
        for i, prompt in enumerate(pictures.prompts):
            drawn = [data_uri(folder, f"{place[seed]}/{i}.png") for place in places]
            first = chance.random() < 0.5
            left, right = drawn if first else reversed(drawn)
            pairs.append({"prompt": harmless(prompt), "true": true[i], "left": left, "right": right, "first": first})
    chance.shuffle(pairs)
    return pairs


def _places(side: Mapping[str, Any]) -> dict[int, str]:
    """Where the pictures of a side's best length lie in the pilot's folder, by seed."""
    best = side["best_length"]
    return {r["seed"]: f"{r['folder']}/pictures-{best}" for r in side["runs"] if r["steps"] == best}


def write_vote_page(pilot: PilotRun, folder: Path, language: str = "en") -> Path | None:
    """`vote.html` in a pilot's folder; None where there is no pair to show.

    Raises:
        UserError: if a picture is missing, or the language is unknown.
    """
    rival = rival_of(pilot)
    pairs = vote_pairs(pilot, folder, rival) if rival is not None else []
    if not pairs:
        return None
    return write_page(
        folder, "vote.html.j2", language, load_texts(language), VOTE, pilot=pilot, sides=[PLAIN, rival], pairs=pairs
    )
