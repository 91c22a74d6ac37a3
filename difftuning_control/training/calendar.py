"""What is due after each step of a run, and what is still to come: validations, sample grids, fidelity, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from difftuning_control.recipe.recipe import Recipe

SHORTEST = 20  # steps of a run that has a grid before its first regular one


@dataclass(frozen=True)
class Calendar:
    """The cadences of a recipe.

    Args:
        recipe: whose `training` and `control.fidelity` say how often.
        has_curve: whether fidelity is measured.
    """

    recipe: Recipe
    has_curve: bool = False

    @property
    def early(self) -> int | None:
        """The step of a sample grid within the first tenth of the run; None where the first regular one is as early."""
        training = self.recipe.training
        step = training.max_steps // 10
        return step if training.sample_every > step and training.max_steps >= SHORTEST else None

    def validates(self, done: int, end: int) -> bool:
        """Whether the losses are measured after so many steps; at the end they are in any case."""
        every = self.recipe.training.validate_every
        return done == end or (every > 0 and done % every == 0) or done in self.recipe.training.save_at

    def samples(self, done: int, end: int) -> bool:
        every = self.recipe.training.sample_every
        return every > 0 and (done % every == 0 or done in (end, self.early))

    def measures_fidelity(self, done: int, end: int) -> bool:
        return self.has_curve and (done % self.recipe.control.fidelity.every == 0 or done == end)

    def saves(self, done: int, end: int) -> bool:
        return done % self.recipe.training.checkpoint_every == 0 and done != end

    def has_due(self, done: int, end: int) -> bool:
        """Whether anything of these is due after so many steps."""
        asked = (self.measures_fidelity, self.validates, self.samples, self.saves)
        return any(is_due(done, end) for is_due in asked)

    def to_come(self, done: int, end: int) -> dict[str, int]:
        """How many validations, sample grids and measurements of fidelity follow on a step."""
        training, fidelity = self.recipe.training, self.recipe.control.fidelity.every if self.has_curve else 0
        extra = {step for step in (*training.save_at, end) if done < step <= end}
        grids = {end, self.early or end} if training.sample_every else set()
        return {
            "validation": _follow(training.validate_every, extra, done, end),
            "sampling": _follow(training.sample_every, {step for step in grids if done < step <= end}, done, end),
            "fidelity": _follow(fidelity, {end} if fidelity and done < end else set(), done, end),
        }


def _follow(every: int, others: set[int], done: int, end: int) -> int:
    """How many steps after `done` are multiples of `every`, or among others."""
    if not every:
        return len(others)
    return end // every - done // every + sum(step % every != 0 for step in others)
