"""The files that a page shows: pictures, drawn anew as small ones, and reports, in which nothing runs."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image

from difftuning_control.data.images import EXTENSIONS, decode_image
from difftuning_control.errors import UserError
from difftuning_control.system.untrusted import BYTES_PER_PIXEL, MAX_PIXELS, read_file
from difftuning_control.verbs.ui.places import Places

PICTURE, REPORT = "/studio/picture", "/studio/report"
SIDES = (96, 192, 384, 768, 1536)  # that pictures are shown at, in pixels
REPORTS = ("report.html",)
MOST_REPORT = 64 * 2**20  # bytes
SANDBOX = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def picture_address(path: Path, side: int) -> str:
    """Where the page finds a picture; another one once the file has changed."""
    changed = path.stat().st_mtime_ns if path.exists() else 0
    return f"{PICTURE}?{urlencode({'path': str(path), 'side': side, 'v': changed})}"


def report_address(path: Path) -> str:
    changed = path.stat().st_mtime_ns if path.exists() else 0
    return f"{REPORT}?{urlencode({'path': str(path), 'v': changed})}"


def small_picture(places: Places, path: str, side: int) -> bytes:
    """A picture of one of the page's folders as PNG, no side longer than `side`; it is decoded and written anew, so
    that nothing but its pixels goes out.

    Raises:
        UserError: if it lies elsewhere, is no picture, or is too large.
    """
    if side not in SIDES:
        raise UserError(f"side is {side}; expected one of {', '.join(map(str, SIDES))}.")
    real = places.readable(path)
    if real.suffix.lower() not in EXTENSIONS:
        raise UserError(f"{path} is no picture.")
    try:
        return _small(str(real), side, real.stat().st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None


@lru_cache(maxsize=256)
def _small(path: str, side: int, changed: int) -> bytes:
    image = decode_image(read_file(path, MAX_PIXELS * BYTES_PER_PIXEL))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return encoded(image)


def encoded(image: Image.Image) -> bytes:
    """As PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def report_page(places: Places, path: str) -> bytes:
    """A report of a run; it is sent with `SANDBOX`.

    Raises:
        UserError: if it lies elsewhere or is none.
    """
    real = places.readable(path)
    if real.name not in REPORTS:
        raise UserError(f"{path} is no report; expected {' or '.join(REPORTS)}.")
    try:
        return read_file(real, MOST_REPORT)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
