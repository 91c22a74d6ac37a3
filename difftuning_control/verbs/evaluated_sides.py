"""The pictures of an evaluation: drawn by the base and by every run alike, with their figures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from difftuning_control.evaluation.drawing import save_grid
from difftuning_control.evaluation.features import Features
from difftuning_control.evaluation.fidelity import FidelityProbe
from difftuning_control.evaluation.figures import Reference, Sampling, figures, summarise
from difftuning_control.evaluation.metrics import diversity
from difftuning_control.evaluation.outside import Outside, still_drawn
from difftuning_control.pipelines.domain_guidance import domain_guided
from difftuning_control.recipe.studies import LEAST_OUTSIDE, Evaluation
from difftuning_control.runs.finished import tuned_model
from difftuning_control.runs.record import RunRecord
from difftuning_control.system.terminal import progress

if TYPE_CHECKING:
    from difftuning_control.families.family import Family

SHOWN = 8  # pictures of a side in the grid


@dataclass
class SideDrawing:
    """What every side draws, and what it is judged by; keeps what sides are compared by.

    Args:
        within: prompts of the new domain; None where there is nothing to judge its pictures by.
        outside: prompts outside it, of which the features alone are wanted.
        reference: what pictures of the new domain are judged by; None without `within`.
        grid: the first pictures of each side, within the domain where that is drawn.
        drawn: features of each side's pictures outside the domain.
        before: of the base's from noise that no side draws from; None of fewer than LEAST_OUTSIDE prompts.
    """

    within: Sampling | None
    outside: Sampling
    features: Features
    reference: Reference | None
    probe: FidelityProbe | None
    grid: dict[str, list[Image.Image]] = field(default_factory=dict)
    drawn: dict[str, Tensor] = field(default_factory=dict)
    before: Tensor | None = None

    def side(self, name: str, model: Family, scale: float, advance: Callable[[int], object]) -> dict[str, Any]:
        """Figures of a model's pictures by seed, and their summary."""
        other = replace(self.outside, guidance_scale=scale).draw(model, advance)
        self.drawn[name] = self.features(other)
        if self.within is None or self.reference is None:
            self.grid[name] = other[:SHOWN]
            return {"name": name, "runs": [], "summary": {}, "diversity": None}
        pictures = replace(self.within, guidance_scale=scale).draw(model, advance)
        self.grid[name] = pictures[:SHOWN]
        each, runs = len(self.within.prompts), []
        of_pictures = self.features(pictures)
        for i, seed in enumerate(self.within.seeds):
            rows = slice(i * each, (i + 1) * each)
            row = {"seed": seed} | figures(pictures[rows], self.within.prompts, self.reference, of_pictures[rows])
            runs.append(row | (self.probe.judge_pictures(pictures[rows]) if self.probe is not None else {}))
        within = diversity(of_pictures, self.within.repeated_prompts)
        return {"name": name, "runs": runs, "summary": summarise(runs), "diversity": within}

    @property
    def count(self) -> int:
        """How many pictures a side draws."""
        return len(self.outside.prompts) + (len(self.within.repeated_prompts) if self.within is not None else 0)

    def apart(self, name: str) -> dict[str, float]:
        """How far a side's pictures outside the domain are from the base's (`outside`, the mean of 1 − cosine), and the
        share that is recognised by the base's of other noise (`still_drawn`)."""
        found = self.drawn[name]
        figures = {"outside": float((1 - F.cosine_similarity(self.drawn["base"].double(), found.double())).mean())}
        return figures if self.before is None else figures | {"still_drawn": still_drawn(found, self.before)}

    def save_grid(self, path: Path) -> None:
        """A row of pictures a side, by the last word of its place where that is its alone."""
        names = [Path(place).name for place in self.grid]
        labels = [name if name and names.count(name) == 1 else place for name, place in zip(names, self.grid)]
        save_grid(path, dict(zip(labels, self.grid.values())), (self.within or self.outside).prompts[:SHOWN])


def side_drawing(
    request: Evaluation,
    captions: list[str],
    outside: list[str],
    resolution: int,
    features: Features,
    reference: Reference | None,
    probe: FidelityProbe | None,
) -> SideDrawing:
    """What an evaluation asked for.

    Args:
        captions: of the real pictures, which are the prompts of the new domain.
        outside: prompts outside it.
        reference: None where there is nothing to judge pictures of the new domain by, which are then not drawn.
        probe: of ControlNets, whose conditions are drawn.
    """
    control = probe.control if probe is not None else None
    blank = torch.zeros_like(control[:1]).expand(len(outside), -1, -1, -1) if control is not None else None
    far = Sampling(outside, request.seeds[:1], *request.drawn, resolution, request.batch_size, blank)
    within = replace(far, prompts=captions, seeds=request.seeds, control=control) if reference is not None else None
    return SideDrawing(within, far, features, reference, probe)


def judge_sides(
    request: Evaluation, family: Family, records: dict[str, RunRecord], drawing: SideDrawing
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The base, and every run."""
    domain, strength, sides = request.domain_guidance_scale, request.unconditional_strength or 0.0, []
    _, scale = request.drawn
    asked = len(drawing.outside.prompts)
    recognised = asked if asked >= LEAST_OUTSIDE else 0
    total = (len(records) + 1) * drawing.count + recognised
    with progress(total, "sampling") as advance:
        if recognised:
            far = replace(drawing.outside, guidance_scale=scale)
            drawing.before = Outside.of(family, drawing.features, far, advance).before
        base = drawing.side("base", family, scale, advance)
        for run, record in records.items():
            with (
                tuned_model(family, run, record) as tuned,
                domain_guided(family, tuned, strength) if domain is not None else nullcontext(),
            ):
                side = drawing.side(run, tuned, scale if domain is None else domain, advance)
            sides.append(side | {"identity": record.identity} | drawing.apart(run))
    return base, sides
