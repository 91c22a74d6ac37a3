"""Pictures and captions that are trained on: rows as they are found, and examples that were checked."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from difftuning_control.errors import UserError
from difftuning_control.recipe.captioning import Captioning
from difftuning_control.system.untrusted import is_text

NAMED = 10  # so many pictures are named, and the number of the rest
Read = Callable[[int], bytes]  # gives the bytes of a picture, if they are no more than so many


@dataclass(frozen=True)
class Row:
    """A picture before it is checked; `condition` and `mask` read those that are supplied for it, and `unread` is the
    name of a file beside it that seems to hold its caption and is not read."""

    name: str
    read: Read
    caption: Any
    condition: Read | None = None
    mask: Read | None = None
    unread: str | None = None

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
            but = f" ({self.unread} is not read, but a .txt of its name)" if self.unread is not None else ""
            raise UserError(
                f"has no caption{but}; write one, or give one for all with --data.default_caption or --trigger"
            )
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
    holds_classes: bool = False

    @classmethod
    def of(cls, image: str, caption: str, condition: str | None, classes: str | None) -> Columns:
        """The columns by the settings; of classes it is `label` where no other is named."""
        is_label = classes == "label"
        return cls(image, "label" if is_label and caption == cls.caption else caption, condition, is_label)

    def caption_of(self, value: Any) -> Any:
        """What stands in the column of captions; a label may be a number."""
        return str(value) if (self.holds_classes or self.caption == "label") and type(value) is int else value


@dataclass(frozen=True)
class Example:
    """One picture and its caption. `load` gives the picture as 8-bit RGB; `digest` identifies its bytes.

    `load_condition` and `condition_digest` are those of a condition picture that the user supplies, else None;
    `load_mask` gives what each pixel counts, as `Mask.load`, where there are masks.
    """

    name: str
    caption: str
    digest: str
    load: Callable[[], Image.Image] = field(compare=False, repr=False)
    condition_digest: str | None = None
    load_condition: Callable[[], Image.Image] | None = field(default=None, compare=False, repr=False)
    size: tuple[int, int] = field(default=(0, 0), compare=False)  # width and height, upright
    mask_digest: str | None = None
    load_mask: Callable[[], Image.Image] | None = field(default=None, compare=False, repr=False)


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
        """Changes when a picture, a caption, a supplied condition, a mask or their order does."""
        lines = [
            " ".join(filter(None, [e.digest, e.condition_digest, e.mask_digest, e.caption])) for e in self.examples
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    @property
    def unmasked(self) -> ImageData:
        """The same pictures without their masks."""
        return replace(self, examples=[replace(e, mask_digest=None, load_mask=None) for e in self.examples])

    def split(self, holdout: float) -> tuple[ImageData, ImageData]:
        """Examples to tune on and held-out ones, the latter rounded up from their share; always the same ones."""
        order = np.random.default_rng(0).permutation(len(self))
        count = math.ceil(round(len(self) * holdout, 9))  # 7 of 100 for 0.07, which is a little more as a float
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


def listed(names: Iterable[str], most: int = NAMED) -> str:
    """At most so many names, ten by default, and the number of the rest."""
    first = list(names)
    rest = len(first) - most
    return ", ".join(first[:most]) + (f" and {rest} more" if rest > 0 else "")


def with_reasons(bad: dict[str, str]) -> str:
    """At most ten names, each with what is wrong with it in a few words, and the number of the rest."""
    return listed(f"{name} ({reason.partition(';')[0].removeprefix('has ')})" for name, reason in bad.items())
