"""The grid of a comparison, the two pictures of a blind vote, and what the votes say."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from PIL import Image

from difftuning_control.errors import UserError
from difftuning_control.evaluation.report.lines import Line, line_chart
from difftuning_control.recipe.inputs import MAX_SEED
from difftuning_control.runs.kept import kept_steps, place_of_run, step_folder
from difftuning_control.runs.record import RunRecord, read_run
from difftuning_control.runs.votes import TRAINED, Tally, add_vote, tallies
from difftuning_control.verbs.ui.drawing import BASE, Drawing
from difftuning_control.verbs.ui.painter import Painter
from difftuning_control.verbs.ui.places import Places
from difftuning_control.verbs.ui.render import render
from difftuning_control.verbs.ui.runs_view import finished_runs

SHOWN = 512  # pixels of a picture's side
WHO = "Who draws at each noise level: 1 is pure noise, where the layout is drawn, 0 the finished picture"
LEFT, RIGHT, SAME = "left", "right", "same"


def sides_of(places: Places) -> list[str]:
    """What can draw: the base, the finished runs, and the steps that they kept."""
    found = [BASE]
    for row in finished_runs(places):
        found.append(row["run"])
        steps = kept_steps(places.run(row["run"]))
        found += [f"{row['run']}/{step_folder(step)}" for step in steps if step != row["steps"]]
    return found


def first_sides(places: Places) -> list[str]:
    """Who draws when the page is opened: the base, and the first run that needs no photo."""
    rows = [row for row in finished_runs(places) if row["method"] != "controlnet"]
    return [BASE, *(row["run"] for row in rows[:1])]


def prompts_of(places: Places, sides: Sequence[str], most: int = 4) -> list[str]:
    """Prompts to begin with: those of the first run's sample grids."""
    return next((record.prompts[:most] for record in _records(places, sides) if record.prompts), [])


def sampling_of(places: Places, sides: Sequence[str]) -> tuple[int, float]:
    """Steps and guidance to begin with: those of the first run's sample grids, which are few of a distilled model."""
    record = next(_records(places, sides), None)
    if record is None:
        return Drawing.steps, Drawing.guidance
    training = record.recipe.training
    return training.sample_steps, training.sample_guidance_scale


def _records(places: Places, sides: Sequence[str]) -> Iterator[RunRecord]:
    for side in sides:
        record = read_run(place_of_run(places.run(side))[0]) if side != BASE else None
        if record is not None:
            yield record


def grid(
    drawing: Drawing,
    drawn: Mapping[str, Sequence[Image.Image]],
    model: str,
    conditions: Mapping[str, Image.Image] | None = None,
) -> str:
    """A row for each side, a column for each prompt.

    Args:
        model: the base.
        conditions: what ControlNets were shown, by side.
    """
    shown = {side: picture_data(condition) for side, condition in (conditions or {}).items()}
    acting = _who_draws(drawing, conditions or {})
    rows = [(side, [picture_data(p) for p in pictures], shown.get(side)) for side, pictures in drawn.items()]
    return render(
        "compare",
        rows=rows,
        prompts=drawing.prompts,
        drawing=drawing,
        model=model,
        missing=[side for side in drawing.sides if side not in drawn],
        chart=line_chart(WHO, acting, "noise level u", (0, 1), 460, 200) if acting else "",
        acting=acting,
    )


def _who_draws(drawing: Drawing, conditions: Mapping[str, Image.Image]) -> list[Line]:
    """What acts at each noise level, as lines over u; none where all acts everywhere."""
    u = [i / 100 for i in range(101)]
    lines = []
    runs = any(side != BASE and side not in conditions for side in drawing.sides)
    if runs and (drawing.adapter_schedule is not None or drawing.hand_over > 0):
        acts = [_at(drawing.adapter_schedule, x) if x > drawing.hand_over or not drawing.hand_over else 0.0 for x in u]
        lines.append(Line("the run", u, acts, "target"))
    if conditions and drawing.control_schedule is not None:
        lines.append(Line("the ControlNet", u, [_at(drawing.control_schedule, x) for x in u], "bank"))
    return lines


def _at(table: Mapping[str, Any] | None, u: float) -> float:
    """The strength of a table at u."""
    if table is None:
        return 1.0
    points = list(zip(table["u"], table["strength"]))
    (left, low), (right, high) = next(pair for pair in pairwise(points) if u <= pair[1][0])
    return low + (high - low) * (u - left) / (right - left)


def picture_data(picture: Image.Image) -> str:
    """A picture inside of the page; small ones exactly, with pixels that stay square."""
    buffer, small = io.BytesIO(), picture.copy()
    small.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
    kind = "PNG" if max(picture.size) <= 128 else "JPEG"
    small.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --- votes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two pictures whose sides only the server knows.

    Args:
        run: whose vote it is.
        against: the other side.
        run_is_left: which of them is on the left.
        drawing: of one prompt.
    """

    run: str
    against: str
    run_is_left: bool
    drawing: Drawing


def next_pair(painter: Painter, drawing: Drawing, run: str, against: str) -> tuple[Pair, str]:
    """A pair for a prompt and a seed that are drawn by chance, and how it is shown.

    Raises:
        UserError: if there are not two sides, or one cannot draw.
    """
    if run in (BASE, against):
        raise UserError("a vote is between a run and something else; choose two that differ, a run as the first.")
    chance = random.SystemRandom()
    one = replace(
        drawing, sides=(run, against), prompts=(chance.choice(drawing.prompts),), seed=chance.randrange(MAX_SEED)
    )
    found = painter.draw(one)
    if len(found) < 2:
        raise UserError("the pair was stopped; draw another.")
    pair = Pair(run, against, bool(chance.getrandbits(1)), one)
    order = (run, against) if pair.run_is_left else (against, run)
    return pair, render("pair", pictures=[picture_data(found[side][0]) for side in order], prompt=one.prompts[0])


def vote(places: Places, pair: Pair | None, said: str) -> list[Tally]:
    """Note what was said of a pair with its run.

    Raises:
        UserError: if there is no pair.
    """
    if pair is None:
        raise UserError("there is no pair to vote on; draw one first.")
    if said not in (LEFT, RIGHT, SAME):
        raise UserError(f"the vote is {said!r}; expected left, right or same.")
    preferred = None if said == SAME else (said == LEFT) == pair.run_is_left
    drawn: dict[str, Any] = {k: v for k, v in vars(pair.drawing).items() if k not in ("sides", "prompts")}
    drawn |= {name: path.name for name in ("photo", "begin") if (path := drawn[name]) is not None}
    folder, step = place_of_run(places.run(pair.run))
    trained = _trained_steps(places, pair.run)
    drawn |= {"prompt": pair.drawing.prompts[0], "kept_step": step, TRAINED: trained}
    return of_side(add_vote(folder, pair.against, preferred, drawn), trained)


def of_side(found: Sequence[Tally], trained: int | None) -> list[Tally]:
    """The tallies of the weights of so many steps, and those of old votes that do not say of which."""
    return [tally for tally in found if tally.trained in (trained, None)]


def _trained_steps(places: Places, side: str) -> int | None:
    """How many steps the weights of a run, or of a step that it kept, were trained."""
    folder, step = place_of_run(places.run(side))
    record = read_run(folder)
    return step if step is not None or record is None else record.steps


def told(run: str, found: Sequence[Tally]) -> str:
    """The votes in sentences."""
    return render("votes", run=run, tallies=found)


def votes_of(places: Places, run: str) -> str:
    """What the votes of a run say so far.

    Raises:
        UserError: if they cannot be read.
    """
    if run == BASE:
        return told(run, [])
    return told(run, of_side(tallies(place_of_run(places.run(run))[0]), _trained_steps(places, run)))
