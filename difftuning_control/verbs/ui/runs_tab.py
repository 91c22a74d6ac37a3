"""The tab of the runs."""

from __future__ import annotations

from typing import Any

import gradio as gr

from difftuning_control.verbs.ui.look import PICK
from difftuning_control.verbs.ui.render import picked as picked_name
from difftuning_control.verbs.ui.render import render
from difftuning_control.verbs.ui.runs_view import (
    delete_run,
    export_words,
    run_details,
    runs_of,
    runs_table,
    verified,
    what_goes,
)
from difftuning_control.verbs.ui.saying import mistakes
from difftuning_control.verbs.ui.studio import Studio


def runs_tab(studio: Studio, tab: gr.Tab) -> None:
    """Fill the tab, inside of it."""
    places = studio.places
    chosen = gr.State(None)
    table = gr.HTML(js_on_load=PICK, elem_id="runs")
    with gr.Row(visible=False) as actions:
        refresh = gr.Button("Look again", size="sm", min_width=90)
        check = gr.Button("Verify", size="sm", min_width=90)
        remove = gr.Button("Delete …", size="sm", min_width=90, variant="stop")
    with gr.Group(visible=False) as asking:
        question = gr.Textbox(show_label=False, interactive=False, container=False)
        with gr.Row():
            keep, gone = gr.Button("Keep it", size="sm"), gr.Button("Delete it", size="sm", variant="stop")
    with gr.Accordion("Export", open=False, visible=False) as exporting:
        with gr.Row():
            form = gr.Dropdown(["diffusers", "kohya", "comfyui"], value="diffusers", label="as")
            base = gr.Dropdown(["copied", "referenced"], value="copied", label="base", info="of diffusers")
            adapter = gr.Dropdown(["separate", "fused"], value="separate", label="adapter", info="of diffusers")
            to = gr.Textbox(label="to", placeholder="exports/NAME-FORMAT")
            despite = gr.Checkbox(label="although a gate failed")
        export = gr.Button("Export", size="sm", variant="primary")
    said, details = gr.HTML(), gr.HTML()

    def shown(name: str | None) -> list[Any]:
        rows = runs_of(places)
        there = name if any(row["run"] == name for row in rows) else None
        with mistakes():
            page = run_details(places, there) if there is not None else ""
        some = gr.update(visible=there is not None)
        return [there, runs_table(rows, there), gr.update(visible=bool(rows)), some, page, gr.update(visible=False), ""]

    everything = [chosen, table, actions, exporting, details, asking, said]

    def picked(event: gr.EventData) -> list[Any]:
        return shown(picked_name(event))

    def ask(name: str | None) -> list[Any]:
        with mistakes():
            return [what_goes(places, name or ""), gr.update(visible=True)]

    def delete(name: str | None) -> list[Any]:
        with mistakes():
            delete_run(places, name or "")
        gr.Info("It is deleted.")
        return shown(None)

    def exported(name: str | None, *options: Any) -> str:
        with mistakes():
            words, target = export_words(places, name or "", *options)
            job = studio.jobs.add(words, target)
        title = f"{places.name(target)} is being written; the Train page shows what the command prints."
        return render("text", title=title, good=True, text=job.command)

    def verify(name: str | None) -> str:
        with mistakes():
            return verified(places, name or "")

    tab.select(shown, chosen, everything, show_progress="hidden")
    refresh.click(shown, chosen, everything, show_progress="hidden")
    table.select(picked, None, everything, show_progress="hidden")
    check.click(verify, chosen, said)
    remove.click(ask, chosen, [question, asking], show_progress="hidden")
    keep.click(lambda: gr.update(visible=False), None, asking, show_progress="hidden")
    gone.click(delete, chosen, everything)
    export.click(exported, [chosen, form, base, adapter, to, despite], said)
