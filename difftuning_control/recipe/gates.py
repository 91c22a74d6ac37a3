"""The section of a recipe that says by which limits a finished run is judged."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from difftuning_control.errors import UserError, need
from difftuning_control.recipe.drawing import USUAL_GUIDANCE, SeededDrawSettings
from difftuning_control.system.home import expand_paths

GATES = ("kid", "retention_loss", "fidelity", "memorisation")
DRAWN = {"features": "lite0", "pictures": 64, "seeds": [0, 1, 2], "steps": 20, "guidance_scale": 4.0}


@dataclass
class GatesConfig(SeededDrawSettings):
    """Limits that a finished run is judged by; one that fails them is marked, and not exported unasked.

    Args:
        kid: highest KID on held-out pictures (the KID itself, of which tables show × 1000). [≥ 0]
        retention_loss: highest rise of the loss on held-out bank samples over the base's (0.1 is 10 %). [≥ -1]
        fidelity: lowest main figure of a ControlNet on held-out conditions; for depth, whose figure is the RMSE, the
            highest. [0 to 1]
        memorisation: highest mean cosine to the nearest training picture. [-1 to 1]
    """

    steps: int = field(default=20, kw_only=True)  # both are filled in with the recipe
    guidance_scale: float = field(default=USUAL_GUIDANCE, kw_only=True)
    kid: float | None = None
    retention_loss: float | None = None
    fidelity: float | None = None
    memorisation: float | None = None

    def __post_init__(self) -> None:
        expand_paths(self, "features")
        for name, low, high in (
            ("kid", 0, math.inf),
            ("retention_loss", -1, math.inf),
            ("fidelity", 0, 1),
            ("memorisation", -1, 1),
        ):
            value = getattr(self, name)
            expected = f"{low} to {high}" if high < math.inf else f"a finite number of at least {low}"
            need(value is None or (low <= value <= high and value < math.inf), f"gates.{name}", value, expected)
        self.check_drawing("gates.")
        drawn = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in GATES}
        if not self.draws and drawn != DRAWN:
            raise UserError(
                "gates has settings of the pictures to draw, but no limit on kid, fidelity or memorisation; give one, "
                "or leave them out."
            )

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set."""
        return {name: getattr(self, name) for name in GATES if getattr(self, name) is not None}

    @property
    def draws(self) -> bool:
        """Whether pictures must be drawn to judge by these."""
        return bool(self.of_pictures)

    @property
    def of_pictures(self) -> list[str]:
        """Those of the limits that are of drawn pictures."""
        return [name for name in self.limits if name != "retention_loss"]
