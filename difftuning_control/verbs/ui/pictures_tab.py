"""The tab of the pictures."""

from __future__ import annotations

from typing import Any

import gradio as gr

from difftuning_control.errors import UserError
from difftuning_control.verbs.ui.captions import edit_caption, undo_caption
from difftuning_control.verbs.ui.form import picture_folders
from difftuning_control.verbs.ui.look import PICK
from difftuning_control.verbs.ui.pictures_view import PAGE, Picture, add_pictures, gallery, one_picture, pictures_of
from difftuning_control.verbs.ui.places import EMBEDDED
from difftuning_control.verbs.ui.saying import mistakes
from difftuning_control.verbs.ui.studio import Studio

SIDE = 512


def pictures_tab(studio: Studio, tab: gr.Tab) -> dict[str, Any]:
    """Fill the tab, inside of it; returns the event that shows it when the page is opened."""
    places = studio.places
    folders = picture_folders(places)
    with gr.Row():
        folder = gr.Dropdown(
            folders, value=folders[0], label="Folder", allow_custom_value=True, elem_id="folder", scale=3
        )
        side = gr.Number(SIDE, label="Resolution", precision=0, minimum=8, min_width=100, scale=1)
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=300):
            cards = gr.HTML(js_on_load=PICK, elem_id="pictures")
            with gr.Row():
                back, on = gr.Button("Earlier", size="sm", min_width=80), gr.Button("Later", size="sm", min_width=80)
            with gr.Accordion("Add pictures", open=False):
                into = gr.Textbox("pictures", label="into this folder")
                files = gr.File(show_label=False, file_count="multiple", file_types=["image"], height=120)
        with gr.Column(scale=2, min_width=300):
            large = gr.HTML(elem_id="picture")
            caption = gr.Textbox(label="Caption", lines=3, elem_id="caption", visible=False)
            with gr.Row():
                save = gr.Button("Save and next", size="sm", variant="primary", visible=False, elem_id="save")
                undo = gr.Button("Undo the last edit", size="sm", min_width=110, elem_id="undo")
    chosen, page, before = gr.State(None), gr.State(0), gr.State("")
    shown = [cards, large, caption, save, chosen, page, before]

    def show(place: str, size: float, name: str | None, number: int, keep_page: bool = False) -> list[Any]:
        with mistakes():
            found = pictures_of(places, place, max(8, int(size or SIDE)))
            names = [picture.name for picture in found]
            at = names.index(name) if name in names else None
            last = max(0, (len(found) - 1) // PAGE)
            number = min(max(number, 0), last) if at is None or keep_page else at // PAGE
            picture = found[at] if at is not None else None
            text = _text(picture)
            edits = gr.update(value=text, visible=picture is not None)
            button = gr.update(visible=picture is not None)
            parts = [gallery(places, place, found, number, name), one_picture(places, place, picture)]
        return [*parts, edits, button, picture.name if picture else None, number, text]

    def pick(place: str, size: float, event: gr.EventData) -> list[Any]:
        return show(place, size, str(event._data.get("value")), 0)

    def turn(place: str, size: float, name: str | None, number: int, by: int) -> list[Any]:
        return show(place, size, name, number + by, keep_page=True)

    def write(place: str, size: float, name: str | None, was: str, text: str) -> list[Any]:
        with mistakes():
            if name is None:
                raise UserError("no picture is chosen; choose one first.")
            edit_caption(places, places.readable(place), name, was or None, text)
            names = [picture.name for picture in pictures_of(places, place, SIDE)]
        after = names[(names.index(name) + 1) % len(names)] if name in names else None
        return show(place, size, after, 0)

    def take_back(place: str, size: float) -> list[Any]:
        with mistakes():
            where, name = undo_caption(places)
        gr.Info("The last edit is taken back.")
        return show(place if places.readable(place) == where else str(where), size, name, 0)

    def add(place: str, uploaded: list[str] | None) -> list[Any]:
        if not uploaded:
            return [gr.skip(), gr.skip()]
        with mistakes():
            add_pictures(places, place, uploaded)
        return [gr.update(choices=picture_folders(places), value=place), None]

    def first(place: str, size: float) -> list[Any]:
        return show(place, size, None, 0)

    def arrive(place: str, size: float, name: str | None, number: int) -> list[Any]:
        known = picture_folders(places)
        place = known[0] if place in EMBEDDED else place  # where there were no others before
        return [gr.update(choices=known, value=place), *show(place, size, name, number)]

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    look: dict[str, Any] = {"fn": arrive, "inputs": [folder, side, chosen, page], "outputs": [folder, *shown]}
    tab.select(**look, **quiet)
    folder.change(first, [folder, side], shown, **quiet)
    side.change(show, [folder, side, chosen, page], shown, **quiet)
    cards.select(pick, [folder, side], shown, **quiet)
    back.click(lambda p, s, n, at: turn(p, s, n, at, -1), [folder, side, chosen, page], shown, **quiet)
    on.click(lambda p, s, n, at: turn(p, s, n, at, 1), [folder, side, chosen, page], shown, **quiet)
    save.click(write, [folder, side, chosen, before, caption], shown, **quiet)
    undo.click(take_back, [folder, side], shown, **quiet)
    files.upload(add, [into, files], [folder, files], **quiet)
    return look


def _text(picture: Picture | None) -> str:
    return (picture.caption or "") if picture is not None else ""
