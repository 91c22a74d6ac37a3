"""The inputs of a ControlNet: conditions of the pictures, of the bank, and of held-out pictures to follow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from difftuning_control.data.conditions import Conditions, bank_conditions, cached_conditions, encoded_conditions
from difftuning_control.data.control_spec import SUPPLIED, Conditioner, ControlSpec
from difftuning_control.data.examples import ImageData
from difftuning_control.data.framing import Framing
from difftuning_control.data.latents import Advance
from difftuning_control.errors import UserError
from difftuning_control.evaluation.fidelity import FidelityProbe
from difftuning_control.system.processes import Share
from difftuning_control.system.terminal import progress

if TYPE_CHECKING:
    from accelerate import Accelerator

    from difftuning_control.data.bank import KnowledgeBank
    from difftuning_control.data.buckets import Bucket
    from difftuning_control.families.family import Family
    from difftuning_control.recipe.recipe import Recipe

SHOWN = 6


def build_spec(recipe: Recipe, family: Family, resolution: int) -> ControlSpec:
    """How the conditions of a recipe are made, for the family's ControlNet if it has one."""
    control = recipe.control
    order: Any = family.channel_order
    return ControlSpec(
        control.annotator,
        dict(control.params),
        control.weights,
        resolution,
        family.condition_range,
        order,
        control.resize,
    )


@dataclass(frozen=True)
class ControlInputs:
    """Conditions of everything that a run reads.

    Args:
        conditioner: makes conditions; its spec is saved with the weights.
        targets: of the pictures to tune on, in all their views; of each bucket of them.
        nothing: a condition that shows nothing, of the bank's shape.
        held_out: of the pictures that validation uses.
        bank: of the bank's items; they have blank conditions when None.
        probe: measures fidelity on held-out pictures; None where there are none, or it is not wanted.
        blank: names of the pictures on which the annotator found nothing.
        shown: conditions of the sample grids, (n, 3, H, W) uint8: held-out ones, or those of training if none are.
    """

    conditioner: Conditioner
    targets: list[Conditions]
    nothing: Tensor
    held_out: Conditions | None
    bank: Conditions | None
    probe: FidelityProbe | None
    blank: list[str]
    shown: Tensor

    def rows_of_held_out(self) -> dict[str, Tensor]:
        """The control of validation's target rows."""
        assert self.held_out is not None
        return {"control": self.held_out.rows(range(len(self.held_out)))}

    def rows_of_bank(self, last: int) -> dict[str, Tensor]:
        """The control of the bank's last so many items."""
        if self.bank is None:
            return {"control": torch.stack([self.nothing] * last)}
        return {"control": self.bank.rows(range(len(self.bank) - last, len(self.bank)))}


def check_control(recipe: Recipe, conditioner: Conditioner, held_out: ImageData) -> None:
    """What would stop the annotation, said before anything that takes long.

    Raises:
        UserError: if the annotator cannot be loaded, or fidelity is wanted and nothing is held out.
    """
    if recipe.control.fidelity.every > 0 and not len(held_out):
        raise UserError(
            "fidelity is measured on held-out pictures, and there are none; raise data.holdout, name a "
            "data.validation_path, or set --control.fidelity.every 0."
        )
    if conditioner.spec.annotator != SUPPLIED:
        conditioner.load()


def prepare_control(
    recipe: Recipe,
    family: Family,
    conditioner: Conditioner,
    buckets: list[Bucket],
    held_out: ImageData,
    all_held_out: ImageData,
    bank: KnowledgeBank | None,
    cache: Path,
    accelerator: Accelerator,
) -> ControlInputs:
    """Annotate whatever is not annotated yet.

    Raises:
        UserError: if the annotator finds nothing on any picture.
    """
    control, share = recipe.control, Share.of(accelerator)
    still, workers = buckets[0].framing.middle, control.workers or conditioner.default_workers
    pictures, own = sum(len(b.data) for b in buckets), bank is not None and control.bank_condition == "own"
    probed = all_held_out.sample(control.fidelity.size if control.fidelity.every > 0 else 0)

    def annotated(data: ImageData, framing: Framing, advance: Advance) -> Conditions:
        return cached_conditions(conditioner, data, framing, cache, advance, workers, share)

    total = pictures + len(held_out) + len(probed) + (len(bank) if bank is not None and own else 0)
    with progress(total, "annotating", accelerator.is_main_process) as advance:
        targets = [annotated(b.data, b.framing, advance) for b in buckets]
        blank = [b.data.examples[i].name for b, made in zip(buckets, targets) for i in made.blank]
        if len(blank) == pictures:
            raise UserError(_nothing_found(conditioner.spec.annotator, pictures))
        held = annotated(held_out, still, advance) if len(held_out) else None
        of_bank = None
        if bank is not None and own:
            of_bank = bank_conditions(conditioner, family, bank, cache, advance, workers, share)
        probe = None
        if len(probed):
            asked = annotated(probed, still, advance)
            probe = FidelityProbe.build(
                conditioner, probed, asked.rows(range(len(probed))), _sampling(recipe, still.resolution)
            )
    few = held
    if few is None:  # of training, in squares
        first = ImageData(buckets[0].data.source, buckets[0].data.examples[:SHOWN])
        few = annotated(first, still, lambda count: None)
    shown = few.rows(range(min(SHOWN, len(few))))
    targets = [encoded_conditions(family, made, cache, share) for made in targets]
    held, of_bank = (encoded_conditions(family, p, cache, share) if p is not None else None for p in (held, of_bank))
    square = next((made for b, made in zip(buckets, targets) if b.framing.shape is None), held)
    nothing = square.blank_row if square is not None else _blank_condition(family, still)
    return ControlInputs(conditioner, targets, nothing, held, of_bank, probe, blank, shown)


def _sampling(recipe: Recipe, resolution: int) -> dict[str, Any]:
    """How the pictures are drawn whose fidelity is followed."""
    watched = recipe.control.fidelity
    return {
        "seed": recipe.training.seed,
        "steps": watched.steps,
        "guidance_scale": watched.guidance_scale,
        "resolution": resolution,
    }


def _blank_condition(family: Family, framing: Framing) -> Tensor:
    """A condition that shows nothing, as the family's ControlNet reads it."""
    black = torch.zeros(3, framing.height, framing.width, dtype=torch.uint8)
    return family.encode_control(black[None]).float().cpu()[0] if family.encodes_control else black


def _nothing_found(annotator: str, count: int) -> str:
    if annotator == SUPPLIED:
        return f"each of the {count} supplied conditions is of one colour; give pictures that show something."
    return (
        f"the annotator {annotator} found nothing on any of the {count} pictures; look at its params, or choose "
        "another."
    )
