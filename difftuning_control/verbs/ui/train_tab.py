"""The tab of training: the form, what was started, and a run while it trains."""

from __future__ import annotations

from typing import Any

import gradio as gr

from difftuning_control.errors import UserError
from difftuning_control.verbs.ui.folders import training_folders
from difftuning_control.verbs.ui.form import (
    METHODS,
    NO_PRESET,
    Field,
    free_name,
    go_on_words,
    preset_labels,
    preset_values,
    recipe_of_words,
    refuse_code,
    sections,
    train_words,
)
from difftuning_control.verbs.ui.jobs import RUNNING, TRAINING, WAITING, Job
from difftuning_control.verbs.ui.live import changed, chosen_job, jobs_table, log, pictures, progress, stopping
from difftuning_control.verbs.ui.look import FOLLOW, PICK
from difftuning_control.verbs.ui.places import EMBEDDED
from difftuning_control.verbs.ui.price_view import price_page, refuse_unready
from difftuning_control.verbs.ui.render import picked as picked_name
from difftuning_control.verbs.ui.saying import mistakes
from difftuning_control.verbs.ui.studio import Studio

EVERY = 2.0  # seconds between looks at what trains
PLACEHOLDERS = {
    "rank": "16",
    "steps": "what fits the model",
    "batch": "what fits the model",
    "rate": "what fits the model",
    "side": "the model's own",
}


def train_tab(studio: Studio, tab: gr.Tab) -> gr.State:
    """Fill the tab, inside of it; returns the state that names the job that is shown."""
    places = studio.places
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            fields = _first_fields(studio)
            with gr.Accordion("Everything else", open=False):
                others = _other_fields()
            price = gr.HTML(elem_id="price")
            with gr.Row():
                ask = gr.Button("What will it take?", elem_id="ask", min_width=130)
                start = gr.Button("Start", variant="primary", elem_id="start", min_width=130)
        with gr.Column(scale=3, min_width=300):
            table = gr.HTML(js_on_load=PICK, elem_id="jobs")
            with gr.Column(visible=False) as following:
                with gr.Row():
                    stop = gr.Button("Stop", size="sm", min_width=80, elem_id="stop")
                    resume = gr.Button("Go on", size="sm", min_width=80)
                    longer = gr.Textbox(
                        show_label=False, placeholder="up to step (as it was)", min_width=120, container=False
                    )
                now = gr.HTML(elem_id="progress")
                grids = gr.HTML(elem_id="grids")
                with gr.Accordion("Log", open=True):
                    printed = gr.HTML(elem_id="log")
    chosen, seen = gr.State(None), gr.State(None)
    live = [table, now, grids, printed, stop, resume, seen, following]

    def look(name: str | None, before: Any) -> list[Any]:
        jobs = studio.jobs.all()
        job = chosen_job(jobs, name)
        text = log(studio.jobs, job)
        signs = [[(j.name, j.state) for j in jobs], changed(job), text]
        if before is not None and signs == before:
            return [gr.skip()] * len(live)
        same = before is not None and before[1] == signs[1]
        figures = [gr.skip(), gr.skip()] if same else [progress(places, job), pictures(job)]
        there = gr.update(visible=job is not None)
        return [jobs_table(places, jobs, job.name if job else None), *figures, text, *_buttons(job), signs, there]

    def look_anew(name: str | None) -> list[Any]:
        return look(name, None)

    def begin(*values: str) -> list[Any]:
        texts = [value or "" for value in values]
        first = dict(zip(fields, texts))
        with mistakes():
            words, output = train_words(places, first.pop("preset"), first, dict(zip(others, texts[len(fields) :])))
            refuse_unready(recipe_of_words(words))
            job = studio.jobs.add(words, output)
        return [job.name, free_name(places, output.name), *look(job.name, None)]

    def priced(*values: str) -> str:
        texts = [value or "" for value in values]
        first = dict(zip(fields, texts))
        return price_page(places, first.pop("preset"), first, dict(zip(others, texts[len(fields) :])))

    def go_on(name: str | None, up_to: str) -> list[Any]:
        with mistakes():
            job = chosen_job(studio.jobs.all(), name)
            if job is None:
                raise UserError("no training is chosen; choose one in the table.")
            words = go_on_words(job, up_to)
            refuse_code(recipe_of_words(words))
            job = studio.jobs.add(words, job.output)
        return [job.name, *look(job.name, None)]

    def end(name: str | None) -> list[Any]:
        with mistakes():
            job = chosen_job(studio.jobs.all(), name)
            job = studio.jobs.stop(job.name if job is not None else "")
        gr.Info(stopping(job))
        return look(name, None)

    def picked(event: gr.EventData) -> list[Any]:
        name = picked_name(event)
        return [name, *look(name, None)]

    def fill(preset: str) -> list[str]:
        with mistakes():
            values = preset_values(preset)
        return [values[name] for name in fields if name in values]

    def arrive(place: str, name: str, is_own: bool) -> list[Any]:
        known = training_folders(places)
        place = known[0] if place in EMBEDDED and not is_own else place  # where there were no others before
        return [gr.update(choices=known, value=place), free_name(places, name or "mine")]

    everything = [*fields.values(), *others.values()]
    ask.click(priced, everything, price)
    started = start.click(begin, everything, [chosen, fields["name"], *live], show_progress="hidden")
    started.success(None, None, None, js=FOLLOW)  # which is out of sight, below or far above the button
    resume.click(go_on, [chosen, longer], [chosen, *live], show_progress="hidden")
    stop.click(end, chosen, live, show_progress="hidden")
    table.select(picked, None, [chosen, *live], show_progress="hidden")
    filled = [box for name, box in fields.items() if name in preset_values(NO_PRESET)]
    fields["preset"].change(fill, fields["preset"], filled, show_progress="hidden")
    named, is_own = [fields["pictures"], fields["name"]], gr.State(False)
    fields["pictures"].input(lambda: True, None, is_own, show_progress="hidden")
    tab.select(arrive, [*named, is_own], named, show_progress="hidden")
    tab.select(look_anew, chosen, live, show_progress="hidden")
    gr.Timer(EVERY).tick(look, [chosen, seen], live, show_progress="hidden")
    return chosen


def _buttons(job: Job | None) -> list[Any]:
    ends = job is not None and job.state in (RUNNING, WAITING)
    is_asked = job is not None and job.is_asked_to_end
    goes_on = job is not None and not ends and job.verb in TRAINING
    return [gr.update(interactive=ends and not is_asked), gr.update(interactive=goes_on)]


def _first_fields(studio: Studio) -> dict[str, Any]:
    """The first fields by name, and the preset."""
    folders, values = training_folders(studio.places), preset_values(NO_PRESET)
    found: dict[str, Any] = {}
    found["preset"] = gr.Dropdown(preset_labels(), value=NO_PRESET, label="Begin with the settings of")
    found["pictures"] = gr.Dropdown(folders, value=folders[0], label="Pictures", allow_custom_value=True)
    found["trigger"] = gr.Textbox(
        label="Trigger",
        info="words for what is learnt (zbx dog), put before captions that lack them; alone where there is no caption",
    )
    found["model"] = gr.Textbox(
        values["model"],
        label="Model",
        info="embedded (a small one that draws emoji, to try things), a diffusers folder, or a name of the Hub",
    )
    with gr.Row():
        found["trains"] = gr.Dropdown(list(METHODS), value=values["trains"], label="What trains", min_width=120)
        found["rank"] = _short("Rank", "rank")
    with gr.Row():
        found["steps"] = _short("Steps", "steps")
        found["batch"] = _short("Batch", "batch")
    with gr.Row():
        found["rate"] = _short("Learning rate", "rate")
        found["side"] = _short("Resolution", "side")
    found["prompts"] = gr.Textbox(
        label="Prompts to draw while it trains", lines=2, placeholder="one a line; your captions if empty"
    )
    found["name"] = gr.Textbox(free_name(studio.places), label="Name of the run")
    return found


def _short(label: str, name: str) -> gr.Textbox:
    return gr.Textbox(label=label, placeholder=PLACEHOLDERS[name], min_width=100)


def _other_fields() -> dict[str, Any]:
    """A box for each other key, folded by section."""
    found: dict[str, Any] = {}
    for name, entries in sections().items():
        with gr.Accordion(name, open=False):
            for entry in entries:
                found[entry.key] = _box(entry)
    return found


def _box(entry: Field) -> Any:
    label = entry.key.partition(".")[2] or entry.key
    if entry.choices is not None:
        return gr.Dropdown(["", *entry.choices], value="", label=label, info=entry.about, elem_id=entry.key)
    return gr.Textbox(label=label, info=entry.about, placeholder=entry.default, elem_id=entry.key)
