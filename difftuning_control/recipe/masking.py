"""What a recipe says of masks: where they come from, and what counts outside of them."""

from __future__ import annotations

from dataclasses import dataclass

ALPHA = "alpha"


@dataclass(frozen=True)
class Masking:
    """How much each pixel of a picture counts while it is learnt: 1 where its mask is white, `outside` where black.

    Args:
        source: `alpha`, what is opaque in the pictures themselves, or a folder with a mask named like each picture.
        outside: in [0, 1).
    """

    source: str
    outside: float

    @property
    def folder(self) -> str | None:
        return None if self.source == ALPHA else self.source
