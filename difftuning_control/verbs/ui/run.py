"""`difftune ui`: the server of the page, which ends with Ctrl-C; what it started goes on."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from collections.abc import Callable
from importlib.util import find_spec

from difftuning_control.errors import UserError
from difftuning_control.system.terminal import activity, showing_activities
from difftuning_control.verbs.ui.guard import Access
from difftuning_control.verbs.ui.places import Places
from difftuning_control.verbs.ui.settings import UiSettings

PASSWORD = "DIFFTUNE_UI_PASSWORD"


def serve(settings: UiSettings, tell: Callable[[str], object]) -> None:
    """Show the page until the process is ended.

    Args:
        tell: is given the address, and the password if one was drawn.

    Raises:
        UserError: if gradio is not installed, a folder is none, or the port is taken.
    """
    if find_spec("gradio") is None:
        raise UserError("the page needs gradio; run pip install 'difftuning-control[ui]'.")
    places = Places.of(settings.folder, settings.pictures)
    listening = listen(settings.host or "127.0.0.1", settings.port)
    port = listening.getsockname()[1]
    access, lines = access_of(settings, port)
    with listening, tempfile.TemporaryDirectory(prefix="difftune-ui-") as scratch:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": scratch, "HF_HUB_DISABLE_TELEMETRY": "1"}
        with showing_activities(), activity("starting"):
            import uvicorn  # these after the variables, which they read when they are imported

            from difftuning_control.verbs.ui.application import make_application

            application = make_application(places, access)
        for line in lines:
            tell(line)
        tell("Ctrl-C ends the page; trainings that it started go on.")
        config = uvicorn.Config(application, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
        uvicorn.Server(config).run(sockets=[listening])


def access_of(settings: UiSettings, port: int) -> tuple[Access, list[str]]:
    """Who may see the page, and the lines that say how."""
    if settings.host is None:
        access = Access(port)
        return access, [f"open http://127.0.0.1:{port}/?token={access.token}"]
    given = os.environ.get(PASSWORD)
    password = given or secrets.token_urlsafe(9)
    place = f"{in_address(settings.host)}:{port}"
    lines = [f"open http://{place}/ (not encrypted: in a network that you trust, or behind a proxy)"]
    lines += [f"password: that of {PASSWORD}" if given else f"password: {password}"]
    return Access(port, password), lines


def in_address(host: str) -> str:
    """A host as it stands before a port: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        UserError: if the port is taken, or there is no such address here.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = None
    try:
        listening = socket.socket(family, socket.SOCK_STREAM)
        if os.name == "posix":  # on Windows it lets two listen at once
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)
    except OSError as error:  # a kernel without IPv6 among them
        if listening is not None:
            listening.close()
        said = error.strerror or error
        place = f"{in_address(host)}:{port}"
        raise UserError(f"the page cannot listen on {place} ({said}); name another --port, or --host.") from None
    return listening
