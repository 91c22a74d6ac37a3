"""What eyes said of a run: blind votes between its pictures and another side's, with the share that it won."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock

from difftuning_control.errors import UserError
from difftuning_control.system.durable import write_json
from difftuning_control.system.untrusted import from_json, read_text

VOTES = "votes.json"
TRAINED = "trained_steps"  # of a vote: the steps of the weights that drew the run's picture
Z = 1.959963984540054  # of a 95 % interval


@dataclass(frozen=True)
class Tally:
    """The votes of a run's weights against one other side.

    Args:
        against: base, or the name of another run.
        won, lost, same: how often its picture was preferred, the other one, and neither.
        trained: steps of these weights; None of votes of an earlier version on a result, which do not say.
    """

    against: str
    won: int
    lost: int
    same: int
    trained: int | None = None

    @property
    def share(self) -> float | None:
        """Of the votes that preferred one, those for the run; None without any."""
        return self.won / (self.won + self.lost) if self.won + self.lost else None

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.won, self.won + self.lost)


def wilson(won: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score, (low, high); (0, 1) without any vote.

    References:
        Probable Inference, the Law of Succession, and Statistical Inference (Wilson, 1927),
        https://doi.org/10.1080/01621459.1927.10502953
    """
    if not count:
        return 0.0, 1.0
    share, weight = won / count, Z * Z / count
    middle = (share + weight / 2) / (1 + weight)
    half = Z * math.sqrt(share * (1 - share) / count + weight / (4 * count)) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)


def add_vote(run: Path, against: str, preferred: bool | None, drawn: dict[str, Any]) -> list[Tally]:
    """Note a vote in the folder of a run; returns the tallies.

    Args:
        preferred: whether the run's picture was; None for neither.
        drawn: prompt, seed and settings of the two pictures, and `TRAINED`.

    Raises:
        UserError: if the earlier votes cannot be read; they are left as they are.
    """
    with FileLock(run / f".{VOTES}.lock"):
        votes = _read(run)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        votes.append({"against": against, "preferred": preferred, "time": now, **drawn})
        tallies = _tallies(votes)
        figures = [asdict(t) | {"share": t.share, "interval": list(t.interval)} for t in tallies]
        write_json(run / VOTES, {"figures": figures, "votes": votes})
    return tallies


def tallies(run: Path) -> list[Tally]:
    """The votes of a run by the side that it was compared with and by the steps of its weights.

    Raises:
        UserError: if they cannot be read.
    """
    return _tallies(_read(run))


def _read(run: Path) -> list[dict[str, Any]]:
    path = run / VOTES
    if not path.exists():
        return []
    try:
        votes = from_json(read_text(path))["votes"]
        for vote in votes:
            known = isinstance(vote["against"], str) and isinstance(_trained(vote), int | None)
            if not known or vote["preferred"] not in (True, False, None):
                raise ValueError
        return votes
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} cannot be read; move it away to begin anew.") from None


def _tallies(votes: list[dict[str, Any]]) -> list[Tally]:
    said: dict[tuple[str, int | None], list[bool | None]] = {}
    for vote in votes:
        said.setdefault((vote["against"], _trained(vote)), []).append(vote["preferred"])
    return [Tally(side, v.count(True), v.count(False), v.count(None), steps) for (side, steps), v in said.items()]


def _trained(vote: dict[str, Any]) -> Any:
    """The steps of the weights that were voted on; an earlier version noted those of kept weights alone."""
    return vote.get(TRAINED, vote.get("kept_step"))
