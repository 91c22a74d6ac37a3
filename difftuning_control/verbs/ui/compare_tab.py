"""The tab of comparisons: a grid of pictures from equal noise, and blind votes."""

from __future__ import annotations

from typing import Any

import gradio as gr

from difftuning_control.verbs.ui.compare_view import (
    SAME,
    Pair,
    grid,
    next_pair,
    prompts_of,
    sides_of,
    told,
    vote,
    votes_of,
)
from difftuning_control.verbs.ui.look import PICK
from difftuning_control.verbs.ui.painter import BASE, Drawing
from difftuning_control.verbs.ui.saying import mistakes
from difftuning_control.verbs.ui.studio import Studio


def compare_tab(studio: Studio, tab: gr.Tab) -> None:
    """Fill the tab, inside of it."""
    places, painter = studio.places, studio.painter
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            sides = gr.Dropdown([BASE], value=[BASE], multiselect=True, label="Who draws", elem_id="sides")
            prompts = gr.Textbox(label="Prompts", lines=4, placeholder="one a line", elem_id="prompts")
            guidance = gr.Slider(0, 15, 4, step=0.5, label="Guidance", elem_id="guidance")
            domain = gr.Checkbox(
                label="Domain Guidance: runs are guided away from what the base draws without a prompt"
            )
            mixture = gr.Slider(
                0,
                1,
                0,
                step=0.05,
                label="Mixture",
                info="adapter in that branch; 1 is ordinary guidance",
                visible=False,
            )
            strength = gr.Slider(0, 1, 1, step=0.05, label="Strength of the adapter", elem_id="strength")
            hand_over = gr.Slider(
                0, 1, 0, step=0.05, label="Hand-over u₀", info="below it the base finishes the picture; 0 is never"
            )
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90)
                steps = gr.Number(15, label="Sampling steps", precision=0, minimum=1, min_width=90)
            draw = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Column(scale=3, min_width=300):
            shown = gr.HTML(elem_id="comparison", min_height=120)
            with gr.Accordion("Vote blind", open=False):
                with gr.Row():
                    run = gr.Dropdown([], label="This run", min_width=140)
                    against = gr.Dropdown([BASE], value=BASE, label="against", min_width=140)
                    begin = gr.Button("Draw a pair", size="sm", min_width=100, elem_id="begin")
                pair_shown = gr.HTML(js_on_load=PICK, elem_id="pair")
                same = gr.Button("No difference", size="sm", visible=False, elem_id="same")
                result = gr.HTML(elem_id="votes")
    pair = gr.State(None)
    settings = [sides, prompts, guidance, domain, mixture, strength, hand_over, seed, steps]

    def arrive(now: list[str], text: str, voted: str | None, other: str) -> list[Any]:
        known = sides_of(places)
        runs = [side for side in known if side != BASE]
        chosen = [side for side in now if side in known]
        if chosen in ([], [BASE]) and runs:
            chosen = [BASE, next((r for r in runs if "/step-" not in r), runs[0])]
        text = text or "\n".join(prompts_of(places, chosen))
        mine = voted if voted in runs else next(iter(chosen[1:]), None)
        boxes = [(known, chosen), (runs, mine), (known, other if other in known else BASE)]
        updates = [gr.update(choices=choices, value=value) for choices, value in boxes]
        return [updates[0], text, updates[1], updates[2], votes_of(places, mine) if mine else ""]

    def asked(*values: Any) -> Drawing:
        names, text, scale, is_domain, mixed, strong, u0, number, count = values
        lines = tuple(line.strip() for line in text.splitlines() if line.strip())
        numbers = (int(number or 0), int(count or 15), float(scale))
        return Drawing(tuple(names), lines, *numbers, bool(is_domain), float(mixed), float(strong), float(u0))

    def drawn(*values: Any, progress: Any = gr.Progress()) -> str:  # noqa: B008 as gradio finds it
        done = 0
        with mistakes():
            drawing = asked(*values)
            total = len(drawing.sides) * len(drawing.prompts)
            progress(0, "loading the model")

            def advance(count: int) -> None:
                nonlocal done
                done += count
                progress(done / total, f"{done} of {total} pictures")

            return grid(drawing, painter.draw(drawing, advance), painter.model)

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
        return say(found, str(event._data.get("value")), *values)

    def alike(found: Pair | None, *values: Any) -> list[Any]:
        return say(found, SAME, *values)

    asking = [pair, pair_shown, same, result]
    quiet: dict[str, Any] = {"show_progress": "hidden"}
    tab.select(arrive, [sides, prompts, run, against], [sides, prompts, run, against, result], **quiet)
    domain.change(lambda on: gr.update(visible=on), domain, mixture, **quiet)
    draw.click(drawn, settings, shown)
    for slider in (guidance, mixture, strength, hand_over):
        slider.release(drawn, settings, shown)
    begin.click(pose, [run, against, *settings], asking)
    pair_shown.select(clicked, [pair, *settings], asking)
    same.click(alike, [pair, *settings], asking)
