"""The captions that are trained with: a picture's own words, what stands in where it has none, and a trigger."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Captioning:
    """How a picture's words become its caption.

    Args:
        default: caption of pictures that have none.
        trigger: words that stand for what is learnt. A caption that has them somewhere, as whole words and in any case,
            stays as it is; others get them in front, and a picture without a caption has them alone.
    """

    default: str | None = None
    trigger: str | None = None

    @property
    def of_none(self) -> str | None:
        """The caption of a picture without one; None where it must have one."""
        return self.of(None)

    def of(self, text: str | None) -> str | None:
        """The caption of a picture with these words beside it; None where there is none."""
        caption = (text or "").strip() or self.default
        if self.trigger is None or (caption and self._trigger.search(caption)):
            return caption
        return f"{self.trigger} {caption}" if caption else self.trigger

    def untriggered(self, caption: str) -> str:
        """A caption without the trigger, which the pretrained model does not know; empty where it was no more."""
        if self.trigger is None:
            return caption
        return " ".join(self._trigger.sub(" ", caption).split()).lstrip(",.;: ")

    @property
    def _trigger(self) -> re.Pattern[str]:
        return re.compile(rf"(?<!\w){re.escape(self.trigger or '')}(?!\w)", re.IGNORECASE)
