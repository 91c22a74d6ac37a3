"""The judge of a pilot, which draws a model's pictures and judges them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from difftuning_control.data.conditions import conditions_of
from difftuning_control.data.control_spec import Conditioner
from difftuning_control.data.examples import Example, ImageData
from difftuning_control.data.study_inputs import Materials
from difftuning_control.evaluation.features import Features
from difftuning_control.evaluation.fidelity import FidelityProbe
from difftuning_control.evaluation.figures import Reference, Sampling, figures, reference_of
from difftuning_control.evaluation.outside import Outside
from difftuning_control.pipelines.domain_guidance import domain_guided
from difftuning_control.recipe.studies import PilotConfig

if TYPE_CHECKING:
    from difftuning_control.families.family import Family


APART = 2**20  # between the seeds of noise for the same prompts


@dataclass(frozen=True)
class Guidance:
    """How a tuned model is drawn.

    Args:
        scale: of guidance.
        base: the pretrained model.
        strength: of what was tuned in the unconditional branch: 1 for ordinary guidance, 0 for Domain Guidance.
    """

    scale: float
    base: Family
    strength: float


@dataclass(frozen=True)
class Judge:
    """Draws a model's pictures and judges them; `search` and `final` share no prompt where there are enough, and no
    noise where they do.

    The probes judge how the conditions of each are followed; None where no ControlNet is compared. `outside` judges
    what is drawn for prompts outside the new domain; None where none are named, and until the base has drawn them.
    """

    reference: Reference
    search: Sampling
    final: Sampling
    probes: dict[bool, FidelityProbe] | None = None
    outside: Outside | None = None

    def figures(
        self, family: Family, seed: int, final: bool, guidance: Guidance | None = None
    ) -> tuple[dict[str, Any], list[Image.Image]]:
        """Figures and pictures of a model; `guidance` is ordinary and at the pilot's scale when None."""
        sampling = self.final if final else self.search
        if not final and not set(self.search.prompts).isdisjoint(self.final.prompts):
            seed += APART
        pictures = drawn(family, sampling, seed, guidance)
        followed = self.probes[final].judge_pictures(pictures) if self.probes is not None else {}
        return figures(pictures, sampling.prompts, self.reference) | followed, pictures


def drawn(family: Family, sampling: Sampling, seed: int, guidance: Guidance | None = None) -> list[Image.Image]:
    """Pictures of a model; `guidance` as for `Judge.figures`."""
    sampling = replace(sampling, seeds=[seed])
    if guidance is None:
        return sampling.draw(family)
    ordinary = guidance.strength == 1
    with nullcontext() if ordinary else domain_guided(guidance.base, family, guidance.strength):
        return replace(sampling, guidance_scale=guidance.scale).draw(family)


def judge_of(
    config: PilotConfig, family: Family, features: Features, conditioner: Conditioner | None, inputs: Materials
) -> Judge:
    """The judge of a pilot: of the held-out pictures every other one is for the search, the rest for the figures."""
    reference = reference_of(family, features, inputs)
    halves = halves_of(config, inputs.held_out)
    probes = None
    if conditioner is not None:
        probes = {final: _probe(conditioner, inputs, halves[final]) for final in (False, True)}
    search, final = (
        Sampling(
            [e.caption for e in halves[i]],
            [0],
            *config.drawn,
            inputs.resolution,
            config.batch_size,
            probes[bool(i)].control if probes is not None else None,
        )
        for i in (0, 1)
    )
    return Judge(reference, search, final, probes)


def halves_of(config: PilotConfig, held_out: ImageData) -> tuple[list[Example], list[Example]]:
    """The held-out pictures whose captions the search is drawn for, and those of the figures, repeated to as many as
    are drawn.

    A caption is in one half alone, and as often as pictures have it, unless a half would have fewer than a third then.
    """
    examples = held_out.sample(2 * config.pictures).examples
    by_caption: dict[str, list[Example]] = {}
    for example in examples:
        by_caption.setdefault(example.caption, []).append(example)
    groups = list(by_caption.values())
    halves = [[e for group in part for e in group] for part in (groups[::2], groups[1::2])]
    if 3 * min(map(len, halves)) < len(examples):
        halves = [examples[::2], examples[1::2] or examples]
    search, final = ([half[i % len(half)] for i in range(config.pictures)] for half in halves)
    return search, final


def _probe(conditioner: Conditioner, inputs: Materials, examples: list[Example]) -> FidelityProbe:
    """What shows and judges the conditions of held-out pictures."""
    data = ImageData(inputs.held_out.source, examples)
    control = conditions_of(conditioner, data, inputs.resolution, lambda count: None)
    return FidelityProbe.build(conditioner, data, control, {})


SHOWN = 8  # pictures of a run that are kept


def save_pictures(pictures: list[Image.Image], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i}.png")
