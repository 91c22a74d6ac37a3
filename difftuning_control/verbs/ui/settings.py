"""What `difftune ui` serves, and to whom."""

from __future__ import annotations

from dataclasses import dataclass, field

from difftuning_control.errors import need
from difftuning_control.system.home import expand_paths


@dataclass
class UiSettings:
    """What the page may show, and where it is reached.

    Args:
        folder: whose runs are shown, and where new ones are written (below runs); pictures in it can be used too.
        pictures: further folders of pictures, whose captions may be edited.
        port: of the page. [0 to 65535, 0 for a free one]
        host: address to listen on for other machines, then with a password (DIFFTUNE_UI_PASSWORD, or a drawn one that
            is printed); this machine alone when empty.
    """

    folder: str = "."
    pictures: list[str] = field(default_factory=list)
    port: int = 7860
    host: str | None = None

    def __post_init__(self) -> None:
        expand_paths(self, "folder", "pictures")
        need(0 <= self.port <= 65535, "port", self.port, "0 to 65535")
