"""Training batches as a function of the step: what row r of step s holds depends on the seed, s and r alone.

So a resumed run sees what an undisturbed one would have seen, without any saved state of a loader, and the rows of an
optimizer step are the same on one process or on many, in one forward or in several.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from difftuning_control.data.bank import KnowledgeBank, retained_prompt
from difftuning_control.data.latents import LatentMoments
from difftuning_control.families.prompts import PromptEmbeddings
from difftuning_control.objective.batch import LatentBatch
from difftuning_control.objective.difftuning import DiffTuningObjective
from difftuning_control.system.seeds import shuffled, step_seed

if TYPE_CHECKING:
    from difftuning_control.data.conditions import Conditions
    from difftuning_control.families.family import Family

TARGET, BANK = 0, 1


@dataclass(frozen=True)
class TargetSet:
    """The pictures to tune on: moments, captions, names, perhaps conditions, the sizes (N, views, 6) of `Framing.sizes`
    where the family takes them, the captions without a trigger where there is one, and the weights of the squared error
    (N, views, 1, h, w) where there are masks; all of the same length."""

    moments: LatentMoments
    captions: list[str]
    names: list[str]
    conditions: Conditions | None = None
    sizes: Tensor | None = None
    untriggered: list[str] | None = None
    loss_weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def retained_captions(self) -> list[str]:
        """What retention rows of the pictures train with, where they have their own prompts."""
        return self.captions if self.untriggered is None else self.untriggered


@dataclass(frozen=True)
class TrainingRows:
    """The rows of one forward on one process: the batch, its noise and noise levels, and the counts of the optimizer
    step's rows by role."""

    batch: LatentBatch
    noise: Tensor
    levels: Tensor
    counts: tuple[int, int]
    apart: TrainingRows | None = None  # bank rows of another shape, which take a forward of their own

    def pinned(self) -> TrainingRows:
        """The same where a GPU copies them from by itself, while nobody waits."""
        batch = self.batch
        told = {name: value.pin_memory() for name, value in batch.conditioning.items()}
        weights = batch.loss_weights.pin_memory() if batch.loss_weights is not None else None
        pinned = LatentBatch(batch.latents.pin_memory(), told, batch.is_retention, batch.ids, weights)
        apart = self.apart.pinned() if self.apart is not None else None
        return replace(self, batch=pinned, noise=self.noise.pin_memory(), apart=apart)

    @property
    def parts(self) -> list[TrainingRows]:
        return [self] if self.apart is None else [self, self.apart]


class Draws(NamedTuple):
    """Of every row of an optimizer step: whether it is from the bank, its noise level, whether its prompt is dropped,
    which view it is, and whether its condition is blank."""

    is_retention: Tensor
    levels: Tensor
    dropped: Tensor
    views: Tensor
    blank: Tensor


@dataclass(frozen=True)
class BatchSource:
    """Builds the batch of every step from cached latents.

    Args:
        retention_prompts: empty, own or both: what retention rows train with, as `retained_prompt` says.
        prompt_dropout: share of target rows that get the empty prompt.
        size: rows of a forward on one process.
        forwards: forwards to an optimizer step.
        items: which of the targets each of this process's target rows is; drawn in a random order when None.
        bank_conditions: one an item, for a ControlNet; bank rows have a blank condition without.
        nothing: that blank condition, of the bank's shape.
        retained: what retention rows are of, the bank or the pictures themselves.
        condition_dropout: share of target rows that get a blank condition.
    """

    family: Family
    objective: DiffTuningObjective
    targets: TargetSet
    embeddings: PromptEmbeddings
    bank: KnowledgeBank | None
    retention_prompts: str
    prompt_dropout: float
    size: int
    seed: int
    process_index: int = 0
    num_processes: int = 1
    bank_conditions: Conditions | None = None
    condition_dropout: float = 0.0
    forwards: int = 1
    items: dict[int, int] | None = None
    nothing: Tensor | None = None
    retained: Literal["bank", "pictures"] = "bank"

    def mine(self, forward: int) -> range:
        """Which rows of the optimizer step this process has in one of its forwards."""
        parts = self.num_processes * self.forwards
        return range(self.process_index + self.num_processes * forward, self.size * parts, parts)

    @property
    def counts(self) -> tuple[int, int]:
        """How many target and bank rows an optimizer step has."""
        total = self.size * self.num_processes * self.forwards
        retains = self.bank is not None or self.retained == "pictures"
        banks = self.objective.retention_rows(total) if retains else 0
        return total - banks, banks

    def draws(self, step: int) -> Draws:
        """What is drawn for the rows of an optimizer step, whatever pictures they are."""
        targets, banks = self.counts
        total = targets + banks
        generator = torch.Generator().manual_seed(step_seed(self.seed, step))
        is_retention = torch.arange(total) >= targets
        levels = self.objective.sample_levels(is_retention, generator)
        dropped = torch.rand(total, generator=generator) < self.prompt_dropout
        views = torch.randint(self.targets.moments.views, (total,), generator=generator)
        blank = torch.rand(total, generator=generator) < self.condition_dropout
        return Draws(is_retention, levels, dropped, views, blank)

    def rows(self, step: int, forward: int = 0) -> TrainingRows:
        """The rows of this process in one of the forwards of optimizer step `step`."""
        targets, banks = self.counts
        is_retention, levels, dropped, views, blank = self.draws(step)
        target_rows: list[int] | dict[int, int] | None = self.items
        if target_rows is None:
            target_rows = shuffled(self.seed, TARGET, step * targets, targets, len(self.targets))
        retained = self.targets if self.retained == "pictures" else self.bank
        bank_rows = shuffled(self.seed, BANK, step * banks, banks, len(retained)) if retained is not None else []

        mine = self.mine(forward)
        shape = self.targets.moments.mean.shape[2:]
        other = shape if self.bank is None or self.retained == "pictures" else self.bank.latents.shape[1:]
        noises = [self._noise(step, row, shape if row < targets else other) for row in mine]
        latents, prompts, names, conditions, sizes, weights = [], [], [], [], [], []
        for place, row in enumerate(mine):
            if row < targets or self.retained == "pictures":
                item = target_rows[row] if row < targets else bank_rows[row - targets]
                picture = self.targets.moments.draw(torch.tensor(item), views[row], noises[place][0])
                latents.append(self.family.scale_latents(picture))
                caption = self.targets.captions[item]
                if row < targets:
                    prompts.append("" if dropped[row] else caption)
                else:
                    own = self.targets.retained_captions[item]
                    prompts.append(retained_prompt(self.retention_prompts, own, step + row))
                names.append(self.targets.names[item])
                conditions.append(self._condition(item, int(views[row]), bool(blank[row])))
                sizes.append(self.targets.sizes[item, views[row]] if self.targets.sizes is not None else None)
                weights.append(self._loss_weights(item, int(views[row]), row >= targets, latents[-1]))
            else:
                assert self.bank is not None
                item = bank_rows[row - targets]
                latents.append(self.bank.latents[item])
                prompts.append(retained_prompt(self.retention_prompts, self.bank.prompts[item], step + row))
                names.append(f"bank item {item}")
                conditions.append(self._bank_condition(item))
                sizes.append(self._bank_sizes(item))
                weights.append(self._loss_weights(item, 0, True, latents[-1]))

        def together(places: list[int], apart: TrainingRows | None = None) -> TrainingRows:
            chosen = torch.tensor([mine[p] for p in places])
            conditioning = self.embeddings.rows([prompts[p] for p in places])
            for name, values in (("control", conditions), ("sizes", sizes)):
                if values[places[0]] is not None:
                    conditioning[name] = torch.stack([v for p in places if (v := values[p]) is not None])
            weighed = [w for p in places if (w := weights[p]) is not None]
            batch = LatentBatch(
                torch.stack([latents[p] for p in places]),
                conditioning,
                is_retention[chosen],
                [names[p] for p in places],
                torch.stack(weighed) if weighed else None,
            )
            noise = torch.stack([noises[p][1] for p in places])
            return TrainingRows(batch, noise, levels[chosen], (targets, banks), apart)

        of_targets = [place for place, row in enumerate(mine) if row < targets]
        of_bank = [place for place, row in enumerate(mine) if row >= targets]
        if shape == other or not of_targets or not of_bank:
            return together(of_targets + of_bank)
        return together(of_targets, together(of_bank))

    def _condition(self, item: int, view: int, blank: bool) -> Tensor | None:
        """Of a target row, black where it is blank; None where no ControlNet trains."""
        conditions = self.targets.conditions
        if conditions is None:
            return None
        return conditions.blank_row if blank else conditions.row(item, view)

    def _loss_weights(self, item: int, view: int, retains: bool, latents: Tensor) -> Tensor | None:
        """Of a row, which is retained whole; None where no picture has a mask."""
        weights = self.targets.loss_weights
        if weights is None:
            return None
        return torch.ones_like(latents[:1]) if retains else weights[item, view]

    def _bank_condition(self, item: int) -> Tensor | None:
        if self.targets.conditions is None:
            return None
        if self.bank_conditions is not None:
            return self.bank_conditions.row(item, 0)
        return self.nothing if self.nothing is not None else self.targets.conditions.blank_row

    def _bank_sizes(self, item: int) -> Tensor | None:
        """Those of the picture where the bank is of real ones; a sample is as large as it was drawn, and whole."""
        if self.targets.sizes is None:
            return None
        assert self.bank is not None
        if self.bank.sizes is not None:
            return self.bank.sizes[item]
        factor = self.targets.sizes[0, 0, 4] // self.targets.moments.mean.shape[3]
        frame = factor * torch.tensor(self.bank.latents.shape[2:])
        return torch.cat([frame, torch.zeros_like(frame), frame])

    def _noise(self, step: int, row: int, shape: torch.Size) -> Tensor:
        """Two standard normal tensors: for the draw from the moments and for the forward process."""
        return torch.randn(2, *shape, generator=torch.Generator().manual_seed(step_seed(self.seed, step, row)))
