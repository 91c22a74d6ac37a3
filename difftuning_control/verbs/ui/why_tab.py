"""The tab that says why: what a run learnt and forgot, its schedule, and the reports of analyses and pilots."""

from __future__ import annotations

from typing import Any

import gradio as gr

from difftuning_control.verbs.ui.runs_view import finished_runs
from difftuning_control.verbs.ui.saying import mistakes
from difftuning_control.verbs.ui.studio import Studio
from difftuning_control.verbs.ui.why_texts import LANGUAGES
from difftuning_control.verbs.ui.why_view import report_frame, reports_of, why


def why_tab(studio: Studio, tab: gr.Tab) -> None:
    """Fill the tab, inside of it."""
    places = studio.places
    with gr.Row():
        run = gr.Dropdown([], label="Run", elem_id="why-run", scale=2)
        report = gr.Dropdown([], label="Analysis or pilot", scale=2)
        language = gr.Radio(list(LANGUAGES), value="English", show_label=False, min_width=160, scale=1)
    page, frame = gr.HTML(elem_id="why"), gr.HTML()

    def shown(name: str | None, study: str | None, spoken: str) -> list[Any]:
        with mistakes():
            return [why(places, name, LANGUAGES[spoken]), report_frame(places, study, LANGUAGES[spoken])]

    def arrive(name: str | None, study: str | None, spoken: str) -> list[Any]:
        runs = [row["run"] for row in finished_runs(places)]
        studies = reports_of(places)
        name = name if name in runs else next(iter(runs), None)
        study = study if study in studies else next(iter(studies), None)
        boxes = [
            gr.update(choices=choices, value=value, visible=bool(choices))
            for choices, value in ((runs, name), (studies, study))
        ]
        return [*boxes, *shown(name, study, spoken)]

    asked, quiet = [run, report, language], {"show_progress": "hidden"}
    tab.select(arrive, asked, [run, report, page, frame], **quiet)
    for box in asked:
        box.input(shown, asked, [page, frame], **quiet)
