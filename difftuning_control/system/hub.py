"""The Hugging Face Hub where it cannot be reached: its client is spared half a minute of retries."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

SECONDS = 5.0  # to wait for an answer


@contextmanager
def hub_or_cache(*names: str) -> Iterator[None]:
    """What is loaded inside comes from the Hub's cache alone, where the Hub does not answer at once.

    Its client asks six times over 24 seconds before it looks into the cache, for each file anew. Nothing is asked where
    all names are files or folders of this machine, where the offline mode is on, or where a proxy is set, behind which
    only the client itself can tell.
    """
    if all(Path(name).expanduser().exists() for name in names) or getproxies().keys() - {"no"}:
        yield
        return
    from huggingface_hub import constants  # saves it where a model is a folder

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _answers(constants.ENDPOINT)
    try:
        yield
    finally:
        if before != constants.HF_HUB_OFFLINE:
            constants.HF_HUB_OFFLINE = before
            _forget_sessions()


def _answers(endpoint: str) -> bool:
    """Whether a connection to the endpoint's host can be opened."""
    parts = urlsplit(endpoint)
    try:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        with socket.create_connection((parts.hostname or "", port), SECONDS):
            return True
    except OSError:
        return False


def _forget_sessions() -> None:
    """A session of huggingface_hub before 1.0 stays as offline as it was made."""
    import huggingface_hub.utils as utils  # as in hub_or_cache

    if (reset := getattr(utils, "reset_sessions", None)) is not None:
        reset()
