"""Untrusted input: special files, invalid text and pickles are refused."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from difftuning_control.errors import UserError

MAX_PIXELS = 89_478_485  # of a picture: where Pillow begins to warn of decompression bombs
MOST_PIXELS = 2 * MAX_PIXELS  # where Pillow itself refuses
BYTES_PER_PIXEL = 8  # of the largest file that such a picture may be: four channels of 16 bits, not compressed
MOST_TEXT = 1 << 30  # bytes of a recipe, a caption, a list of prompts or metadata

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_CONVERT = {
    "model": 'python -c \'from diffusers import DiffusionPipeline as P; P.from_pretrained("{path}", '
    'use_safetensors=False).save_pretrained("converted")\'',
    "checkpoint": 'python -c \'from diffusers import StableDiffusionPipeline as P; P.from_single_file("{path}")'
    '.save_pretrained("converted")\'',
    "ControlNet": 'python -c \'from diffusers import ControlNetModel as C; C.from_pretrained("{path}", '
    'use_safetensors=False).save_pretrained("converted")\'',
    "network": 'python -c \'from transformers import AutoModel as M; M.from_pretrained("{path}", use_safetensors=False)'
    '.save_pretrained("converted")\'',
    "adapter": "python -c 'import torch; from safetensors.torch import save_file as s; "
    's(torch.load("{path}", weights_only=True), "converted.safetensors")\'',
}


# --- files ----------------------------------------------------------------------------------------------------------


def read_file(path: str | Path, most: int = MOST_TEXT) -> bytes:
    """The content of an ordinary file; pipes and devices are not waited for.

    Raises:
        OSError: if it cannot be read, is no ordinary file, or has more than `most` bytes.
    """
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "no file can have this name", str(path).replace("\0", "␀"))
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no ordinary file", str(path))
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, expected at most {most}", str(path))
        return file.read(most)


def read_text(path: str | Path) -> str:
    """An ordinary file as UTF-8 text, without a byte order mark and with any kind of line end as \\n.

    Raises:
        OSError, UnicodeDecodeError: if it is none.
    """
    content = read_file(path)
    if (place := content.find(b"\0")) >= 0:  # UTF-16 without a mark, which is valid UTF-8 and no text
        raise UnicodeDecodeError("utf-8", content, place, place + 1, "a NUL, which no text has")
    return as_lines(content.decode("utf-8-sig"))


def as_lines(text: str) -> str:
    """Text with any kind of line end as \\n."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def from_json(text: str) -> Any:
    """A JSON value; a ValueError also where it is nested too deeply, has a number that is too long or a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} stands twice")
        values[key] = value
    return values


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: lone surrogates are halves of characters, or bytes that are no text."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


# --- pickles --------------------------------------------------------------------------------------------------------


def refuse_pickle(what: str, place: str | Path, kind: str, parts: Iterable[str] | None = None) -> None:
    """Refuse a pickle, or a directory of which a part has its weights as pickles only; nothing of it is read.

    Args:
        what: for the sentence: the model runs/x.
        kind: model, checkpoint (a model as one file), ControlNet, network (of transformers) or adapter.
        parts: folders in a directory that are read, and nothing beside them; when None it and all that it holds.

    Raises:
        UserError: with the way to convert it.
    """
    place = Path(place)
    pickled = place if place.suffix.lower() in PICKLED and place.is_file() else _pickled_part(place, parts)
    if pickled is not None:
        way = _CONVERT[kind].format(path=place if kind != "adapter" else pickled)
        raise UserError(
            f"{what} has its weights as a pickle ({pickled.name}), which may run code when it is read and is never "
            f"loaded; where you trust its source, convert it: {way}."
        )


def _pickled_part(folder: Path, parts: Iterable[str] | None) -> Path | None:
    """A pickle without safetensors beside it, in a directory of weights or one level below."""
    if not folder.is_dir():
        return None
    inside = sorted(p for p in folder.iterdir() if p.is_dir())
    for part in [folder, *inside] if parts is None else [p for p in inside if p.name in parts]:
        files = sorted(p for p in part.iterdir() if p.is_file())
        pickles = [p for p in files if p.suffix.lower() in PICKLED and p.name != "training_args.bin"]
        if pickles and not any(p.suffix == ".safetensors" for p in files):
            return pickles[0]
    return None


def leads_outside(path: Path, root: Path) -> str | None:
    """Where a path leads if that is not in the folder `root`; symbolic links are followed."""
    if "\0" in str(path):  # which no file has in its name
        return None
    target = os.path.realpath(path)
    return None if Path(target).is_relative_to(os.path.realpath(root)) else target
