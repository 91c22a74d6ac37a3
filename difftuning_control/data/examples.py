"""Pictures and captions that are trained on: rows as they are found, and examples that were checked.

Every picture is decoded once before anything is trained on it; one that cannot be used is named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from difftuning_control.data.images import EXTENSIONS, decode_image, refuse_unread
from difftuning_control.errors import UserError
from difftuning_control.recipe.captioning import Captioning
from difftuning_control.system.untrusted import BYTES_PER_PIXEL, MAX_PIXELS, is_text

KEPT = 2**26  # bytes of decoded pictures that are kept from checking to their first use
CONDITION = "has a condition that "  # what is wrong with it follows
NAMED = 10  # so many pictures are named, and the number of the rest
Read = Callable[[int], bytes]  # gives the bytes of a picture, if they are no more than so many


@dataclass(frozen=True)
class Row:
    """A picture before it is checked; `condition` reads the picture supplied as its condition."""

    name: str
    read: Read
    caption: Any
    condition: Read | None = None

    @property
    def is_bare(self) -> bool:
        """Whether the picture has no words of its own."""
        return not (isinstance(self.caption, str) and self.caption.strip())

    def usable_caption(self, captioning: Captioning) -> str:
        """The caption as it is trained with.

        Raises:
            UserError: where there is none, or it is no text.
        """
        if self.caption is not None and not isinstance(self.caption, str):
            raise UserError(f"has a {type(self.caption).__name__} for a caption; expected text")
        caption = captioning.of(self.caption)
        if caption is None:
            raise UserError("has no caption; write one, or give one for all with --data.default_caption or --trigger")
        if not is_text(caption):
            raise UserError("has a caption with halves of characters (lone surrogates); expected Unicode text")
        if "\0" in caption:
            raise UserError("has a caption with a NUL, as UTF-16 text has that is read as UTF-8; expected Unicode text")
        return caption


@dataclass(frozen=True)
class Columns:
    """Names of columns; a folder's metadata has no column of pictures but file_name."""

    image: str = "image"
    caption: str = "text"
    condition: str | None = None

    def caption_of(self, value: Any) -> Any:
        """What stands in the column of captions; a label may be a number."""
        return str(value) if self.caption == "label" and type(value) is int else value


@dataclass(frozen=True)
class Example:
    """One picture and its caption. `load` gives the picture as 8-bit RGB; `digest` identifies its bytes.

    `load_condition` and `condition_digest` are those of a condition picture that the user supplies, else None.
    """

    name: str
    caption: str
    digest: str
    load: Callable[[], Image.Image] = field(compare=False, repr=False)
    condition_digest: str | None = None
    load_condition: Callable[[], Image.Image] | None = field(default=None, compare=False, repr=False)
    size: tuple[int, int] = field(default=(0, 0), compare=False)  # width and height, upright


@dataclass(frozen=True)
class ImageData:
    """The usable examples of a data set, what was skipped and why, and how many other files lay beside them.

    `notes` are lines to be shown: which split was taken, and what else was left out.
    """

    source: str
    examples: list[Example]
    skipped: dict[str, str] = field(default_factory=dict)
    ignored_files: int = 0
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def fingerprint(self) -> str:
        """Changes when a picture, a caption, a supplied condition or their order does."""
        lines = [" ".join(filter(None, [e.digest, e.condition_digest, e.caption])) for e in self.examples]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def split(self, holdout: float) -> tuple[ImageData, ImageData]:
        """Examples to tune on and held-out ones, the latter rounded up from their share; always the same ones."""
        order = np.random.default_rng(0).permutation(len(self))
        count = int(np.ceil(len(self) * holdout))
        if holdout > 0 and count >= len(self):
            raise UserError(
                f"{self.source} has {len(self)} usable pictures, and holding out {holdout:.0%} of them leaves none to "
                "tune on; add pictures or set --data.holdout 0."
            )
        held = set(order[:count].tolist())
        parts: list[list[Example]] = [[], []]
        for i, example in enumerate(self.examples):
            parts[i in held].append(example)
        return replace(self, examples=parts[0]), ImageData(self.source, parts[1])

    def sample(self, count: int) -> ImageData:
        """At most `count` examples, always the same ones of the same data."""
        chosen = np.random.default_rng(0).permutation(len(self))[:count]
        return replace(self, examples=[self.examples[i] for i in sorted(chosen)])


def listed(names: Iterable[str]) -> str:
    """At most ten names, and the number of the rest."""
    first = list(names)
    rest = len(first) - NAMED
    return ", ".join(first[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def with_reasons(bad: dict[str, str]) -> str:
    """At most ten names, each with what is wrong with it in a few words, and the number of the rest."""
    return listed(f"{name} ({reason.partition(';')[0].removeprefix('has ')})" for name, reason in bad.items())


def trigger_alone(captioning: Captioning, bare: int, those: str) -> list[str]:
    """What to say where pictures have no words of their own, perhaps for a wrong name of a column.

    Args:
        bare: how many.
        those: what they are part of, such as `of 10 pictures of x`.
    """
    if captioning.trigger is None or captioning.default is not None or not bare:
        return []
    return [f"{bare} {those} {'has' if bare == 1 else 'have'} no caption, and so {captioning.trigger!r} alone"]


class CheckedPicture:
    """A picture that was decoded once; where it is kept, its first use takes it, and all others decode it again."""

    def __init__(self, image: Image.Image, digest: str, decode: Callable[[], Image.Image], keep: bool):
        self.size, self.digest, self._decode = image.size, digest, decode
        self._kept = [image] if keep else []

    def load(self) -> Image.Image:
        """8-bit RGB."""
        try:
            return self._kept.pop()
        except IndexError:  # not kept, or taken, perhaps by another thread
            return self._decode()


class Checker:
    """Turns raw rows into examples, collecting what is wrong with each, and lines to be shown."""

    def __init__(self, skip_bad: bool, captioning: Captioning, max_pixels: int = MAX_PIXELS):
        self.skip_bad, self.captioning, self.max_pixels = skip_bad, captioning, max_pixels
        self.bad: dict[str, str] = {}
        self._room = KEPT
        self._bare = 0  # of the examples
        self.notes: list[str] = []

    def data(self, source: str, rows: Iterable[Row], ignored: int = 0) -> ImageData:
        examples = [e for row in rows if (e := self.example(row)) is not None]
        self.stop_if_bad(source)
        if not examples:
            rest = f"{ignored} other files" if ignored else "nothing"
            skipped = f" ({len(self.bad)} skipped as unusable)" if self.bad else ""
            rest += "".join(f" ({note})" for note in self.notes)
            raise UserError(
                f"{source} has no usable picture{skipped}, but {rest}; expected {', '.join(sorted(EXTENSIONS))} files."
            )
        notes = [*self.notes, *self._left_out(len(examples), source)]
        notes += trigger_alone(self.captioning, self._bare, f"of {len(examples)} pictures of {source}")
        return ImageData(source, examples, self.bad, ignored, notes)

    def example(self, row: Row) -> Example | None:
        """The row as an example; None where it cannot be used, and `bad` then says why."""
        try:
            caption = row.usable_caption(self.captioning)
        except UserError as error:
            self.bad[row.name] = str(error)
            return None
        picture = self._picture(row.name, row.read)
        if picture is None:
            return None
        self._bare += row.is_bare
        if row.condition is None:
            return Example(row.name, caption, picture.digest, picture.load, size=picture.size)
        condition = self._picture(row.name, row.condition, CONDITION)
        if condition is None:
            return None
        (width, height), (wide, high) = picture.size, condition.size
        if abs(width * high - wide * height) > max(width * high, wide * height) / min(width, height, wide, high):
            self.bad[row.name] = f"is {width}x{height}, but its condition {wide}x{high}; expected the same proportions"
            return None
        return Example(row.name, caption, picture.digest, picture.load, condition.digest, condition.load, picture.size)

    def decode(self, read: Read) -> Image.Image:
        return decode_image(read(self.max_pixels * BYTES_PER_PIXEL), self.max_pixels)

    def _picture(self, name: str, read: Read, what: str = "") -> CheckedPicture | None:
        """A picture that can be used."""
        try:
            refuse_unread(name)
            content = read(self.max_pixels * BYTES_PER_PIXEL)
            image, digest = decode_image(content, self.max_pixels), hashlib.sha256(content).hexdigest()
            needed = image.width * image.height * len(image.getbands())
            keep = needed <= self._room
            self._room -= needed if keep else 0
            return CheckedPicture(image, digest, lambda: self.decode(read), keep)
        except UserError as error:
            self.bad[name] = f"{what}{error}"
        except OSError as error:
            self.bad[name] = f"{what}cannot be read ({error.strerror})"
        return None

    def _left_out(self, used: int, source: str) -> list[str]:
        if not self.bad:
            return []
        return [f"using {used} of {used + len(self.bad)} pictures of {source}; left out: {with_reasons(self.bad)}"]

    def stop_if_bad(self, source: str) -> None:
        """Refuse bad rows unless they are to be skipped.

        Raises:
            UserError: naming the first ten.
        """
        if self.bad and not self.skip_bad:
            (name, reason), *others = self.bad.items()
            more = len(others)
            also = with_reasons(dict(others[: NAMED - 1]))
            rest = f" and {more - NAMED + 1} more" if more >= NAMED else ""
            files = "files" if more > 1 else "file"
            said = f" (and {more} more {files} with a problem: {also}{rest})" if others else ""
            raise UserError(
                f"{name} in {source} {reason}{said}; mend it, or leave such files out: --data.skip_bad true."
            )
