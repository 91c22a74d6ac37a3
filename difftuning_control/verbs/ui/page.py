"""The page: its head, and a tab for each thing that people do."""

from __future__ import annotations

import gradio as gr

from difftuning_control.verbs.ui.look import DARK
from difftuning_control.verbs.ui.render import render
from difftuning_control.verbs.ui.runs_tab import runs_tab
from difftuning_control.verbs.ui.studio import Studio


def build_page(studio: Studio) -> gr.Blocks:
    """All of it, as gradio builds it."""
    with gr.Blocks(analytics_enabled=False, title="difftune", fill_width=True) as page:
        with gr.Row(elem_classes="head"):
            gr.HTML(render("header", folder=studio.places.folder))
            dark = gr.Button("dark / light", size="sm", min_width=90, scale=0)
        with gr.Tabs(), gr.Tab("Runs") as runs:
            runs_tab(studio, runs)
        dark.click(None, None, None, js=DARK)
    return page
