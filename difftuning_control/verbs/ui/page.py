"""The page: its head, and a tab for each thing that people do."""

from __future__ import annotations

from typing import Any

import gradio as gr

from difftuning_control.verbs.ui.compare_tab import compare_tab
from difftuning_control.verbs.ui.folders import picture_folders
from difftuning_control.verbs.ui.form import embedded_words
from difftuning_control.verbs.ui.look import DARK, KEYS
from difftuning_control.verbs.ui.pictures_tab import pictures_tab
from difftuning_control.verbs.ui.places import EMBEDDED
from difftuning_control.verbs.ui.render import render
from difftuning_control.verbs.ui.runs_tab import runs_tab
from difftuning_control.verbs.ui.runs_view import runs_of
from difftuning_control.verbs.ui.saying import mistakes
from difftuning_control.verbs.ui.studio import Studio
from difftuning_control.verbs.ui.train_tab import train_tab
from difftuning_control.verbs.ui.why_tab import why_tab


def build_page(studio: Studio) -> gr.Blocks:
    """All of it, as gradio builds it."""
    with gr.Blocks(analytics_enabled=False, title="difftune", fill_width=True) as page:
        with gr.Row(elem_classes="studio-head"):
            gr.HTML(render("header", folder=studio.places.folder))
            dark = gr.Button("dark / light", size="sm", min_width=90, scale=0)
        with gr.Tabs() as tabs:
            with gr.Tab("Pictures", id="pictures") as pictures:
                with gr.Column(visible=False) as first:
                    steps = gr.HTML()
                    embedded = gr.Button(
                        "Nothing at hand? Train the small emoji model", size="sm", elem_id="embedded", min_width=320
                    )
                show_pictures = pictures_tab(studio, pictures)
            with gr.Tab("Train", id="train") as train:
                job = train_tab(studio, train)
            with gr.Tab("Compare", id="compare") as compare:
                compare_tab(studio, compare)
            with gr.Tab("Why", id="why") as reasons:
                why_tab(studio, reasons)
            with gr.Tab("Runs", id="runs") as runs:
                runs_tab(studio, runs)

        def arrive() -> list[Any]:
            is_new = not runs_of(studio.places) and not studio.jobs.all()
            has_pictures = any(folder not in EMBEDDED for folder in picture_folders(studio.places))
            return [gr.update(visible=is_new), render("first", has_pictures=has_pictures)]

        def try_it() -> list[Any]:
            with mistakes():
                started = studio.jobs.add(*embedded_words(studio.places))
            return [gr.update(visible=False), gr.update(selected="train"), started.name]

        page.load(arrive, None, [first, steps], show_progress="hidden")
        pictures.select(arrive, None, [first, steps], show_progress="hidden")
        page.load(**show_pictures, show_progress="hidden")
        page.load(None, None, None, js=KEYS)
        embedded.click(try_it, None, [first, tabs, job], show_progress="hidden")
        dark.click(None, None, None, js=DARK)
    return page
