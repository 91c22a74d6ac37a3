"""The report of a run while it trains: `report.html`, written anew whenever something was measured or saved."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from accelerate import Accelerator

from difftuning_control.evaluation.band_losses import BandLosses
from difftuning_control.evaluation.report.page import flatten
from difftuning_control.evaluation.report.training import RunFacts, write_training_report
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.identity import describe_device
from difftuning_control.training.inputs import TrainingInputs
from difftuning_control.training.monitor import Monitor

if TYPE_CHECKING:
    from difftuning_control.families.family import Family


class RunReport:
    """Writes the report of one run into its folder, on the main process."""

    def __init__(
        self, recipe: Recipe, family: Family, inputs: TrainingInputs, monitor: Monitor, accelerator: Accelerator
    ):
        self.recipe, self.monitor, self.accelerator = recipe, monitor, accelerator
        bank = len(inputs.bank) if inputs.bank is not None else 0
        kind = recipe.adapter.kind if recipe.method == "lora" else recipe.method
        self._facts = RunFacts(
            status="running",
            step=0,
            end=recipe.training.max_steps,
            remaining=None,
            error=None,
            base=monitor.baseline.losses,
            phases={},
            model=recipe.model.id,
            family=family.name,
            method=kind,
            pictures=len(inputs.data) if inputs.stream is None else None,
            held_out=len(inputs.held_out),
            bank=bank,
            prompts=inputs.sample_prompts,
            side=inputs.resolution,
            first_row="condition" if inputs.control is not None else None,
            device=describe_device(accelerator.device),
            settings=flatten(recipe.to_dict()),
        )

    def write(
        self,
        step: int,
        end: int,
        remaining: float | None = None,
        tuned: dict[str, BandLosses] | None = None,
        error: str | None = None,
        stopped: bool = False,
    ) -> None:
        """Write the page as it is after `step` steps.

        Args:
            end: the step at which the run will end.
            remaining: seconds until then, where they can be told.
            tuned: the losses of the finished weights; the run is complete then.
            error: what made it fail.
            stopped: whether it was interrupted, and goes on when it is resumed.
        """
        if not self.accelerator.is_main_process:
            return
        status = "complete" if tuned is not None else "stopped" if stopped else "running"
        status = "failed" if error is not None else status
        facts = replace(
            self._facts,
            status=status,
            step=step,
            end=end,
            remaining=remaining,
            error=error,
            phases={name: cost.seconds for name, cost in self.monitor.phases.costs().items()},
        )
        write_training_report(self.monitor.output, facts)
