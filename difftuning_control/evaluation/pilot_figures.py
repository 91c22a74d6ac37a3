"""What a pilot's record holds beside the figures of its sides: its pictures, and the side with a forgetting budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from difftuning_control.system.sections import Section, list_of

VOTE = "vote.html"  # beside a pilot's report


@dataclass(kw_only=True)
class PilotBudget(Section):
    """How the side with a forgetting budget kept it, by noise band, as the mean over its seeds.

    Args:
        side: its name.
        allowed: the rise of the loss on the bank that was allowed.
        rise: the rise that was measured.
        multipliers: of the bank rows over the steps of its first run; None where none were logged.
        target_cost: the rise of the loss on the target over that of plain fine-tuning; None in earlier records.
    """

    side: str = ""
    allowed: list[float] = field(default_factory=list)
    rise: list[float] = field(default_factory=list)
    multipliers: dict[str, Any] | None = None
    target_cost: float | None = None


@dataclass(kw_only=True)
class PictureRow(Section):
    """The pictures of one side, of the base, or the true ones.

    Args:
        name: of the side; base, or truth.
        files: in the pilot's folder, one a prompt.
    """

    name: str = ""
    files: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class PilotPictures(Section):
    """The pictures that a report shows.

    Args:
        prompts: that they were drawn for.
        rows: of pictures.
    """

    READERS: ClassVar = {"rows": list_of(PictureRow)}

    prompts: list[str] = field(default_factory=list)
    rows: list[PictureRow] = field(default_factory=list)


def picture_rows(sides: Sequence[Mapping[str, Any]], count: int) -> list[PictureRow]:
    """The rows of each side's pictures, of its first run at its best length."""
    rows = []
    for side in sides:
        first = next(row for row in side["runs"] if row["steps"] == side["best_length"])
        place = f"{first['folder']}/pictures-{first['steps']}"
        rows.append(PictureRow(name=side["name"], files=[f"{place}/{i}.png" for i in range(count)]))
    return rows


def outside_rows(sides: Sequence[Mapping[str, Any]], count: int) -> list[PictureRow]:
    """The base's and each side's pictures outside the new domain, of its first run at its best length."""
    rows = [PictureRow(name="base", files=[f"base/pictures-outside/{i}.png" for i in range(count)])]
    for side in sides:
        first = next(row for row in side["runs"] if row["steps"] == side["best_length"])
        files = [f"{first['folder']}/pictures-outside/{i}.png" for i in range(count)]
        rows.append(PictureRow(name=side["name"], files=files))
    return rows


def is_at_an_end(rate: float, tried: Iterable[float]) -> bool:
    """Whether a learning rate is the lowest or the highest of several that were tried."""
    ordered = sorted(tried)
    return len(ordered) > 1 and rate in (ordered[0], ordered[-1])
