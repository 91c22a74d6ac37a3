"""What the tabs of a page share: its folders, its commands, and what draws."""

from __future__ import annotations

from dataclasses import dataclass, field

from difftuning_control.verbs.ui.jobs import Jobs
from difftuning_control.verbs.ui.painter import Painter
from difftuning_control.verbs.ui.places import Places


@dataclass
class Studio:
    """One page.

    Args:
        places: its folders.
        jobs: the commands that it starts.
        painter: what draws, one request after the other.
    """

    places: Places
    jobs: Jobs = field(init=False)
    painter: Painter = field(init=False)

    def __post_init__(self) -> None:
        self.painter = Painter(self.places)
        self.jobs = Jobs(self.places, self.painter.forget)
