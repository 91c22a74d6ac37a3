"""A mistake on the page is one sentence in a corner of it, as on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from difftuning_control.errors import UserError
from difftuning_control.system.secrets import without_secrets
from difftuning_control.system.text import harmless

TITLE = "Not done"


@contextmanager
def mistakes() -> Iterator[None]:
    """Inside, what a user can put right is shown, and nothing is done."""
    try:
        yield
    except UserError as error:
        raise gr.Error(plain(str(error)), duration=12, print_exception=False, title=TITLE) from None
    except OSError as error:
        place, reason = error.filename or "a file", error.strerror or error
        raise gr.Error(
            plain(f"{place} cannot be read or written ({reason})."), print_exception=False, title=TITLE
        ) from None


def plain(text: str) -> str:
    """A sentence for a notice, which gradio reads as HTML."""
    said = without_secrets(" ".join(text.split()))
    return harmless(said).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
