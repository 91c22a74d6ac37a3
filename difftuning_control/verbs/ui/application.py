"""The page as an application: gradio's part, the pictures and reports beside it, and the gate before both."""

from __future__ import annotations

import gradio as gr
from fastapi import FastAPI, Response

from difftuning_control.errors import UserError
from difftuning_control.verbs.ui.files import PICTURE, REPORT, SANDBOX, report_page, small_picture
from difftuning_control.verbs.ui.guard import MOST_BODY, Access, Guard
from difftuning_control.verbs.ui.look import CSS, HEAD, theme
from difftuning_control.verbs.ui.page import build_page
from difftuning_control.verbs.ui.places import Places
from difftuning_control.verbs.ui.studio import Studio

KEPT = {"cache-control": "private, max-age=3600"}  # an address has the time of the file's last change


def make_application(places: Places, access: Access) -> Guard:
    """All that the server answers."""
    studio = Studio(places)
    studio.jobs.watch()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get(PICTURE)
    def picture(path: str, side: int) -> Response:
        try:
            return Response(small_picture(places, path, side), media_type="image/png", headers=KEPT)
        except UserError as error:
            return Response(str(error), status_code=404, media_type="text/plain")

    @app.get(REPORT)
    def report(path: str) -> Response:
        try:
            body = report_page(places, path)
        except UserError as error:
            return Response(str(error), status_code=404, media_type="text/plain")
        return Response(body, media_type="text/html", headers=KEPT | {"content-security-policy": SANDBOX})

    page = gr.mount_gradio_app(
        app,
        build_page(studio),
        "/",
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
        footer_links=[],
        allowed_paths=[],
        show_error=True,
        max_file_size=MOST_BODY,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=CSS,
        head=HEAD,
    )
    return Guard(page, access)
