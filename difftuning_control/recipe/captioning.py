"""The captions that are trained with: a picture's own words, what stands in where it has none, and a trigger."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from difftuning_control.errors import UserError
from difftuning_control.system.secrets import HIDDEN, without_secrets
from difftuning_control.system.text import composed

# Thai to Myanmar, Khmer, and all of East Asia: scripts whose words stand without spaces, or with endings
UNSPACED = ((0x0E00, 0x109F), (0x1780, 0x17FF), (0x2E80, 0xFAFF), (0xFF66, 0xFFDC), (0x20000, 0x3FFFF))
PLACEHOLDER = re.compile(r"\[trigger\]", re.IGNORECASE)  # where captions for ai-toolkit have the trigger


@dataclass(frozen=True)
class Captioning:
    """How a picture's words become its caption.

    Args:
        default: caption of pictures that have none.
        trigger: words that stand for what is learnt, put wherever a caption has `[trigger]`. A caption that has them
            then, as whole words and in any case, stays as it is; others get them in front, and a picture without a
            caption has them alone.
    """

    default: str | None = None
    trigger: str | None = None

    @property
    def of_none(self) -> str | None:
        """The caption of a picture without one; None where it must have one."""
        return self.of(None)

    def refuse_secrets(self) -> None:
        """Refuse words that look like a secret: a run's files have `(secret)` for them, and would say other captions.

        Raises:
            UserError: naming the key; not the words.
        """
        for key, words in (("data.trigger", self.trigger), ("data.default_caption", self.default)):
            if words is not None and without_secrets(words) != words:
                raise UserError(
                    f"{key} looks like a secret, such as a token or a key, and would be {HIDDEN} in the run's recipe, "
                    "from which the run could not go on; choose other words."
                )

    def finds_none(self, columns: Iterable[str], known: Iterable[str], others: Iterable[str]) -> bool:
        """Whether rows with these columns lack captions that they must have, or that a wrong name may hide.

        Args:
            known: columns that hold captions.
            others: columns that hold something else.
        """
        there = set(columns)
        if self.default is not None or not there.isdisjoint(known):
            return False
        return self.trigger is None or bool(there.difference(others))

    def hidden_by_default(
        self, place: object, columns: Iterable[str], known: Sequence[str], others: Iterable[str]
    ) -> list[str]:
        """What to say where one caption stands in for all, and another column might hold their own.

        Args:
            known: columns that hold captions, the one that is asked for first.
            others: columns that hold something else.
        """
        there = sorted(columns)
        if not self.default or not set(there).isdisjoint(known) or not set(there).difference(others):
            return []
        only = f"{place} has no column {known[0]!r}, only {', '.join(there)}"
        return [f"{only}; so every caption is {self.of_none!r}, unless --data.caption_column names one of these"]

    def of(self, text: str | None) -> str | None:
        """The caption of a picture with these words beside it; None where there is none."""
        caption = self._placed((text or "").strip() or self.default or "") or self.default
        if self.trigger is None or (caption and not self.is_missing(caption)):
            return caption
        return f"{self.trigger} {caption}" if caption else self.trigger

    def has_placeholder(self, caption: str) -> bool:
        """Whether a caption says `[trigger]` where captions play a part, and there is no trigger to stand there."""
        return self.of_none != "" and self.trigger is None and PLACEHOLDER.search(caption) is not None

    def _placed(self, caption: str) -> str:
        """A caption with the trigger, if there is one, where `[trigger]` stands."""
        trigger = self.trigger
        return caption if trigger is None else PLACEHOLDER.sub(lambda _: trigger, caption)

    def is_missing(self, prompt: str) -> bool:
        """Whether there is a trigger that a prompt does not say."""
        return self.trigger is not None and next(self._places(composed(prompt)), None) is None

    def untriggered(self, caption: str) -> str:
        """A caption without the trigger, which the pretrained model does not know; empty where it was no more."""
        caption = self._placed(caption)
        if self.is_missing(caption) or self.trigger is None:
            return caption
        text, end, kept = composed(caption), 0, []
        for begin, after in self._places(text):
            kept.append(text[end:begin])
            end = after
        return " ".join(" ".join([*kept, text[end:]]).split()).lstrip(",.;: ")

    def _places(self, text: str) -> Iterator[tuple[int, int]]:
        """Where the trigger begins and ends in a composed text."""
        words = composed(self.trigger or "").split()
        for match in re.finditer(r"\s+".join(map(re.escape, words)), text, re.IGNORECASE):
            begin, end = match.span()
            if not (_joined(text[begin], text[begin - 1 : begin]) or _joined(text[end - 1], text[end : end + 1])):
                yield begin, end


def _joined(edge: str, beside: str) -> bool:
    """Whether a character beside the edge of words makes longer words of them."""
    if not beside:
        return False
    if unicodedata.category(beside).startswith("M"):
        return True
    return all(c.isalnum() or c == "_" for c in (edge, beside)) and not any(a <= ord(edge) <= b for a, b in UNSPACED)
