"""Raw rows turned into examples: every picture is decoded once, and what is wrong with one is collected."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from PIL import Image

from difftuning_control.data.examples import NAMED, Example, ImageData, Read, Row, with_reasons
from difftuning_control.data.images import EXTENSIONS, decode_image, refuse_unread
from difftuning_control.data.masks import Mask, check_mask, opaque_of
from difftuning_control.errors import UserError
from difftuning_control.recipe.captioning import Captioning
from difftuning_control.recipe.masking import Masking
from difftuning_control.system.untrusted import BYTES_PER_PIXEL, MAX_PIXELS

KEPT = 2**26  # bytes of decoded pictures that are kept from checking to their first use
CONDITION = "has a condition that "  # what is wrong with it follows


def trigger_alone(captioning: Captioning, bare: int, those: str) -> list[str]:
    """What to say where pictures have no words of their own, perhaps for a wrong name of a column.

    Args:
        bare: how many.
        those: what they are part of, such as `of 10 pictures of x`.
    """
    if captioning.trigger is None or captioning.default is not None or not bare:
        return []
    return [f"{bare} {those} {'has' if bare == 1 else 'have'} no caption, and so {captioning.trigger!r} alone"]


def trigger_unset(captions: int, those: str) -> list[str]:
    """What to say where captions hold `[trigger]` and no trigger is given.

    Args:
        captions: how many.
        those: what they are part of, as above.
    """
    if not captions:
        return []
    return [f"captions hold [trigger] ({captions} {those}); give --trigger, which is put there"]


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

    def __init__(
        self,
        skip_bad: bool,
        captioning: Captioning,
        max_pixels: int = MAX_PIXELS,
        masking: Masking | None = None,
    ):
        self.skip_bad, self.captioning, self.max_pixels, self.masking = skip_bad, captioning, max_pixels, masking
        self.bad: dict[str, str] = {}
        self._room = KEPT
        self._bare = self._whole = 0  # of the examples: without words of their own, with a mask that is white
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
        unset = sum(self.captioning.has_placeholder(e.caption) for e in examples)
        notes += trigger_unset(unset, f"of {len(examples)} pictures of {source}")
        notes += opaque_of(self.masking, self._whole, len(examples), source) if self.masking is not None else []
        return ImageData(source, examples, self.bad, ignored, notes)

    def takes(self, example: Example, check: Callable[[Example], object]) -> bool:
        """Whether a check lets an example through; `bad` says else why not."""
        try:
            check(example)
        except UserError as error:
            self.bad[example.name] = str(error)
        return example.name not in self.bad

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
        example = Example(row.name, caption, picture.digest, picture.load, size=picture.size)
        if row.condition is not None:
            condition = self._picture(row.name, row.condition, CONDITION)
            if condition is None or not self._fits(example, condition.size, "condition"):
                return None
            example = replace(example, condition_digest=condition.digest, load_condition=condition.load)
        if self.masking is not None:
            mask = self._mask(row, self.masking)
            if mask is None or not self._fits(example, mask.size, "mask"):
                return None
            example = replace(example, mask_digest=mask.digest, load_mask=mask.load)
            self._whole += mask.is_whole
        self._bare += row.is_bare
        return example

    def _fits(self, example: Example, size: tuple[int, int], what: str) -> bool:
        """Whether another picture has the proportions of its picture."""
        (width, height), (wide, high) = example.size, size
        if abs(width * high - wide * height) <= max(width * high, wide * height) / min(width, height, wide, high):
            return True
        self.bad[example.name] = f"is {width}x{height}, but its {what} {wide}x{high}; expected the same proportions"
        return False

    def _mask(self, row: Row, masking: Masking) -> Mask | None:
        """The mask of a picture that can be used."""
        read, what = (row.read, "") if row.mask is None else (row.mask, "has a mask that ")
        with self._noting(row.name, what):
            return check_mask(partial(read, self.max_pixels * BYTES_PER_PIXEL), masking, self.max_pixels)
        return None

    @contextmanager
    def _noting(self, name: str, what: str) -> Iterator[None]:
        """Notes what is wrong with a file that cannot be used, and goes on behind the block."""
        try:
            yield
        except UserError as error:
            self.bad[name] = f"{what}{error}"
        except OSError as error:
            self.bad[name] = f"{what}cannot be read ({error.strerror})"

    def decode(self, read: Read) -> Image.Image:
        return decode_image(read(self.max_pixels * BYTES_PER_PIXEL), self.max_pixels)

    def _picture(self, name: str, read: Read, what: str = "") -> CheckedPicture | None:
        """A picture that can be used."""
        with self._noting(name, what):
            refuse_unread(name)
            content = read(self.max_pixels * BYTES_PER_PIXEL)
            image, digest = decode_image(content, self.max_pixels), hashlib.sha256(content).hexdigest()
            needed = image.width * image.height * len(image.getbands())
            keep = needed <= self._room
            self._room -= needed if keep else 0
            return CheckedPicture(image, digest, lambda: self.decode(read), keep)
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
