"""The fidelity probe and its curve: how well pictures follow a ControlNet's conditions while it trains.

Held-out conditions are drawn in few steps with fixed noise, the pictures annotated again, and what is found compared
with what was asked. A supplied condition cannot be made from a picture: there the edges of the drawn picture are
compared with those of the true one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from difftuning_control.data.control_spec import SUPPLIED, Conditioner, ControlSpec
from difftuning_control.data.examples import ImageData
from difftuning_control.data.images import frame
from difftuning_control.evaluation.condition_figures import MAIN, fidelity
from difftuning_control.evaluation.convergence import find_convergence, has_settled
from difftuning_control.evaluation.drawing import sample_pictures
from difftuning_control.evaluation.fidelity_record import FidelityRecord
from difftuning_control.families.control import to_tensor
from difftuning_control.system.digests import digest_of
from difftuning_control.system.tensors import digest_of_tensors

if TYPE_CHECKING:
    from difftuning_control.families.family import Family

PATIENCE = 3


def kind_of(spec: ControlSpec) -> str:
    """What pictures are compared as, a key of `MAIN`."""
    return "edges" if spec.annotator == SUPPLIED else spec.kind


def main_figure(spec: ControlSpec) -> str:
    """The figure that says how well conditions of this spec are followed."""
    return MAIN[kind_of(spec)][0]


@dataclass
class FidelityCurve:
    """The figures of every measurement, and what follows from them.

    Args:
        kind: what is compared, a key of `condition_figures.MAIN`.
        without: the figures of the model without control.
    """

    kind: str
    without: dict[str, float] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)
    settled: int | None = field(default=None, init=False)
    asked: int = field(default=0, init=False)

    @property
    def main(self) -> str:
        return MAIN[self.kind][0]

    @property
    def values(self) -> list[float]:
        """The main figure."""
        return [row[self.main] for row in self.rows]

    def add(self, step: int, row: dict[str, float]) -> None:
        self.steps.append(step)
        self.rows.append(row)

    def stop_at(self, after: int) -> int | None:
        """The step to end at, `after` steps after the curve has risen and settled; None until it has."""
        if self.settled is None:  # what was asked of a shorter curve need not be asked again
            self.settled = has_settled(self.steps, self.values, MAIN[self.kind][1], PATIENCE, self.asked)
            self.asked = len(self.steps)
        return None if self.settled is None else self.settled + after

    def describe(self) -> FidelityRecord:
        """The curve and its change point."""
        return FidelityRecord(
            kind=self.kind,
            main=self.main,
            higher_is_better=MAIN[self.kind][1],
            without=self.without,
            steps=self.steps,
            figures={name: [row[name] for row in self.rows] for name in self.without},
            convergence=find_convergence(self.steps, self.values, MAIN[self.kind][1]),
        )

    def load_description(self, described: FidelityRecord) -> None:
        """Go on from a curve as `describe` gave it."""
        rows = [described.row(i) for i in range(len(described.steps))]
        self.load_state_dict({"without": described.without, "steps": described.steps, "rows": rows})

    def state_dict(self) -> dict[str, Any]:
        return {"without": self.without, "steps": self.steps, "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.without, self.steps, self.rows = state["without"], state["steps"], state["rows"]
        self.settled, self.asked = None, 0


@dataclass(frozen=True)
class FidelityProbe:
    """Draws held-out conditions and judges the pictures.

    Args:
        judge: annotates the pictures.
        kind: what is compared.
        prompts: one a condition.
        control: the conditions, (N, 3, H, W) uint8.
        asked: what the annotated pictures are compared with, (N, 3, H, W) uint8.
        sampling: settings of `sample_pictures`.
    """

    judge: Conditioner
    kind: str
    prompts: list[str]
    control: Tensor
    asked: Tensor
    sampling: dict[str, Any]

    @classmethod
    def build(
        cls, conditioner: Conditioner, data: ImageData, control: Tensor, sampling: dict[str, Any]
    ) -> FidelityProbe:
        """For held-out pictures and their conditions (N, 3, H, W) uint8."""
        side = conditioner.spec.resolution
        judge, asked, kind = conditioner, control, kind_of(conditioner.spec)
        if conditioner.spec.annotator == SUPPLIED:
            judge = Conditioner(ControlSpec("canny", resolution=side))
            asked = _annotated(judge, [frame(e.load(), side, side) for e in data.examples])
        return cls(judge, kind, [e.caption for e in data.examples], control, asked, sampling)

    @property
    def fingerprint(self) -> str:
        """Changes when a condition, what is asked or a prompt does."""
        return digest_of([digest_of_tensors({"control": self.control, "asked": self.asked}), self.prompts])

    def judge_pictures(self, pictures: Sequence[Image.Image]) -> dict[str, float]:
        """The mean of each figure over pictures, one a condition."""
        conditions = _annotated(self.judge, [np.asarray(p) for p in pictures])
        each = fidelity(self.kind, to_tensor(self.asked), to_tensor(conditions))
        return {name: float(values.double().mean()) for name, values in each.items()}

    def measure(self, family: Family, controlled: bool = True) -> dict[str, float]:
        """The figures of pictures drawn now; with `controlled` off the model draws without its ControlNet."""
        control = self.control if controlled else None
        return self.judge_pictures(sample_pictures(family, self.prompts, **self.sampling, control=control))


def _annotated(judge: Conditioner, pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack([judge.condition(p) for p in pictures])).permute(0, 3, 1, 2).contiguous()
