"""The tab of the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from difftuning_control.errors import UserError
from difftuning_control.verbs.ui.captioning import Captioner, draft_captions, forget_draft
from difftuning_control.verbs.ui.captions import edit_caption, has_edits, undo_caption
from difftuning_control.verbs.ui.folders import picture_folders
from difftuning_control.verbs.ui.look import PICK, SHOW
from difftuning_control.verbs.ui.pictures_view import (
    PAGE,
    Picture,
    add_pictures,
    gallery,
    one_picture,
    pictures_of,
    to_show,
)
from difftuning_control.verbs.ui.places import EMBEDDED
from difftuning_control.verbs.ui.render import picked, render
from difftuning_control.verbs.ui.saying import mistakes, plain
from difftuning_control.verbs.ui.studio import Studio

SIDE = 512


def pictures_tab(studio: Studio, tab: gr.Tab) -> dict[str, Any]:
    """Fill the tab, inside of it; returns the event that shows it when the page is opened."""
    places = studio.places
    folders = picture_folders(places)
    with gr.Row(equal_height=True):
        folder = gr.Dropdown(
            folders, value=folders[0], label="Folder", allow_custom_value=True, elem_id="folder", scale=3
        )
        side = gr.Number(SIDE, label="Trained at, pixels", precision=0, minimum=8, min_width=120, scale=1)
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=300):
            only = gr.Checkbox(label="only those that training would refuse", visible=False, elem_id="only")
            cards = gr.HTML(js_on_load=PICK, elem_id="pictures")
            with gr.Row(visible=False) as pages:
                back, on = gr.Button("Earlier", size="sm", min_width=80), gr.Button("Later", size="sm", min_width=80)
            with gr.Accordion("Add pictures", open=False):
                into = gr.Textbox("pictures", label="Into this folder")
                files = gr.File(show_label=False, file_count="multiple", file_types=["image"], height=120)
            with gr.Accordion("Draft the captions that are missing", open=False):
                model = gr.Textbox(
                    label="Captioning model",
                    info="a folder with an image-to-text model of transformers; nothing is downloaded",
                    placeholder="models/blip-image-captioning-base",
                    elem_id="captioner",
                )
                draft = gr.Button("Draft", size="sm", min_width=80, elem_id="draft")
                drafted = gr.HTML()
        with gr.Column(scale=2, min_width=300):
            large = gr.HTML(elem_id="picture")
            caption = gr.Textbox(label="Caption", lines=3, elem_id="caption", visible=False)
            with gr.Row():
                save = gr.Button("Save and next", size="sm", variant="primary", visible=False, elem_id="save")
                undo = gr.Button("Undo the last edit", size="sm", min_width=110, visible=False, elem_id="undo")
    chosen, page, before, is_own = gr.State(None), gr.State(0), gr.State(""), gr.State(False)
    shown_place = gr.State(None)  # the folder that is shown
    shown = [cards, large, caption, save, chosen, page, before, shown_place, only, pages, undo]

    def show(
        place: str,
        size: float,
        few: bool,
        name: str | None,
        number: int,
        keep_page: bool = False,
        keep_text: bool = True,
    ) -> list[Any]:
        """What is shown of a folder.

        Args:
            keep_text: leave the box as it is, where somebody may write, since the picture was chosen before.
        """
        with mistakes():
            pixels = max(8, int(size or SIDE))
            found = pictures_of(places, place, pixels)
            few = few and any(p.problems for p in found)
            names = [picture.name for picture in to_show(found, few)]
            at = names.index(name) if name in names else None
            last = max(0, (len(names) - 1) // PAGE)
            number = min(max(number, 0), last) if at is None or keep_page else at // PAGE
            picture = next((p for p in found if p.name == name), None)
            text = _text(picture)
            there = gr.update(visible=picture is not None)
            parts = [gallery(places, place, found, number, name, pixels, few), one_picture(places, place, picture)]
            more = [gr.update(value=few, visible=any(p.problems for p in found)), gr.update(visible=last > 0)]
            edits: Any = gr.update(value=text, visible=picture is not None)
            was: Any = (picture and picture.caption) or ""
            if picture is not None and keep_text:
                edits = was = gr.skip()
        state = [picture.name if picture else None, number, was, place]
        return [*parts, edits, there, *state, *more, gr.update(visible=has_edits(places))]

    def pick(place: str, size: float, few: bool, event: gr.EventData) -> list[Any]:
        return show(place, size, few, picked(event), 0, keep_text=False)

    def turn(by: int) -> Any:
        def turned(place: str, size: float, few: bool, name: str | None, number: int) -> list[Any]:
            return show(place, size, few, name, number + by, keep_page=True)

        return turned

    def write(place: str, size: float, few: bool, name: str | None, was: str, text: str) -> list[Any]:
        with mistakes():
            if name is None:
                raise UserError("no picture is chosen; choose one first.")
            names = [picture.name for picture in to_show(pictures_of(places, place, SIDE), few)]
            real = places.readable(place)
            edit_caption(places, real, name, was or None, text)
            forget_draft(places, real, name)
        after = names[(names.index(name) + 1) % len(names)] if name in names else None
        return show(place, size, few, after, 0, keep_text=False)

    def take_back(place: str, size: float, few: bool) -> list[Any]:
        with mistakes():
            where, name, dropped = undo_caption(places)
        said = [f"An edit is given up: {why}" for why in dropped]
        gr.Info(plain(" ".join([*said, f"The edit of {name} is taken back."])))
        place = place if places.readable(place) == where else str(where)
        return [gr.update(value=place), *show(place, size, few, name, 0, keep_text=False)]

    def add(place: str, uploaded: list[str] | None) -> list[Any]:
        if not uploaded:
            return [gr.skip(), gr.skip()]
        with mistakes():
            add_pictures(places, place, uploaded)
        return [gr.update(choices=picture_folders(places), value=place), None]

    def propose(
        place: str,
        size: float,
        few: bool,
        name: str | None,
        number: int,
        typed: str,
        named: str,
        progress: Any = gr.Progress(),  # noqa: B008 as gradio finds it
    ) -> list[Any]:
        with mistakes():
            if not named.strip():
                raise UserError("no captioning model is named; give the folder that one lies in.")
            found = pictures_of(places, place, SIDE)
            bare = [p.name for p in found if not p.caption and not p.draft and all(p.size)]
            if not bare:
                raise UserError("each picture of this folder has a caption or a draft already.")
            progress(0, "loading the captioning model")
            captioner, done = Captioner(places.folder / Path(named.strip()).expanduser()), 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                progress(done / len(bare), f"{done} of {len(bare)} pictures")

            made = draft_captions(places, place, bare, captioner, advance)
            kept = name is not None and (name not in made or bool(typed.strip()))
        said = f"{len(made)} drafted. Each becomes a caption when you save it."
        said = render("text", title=said, good=True, text="")
        return [*show(place, size, few, name or next(iter(made), None), number, keep_text=kept), said]

    def first(place: str, size: float, few: bool) -> list[Any]:
        return show(place, size, few, None, 0)

    def chosen_place(place: str, size: float, few: bool, there: str | None) -> list[Any]:
        """The folder that was chosen, unless it is shown already: the box also changes where an event set it."""
        return [gr.skip()] * len(shown) if place == there else first(place, size, few)

    def arrive(place: str, size: float, few: bool, name: str | None, number: int, is_own: bool) -> list[Any]:
        known = picture_folders(places)
        now = known[0] if place in EMBEDDED and not is_own else place  # where there were no others before
        return [gr.update(choices=known, value=now), *show(now, size, few, name, number, keep_text=now == place)]

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    asked = [folder, side, only]
    at = [*asked, chosen, page]
    look: dict[str, Any] = {"fn": arrive, "inputs": [*at, is_own], "outputs": [folder, *shown]}
    tab.select(**look, **quiet)
    folder.input(lambda: True, None, is_own, **quiet)
    folder.change(chosen_place, [*asked, shown_place], shown, **quiet)
    side.change(show, at, shown, **quiet)
    only.input(show, at, shown, **quiet)
    cards.select(pick, asked, shown, **quiet).then(None, None, None, js=SHOW)
    back.click(turn(-1), at, shown, **quiet)
    on.click(turn(1), at, shown, **quiet)
    save.click(write, [*asked, chosen, before, caption], shown, **quiet)
    undo.click(take_back, asked, [folder, *shown], **quiet)
    files.upload(add, [into, files], [folder, files], **quiet).success(first, asked, shown, **quiet)
    draft.click(propose, [*at, caption, model], [*shown, drafted])
    return look


def _text(picture: Picture | None) -> str:
    """What the box for the caption begins with."""
    return (picture.caption or picture.draft or "") if picture is not None else ""
