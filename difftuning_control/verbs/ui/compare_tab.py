"""The tab of comparisons: a grid of pictures from equal noise, and blind votes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from difftuning_control.verbs.ui.compare_view import (
    SAME,
    Pair,
    first_sides,
    grid,
    next_pair,
    prompts_of,
    sampling_of,
    sides_of,
    told,
    vote,
    votes_of,
)
from difftuning_control.verbs.ui.drawing import BASE, Drawing, points_of
from difftuning_control.verbs.ui.importing import begin_importing
from difftuning_control.verbs.ui.look import PICK
from difftuning_control.verbs.ui.render import picked, render
from difftuning_control.verbs.ui.saying import mistakes
from difftuning_control.verbs.ui.studio import Studio

OVER = "pairs u:strength, such as 0:0, 0.5:1, 1:1; u is 1 in pure noise, where the layout is drawn"


def compare_tab(studio: Studio, tab: gr.Tab) -> None:
    """Fill the tab, inside of it."""
    places, painter = studio.places, studio.painter
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            sides = gr.Dropdown([BASE], value=[BASE], multiselect=True, label="Who draws", elem_id="sides")
            prompts = gr.Textbox(
                label="Prompts", lines=4, placeholder="one a line, such as: red apple", elem_id="prompts"
            )
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
                halt = gr.Button("Stop (space)", visible=False, elem_id="halt", min_width=120)
            sliders = _sliders()
        with gr.Column(scale=3, min_width=300):
            shown = gr.HTML(elem_id="comparison", min_height=120, js_on_load=PICK)
            with gr.Accordion("Vote blind", open=False, visible=False) as voting:
                with gr.Row():
                    run = gr.Dropdown([], label="This run", min_width=140)
                    against = gr.Dropdown([BASE], value=BASE, label="against", min_width=140)
                    begin = gr.Button("Draw a pair", size="sm", min_width=100, elem_id="begin")
                pair_shown = gr.HTML(js_on_load=PICK, elem_id="pair")
                same = gr.Button("No difference", size="sm", visible=False, elem_id="same")
                result = gr.HTML(elem_id="votes")
    pair, has_drawn, has_set = gr.State(None), gr.State(False), gr.State(False)  # the last: steps or guidance
    settings = [sides, prompts, *sliders.values()]

    def arrive(now: list[str], text: str, voted: str | None, other: str, drawn_before: bool, is_set: bool) -> list[Any]:
        begin_importing()
        known = sides_of(places)
        runs = [side for side in known if side != BASE]
        chosen = [side for side in now if side in known]
        if chosen in ([], [BASE]) and runs:
            chosen = first_sides(places)
        text = text or "\n".join(prompts_of(places, chosen))
        mine = voted if voted in runs else next(iter(chosen[1:]), None)
        boxes = [(known, chosen), (runs, mine), (known, other if other in known else BASE)]
        updates = [gr.update(choices=choices, value=value) for choices, value in boxes]
        page = gr.skip() if drawn_before else render("nothing_drawn", has_runs=bool(runs))
        can_vote = gr.update(visible=bool(runs))
        sampling = [gr.skip()] * 2 if drawn_before or is_set else sampling_of(places, chosen)
        return [updates[0], text, updates[1], updates[2], votes_so_far(mine), page, can_vote, *sampling]

    def votes_so_far(voted: str | None) -> str:
        with mistakes():
            return votes_of(places, voted) if voted else ""

    def asked(names: list[str], text: str, *values: Any) -> Drawing:
        given = dict(zip(sliders, values))
        lines = tuple(line.strip() for line in text.splitlines() if line.strip())
        return Drawing(
            tuple(names),
            lines,
            seed=int(given["seed"] or 0),
            steps=int(given["steps"] or Drawing.steps),
            guidance=float(given["guidance"]),
            domain=bool(given["domain"]),
            mixture=float(given["mixture"]),
            strength=float(given["strength"]),
            over_noise=points_of(given["over_noise"] or "", "the adapter's strength"),
            hand_over=float(given["hand_over"]),
            photo=_file(given["photo"]),
            is_condition=bool(given["is_condition"]),
            control=float(given["control"]),
            control_over_noise=points_of(given["control_over_noise"] or "", "the ControlNet's strength"),
            begin=_file(given["begin"]),
            change=float(given["change"]),
        )

    def drawn(*values: Any, progress: Any = gr.Progress()) -> Iterator[list[Any]]:  # noqa: B008 as gradio finds it
        done = 0
        yield [gr.skip(), gr.skip(), gr.update(visible=True)]  # again, where another drawing ended before this one
        with mistakes():
            drawing, conditions = asked(*values), dict[str, Any]()
            total = len(drawing.sides) * len(drawing.prompts)
            progress(0, "loading the model")

            def advance(count: int) -> None:
                nonlocal done
                done += count
                progress(done / total, f"{done} of {total} pictures")

            pictures = painter.draw(drawing, advance, conditions.__setitem__)
            page = grid(drawing, pictures, painter.model, conditions)
        yield [page, True, gr.skip()]

    def pose(voted: str | None, other: str, *values: Any) -> list[Any]:
        with mistakes():
            found, page = next_pair(painter, asked([BASE], *values[1:]), voted or BASE, other)
            return [found, page, gr.update(visible=True), votes_of(places, found.run)]

    def say(found: Pair | None, said: str, *values: Any) -> list[Any]:
        with mistakes():
            counted = vote(places, found, said)
            assert found is not None
            following, page = next_pair(painter, asked([BASE], *values[1:]), found.run, found.against)
            return [following, page, gr.update(visible=True), told(found.run, counted)]

    def clicked(event: gr.EventData, found: Pair | None, *values: Any) -> list[Any]:
        return say(found, picked(event), *values)

    def alike(found: Pair | None, *values: Any) -> list[Any]:
        return say(found, SAME, *values)

    quiet: dict[str, Any] = {"show_progress": "hidden"}

    def draws(event: Any) -> None:
        """Let an event draw; while it does, there is a button that stops it."""
        started = event(lambda: gr.update(visible=True), None, halt, queue=False, **quiet)
        drawing: dict[str, Any] = {"show_progress_on": shown, "trigger_mode": "always_last"}  # once it has drawn
        ended = started.then(drawn, settings, [shown, has_drawn, halt], **drawing)
        ended.then(lambda: gr.update(visible=painter.is_drawing), None, halt, queue=False, **quiet)

    asking = [pair, pair_shown, same, result]
    met = [sides, prompts, run, against, has_drawn, has_set]
    arrived = [sides, prompts, run, against, result, shown, voting, sliders["steps"], sliders["guidance"]]
    tab.select(arrive, met, arrived, **quiet)
    for name in ("steps", "guidance"):
        sliders[name].input(lambda: True, None, has_set, **quiet)
    sliders["domain"].change(lambda on: gr.update(visible=on), sliders["domain"], sliders["mixture"], **quiet)
    draws(draw.click)
    for name in ("guidance", "mixture", "strength", "hand_over", "control", "change"):
        draws(sliders[name].release)
    halt.click(painter.stop, None, None, queue=False, **quiet)
    run.input(votes_so_far, run, result, **quiet)
    begin.click(pose, [run, against, *settings], asking)
    pair_shown.select(clicked, [pair, *settings], asking)
    same.click(alike, [pair, *settings], asking)


def _sliders() -> dict[str, Any]:
    """The settings by the names that `Drawing` has for them; what few people need is folded."""
    boxes: dict[str, Any] = {}
    boxes["guidance"] = gr.Slider(0, 15, 4, step=0.5, label="Guidance", elem_id="guidance")
    boxes["strength"] = gr.Slider(0, 1, 1, step=0.05, label="Strength of the adapter", elem_id="strength")
    with gr.Row():
        boxes["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90)
        boxes["steps"] = gr.Number(15, label="Sampling steps", precision=0, minimum=1, min_width=90)
    with gr.Accordion("Over the noise", open=False):
        boxes["hand_over"] = gr.Slider(
            0, 1, 0, step=0.05, label="Hand-over u₀", info="below it the base finishes the picture; 0 is never"
        )
        boxes["over_noise"] = gr.Textbox(label="Adapter over the noise", info=OVER, elem_id="over-noise")
        boxes["domain"] = gr.Checkbox(
            label="Domain Guidance: runs are guided away from what the base draws without a prompt"
        )
        boxes["mixture"] = gr.Slider(
            0, 1, 0, step=0.05, label="Mixture", info="adapter in that branch; 1 is ordinary guidance", visible=False
        )
    with gr.Accordion("Control with a photo", open=False):
        boxes["photo"] = gr.File(label="Photo", file_types=["image"], height=96, elem_id="photo")
        boxes["is_condition"] = gr.Checkbox(label="it is a condition already (edges, depth, …)")
        boxes["control"] = gr.Slider(0, 1, 1, step=0.05, label="Strength of the ControlNet")
        boxes["control_over_noise"] = gr.Textbox(label="ControlNet over the noise", info=OVER, elem_id="control-over")
    with gr.Accordion("Draw over a picture", open=False):
        boxes["begin"] = gr.File(label="Picture", file_types=["image"], height=96, elem_id="begin-picture")
        boxes["change"] = gr.Slider(0, 1, 0.6, step=0.05, label="Change", info="1 leaves nothing of it")
    return boxes


def _file(given: str | None) -> Path | None:
    return Path(given) if given else None
