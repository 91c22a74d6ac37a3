"""ψ and ξ as they were measured: what a `schedule.json` holds, and a run's record where it measured its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from difftuning_control.system.sections import Section

if TYPE_CHECKING:
    from difftuning_control.objective.schedules import TabulatedSchedule


@dataclass(kw_only=True)
class MeasuredSchedule(Section):
    """ψ and ξ by u, with what they were fitted to.

    Args:
        kind: measured.
        u: points of the noise coordinate.
        psi: ψ at these points.
        xi: ξ at these points.
        gap: the transfer gap with its interval; None in a table of the user's own.
        losses: of the pretrained model by role and band; None as above.
        advice: codes of what the gap says about retention; None as above.
        rows: how many rows of each role were measured; None as above.
    """

    SOMETIMES: ClassVar = ("gap", "losses", "advice", "rows")

    kind: str = "measured"
    u: list[float] = field(default_factory=list)
    psi: list[float] = field(default_factory=list)
    xi: list[float] = field(default_factory=list)
    gap: dict[str, list[float]] | None = None
    losses: dict[str, list[float]] | None = None
    advice: list[str] | None = None
    rows: int | None = None

    def build(self) -> TabulatedSchedule:
        """The schedule itself.

        Raises:
            ValueError: if the table is no schedule, see `TabulatedSchedule`.
        """
        from difftuning_control.objective.schedules import TabulatedSchedule  # saves torch for what is only read

        return TabulatedSchedule(self.u, self.psi, self.xi)


def measured_from(values: Any) -> MeasuredSchedule:
    """What a `schedule.json` says, in which u, psi and xi count; what else a user's own file has is passed over.

    Raises:
        TypeError: if it is no object, or one of the three no list.
        KeyError: if one of the three is missing.
    """
    return MeasuredSchedule.from_dict({name: values[name] for name in ("u", "psi", "xi")})
