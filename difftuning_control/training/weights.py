"""The weights that train: attached to the model, with their optimizer and average; written as they would be used."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor

from difftuning_control.adapters.tuning import AdapterTuning, ControlNetTuning, FullTuning
from difftuning_control.evaluation.band_losses import LossChanges, plain_losses
from difftuning_control.objective.batch import LatentBatch
from difftuning_control.objective.budget import ForgettingBudget
from difftuning_control.objective.difftuning import NoisedBatch
from difftuning_control.objective.rows import moved
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.system.durable import discard, place, write_json
from difftuning_control.system.tensors import named_errors
from difftuning_control.training.averaging import running_average
from difftuning_control.training.begin import Beginning
from difftuning_control.training.checkpoint import TrainingState
from difftuning_control.training.compiling import compile_blocks, eagerly
from difftuning_control.training.phases import Phases
from difftuning_control.training.teacher import Teacher

if TYPE_CHECKING:
    from difftuning_control.data.control_spec import ControlSpec
    from difftuning_control.evaluation.fidelity import FidelityCurve
    from difftuning_control.families.family import Family
    from difftuning_control.runs.start import Start


def attach_tuning(
    recipe: Recipe, family: Family, spec: ControlSpec | None
) -> AdapterTuning | FullTuning | ControlNetTuning:
    """What trains, by the recipe's method, attached to the family's model.

    Args:
        spec: of a ControlNet's conditions.
    """
    adapter, seed = recipe.adapter, recipe.training.seed
    if recipe.method == "lora":
        return AdapterTuning(family, adapter, seed)
    if recipe.method == "full":
        return FullTuning(family)
    assert spec is not None
    return ControlNetTuning(family, spec, adapter if adapter.on == "controlnet" else None, seed)


def _optimizer(name: str) -> Any:
    """The class; that bitsandbytes is there was asked before."""
    if name == "adamw":
        return torch.optim.AdamW
    from bitsandbytes.optim import AdamW8bit  # an extra, which not everybody has

    return AdamW8bit


def _set_forward(module: Any, forward: Any | None) -> None:
    """Give a module a forward of its own, or its class's where that is None."""
    vars(module).pop("forward", None)
    if forward is not None:
        module.forward = forward


class TrainedWeights:
    """The weights that train, from the moment that they are attached.

    `model` is what predicts; `denoiser` is the same as processes train it together. `parameters` are what the optimizer
    moves, by name, and where it heeds `hold` it `masks` its steps. `teacher` predicts as the model did before, where
    retention asks for that. Where the weights are `sharded`, each process has a part of every one.
    """

    def __init__(
        self,
        recipe: Recipe,
        family: Family,
        spec: ControlSpec | None,
        accelerator: Accelerator,
        start: Start | None = None,
    ):
        self.family, self.accelerator, self.config = family, accelerator, recipe.training
        self.output, self.model, self.sharded = Path(recipe.output), family.model, False
        self.teacher = Teacher.of(recipe, family) if recipe.tuning.retention == "teacher" else None
        adapter = recipe.adapter if recipe.method == "lora" else None
        begin = Beginning(start, family, adapter) if start is not None else None
        self.tuning = attach_tuning(recipe, family, spec)
        if begin is not None:
            begin.fill(self.tuning)
        family.freeze_unused()
        if self.config.gradient_checkpointing:
            family.checkpoint_activations()
        if self.config.compile is not None:
            compile_blocks(self.model, self.config.compile)
        if self.config.shard and accelerator.num_processes > 1:
            from difftuning_control.training.sharding import shard  # saves torch's FSDP for one process

            shard(self.model, accelerator)
            self.sharded = True
        self.parameters = self.tuning.parameters()
        self.masks = self.config.optimizer == "adamw" and accelerator.device.type == "cuda" and not self.sharded
        fused = {"fused": True} if self.masks else {}
        self._plain_optimizer = _optimizer(self.config.optimizer)(self.tuning.groups(self.config), **fused)
        self.lr_scheduler = get_scheduler(
            self.config.lr_scheduler,
            self._plain_optimizer,
            num_warmup_steps=self.config.lr_warmup_steps,
            num_training_steps=self.config.max_steps,
        )
        self._own_forward = vars(family.denoiser).get("forward")  # which accelerate replaces for mixed precision
        self.denoiser = self.model if self.sharded else accelerator.prepare(self.model)
        self.optimizer = accelerator.prepare(self._plain_optimizer)
        self.ema = None
        if self.config.ema_decay is not None:
            self.ema = running_average(self.parameters.values(), self.config.ema_decay, self.config.ema_warmup)

    def state(
        self, budget: ForgettingBudget | None, curve: FidelityCurve | None, phases: Phases | None = None
    ) -> TrainingState:
        """What a checkpoint saves and restores, with what changes beside the weights."""
        return TrainingState(
            self.tuning.state(),
            self._plain_optimizer,
            self.lr_scheduler,
            self.ema,
            self.accelerator.scaler,
            budget,
            curve,
            self.sharded,
            phases=phases,
        )

    # --- a step -----------------------------------------------------------------------------------------------------

    def retarget(self, is_retention: Tensor, batch: LatentBatch) -> Callable[[NoisedBatch], NoisedBatch] | None:
        """What gives retention rows the teacher's prediction as their target, where there is a teacher.

        Args:
            is_retention: of the rows, on the CPU.
            batch: the rows on the device.
        """
        if self.teacher is None or not is_retention.any():
            return None
        rows = moved(is_retention.nonzero().flatten(), batch.latents)
        return partial(self.teacher.retarget, batch=batch, rows=rows)

    def clip_gradients(self) -> Tensor:
        """Scale the gradients down to the norm that they may have; gives the norm before."""
        parameters, most = self.parameters.values(), self.config.max_grad_norm or math.inf
        if not self.sharded:
            return self.accelerator.clip_grad_norm_(parameters, most)
        from difftuning_control.training.sharding import clip_grad_norm  # saves torch's FSDP for one process

        return clip_grad_norm(parameters, most)

    def hold(self, stop: Tensor | None) -> None:
        """Keep the optimizer from moving anything where `stop` is 1, which it reads on the device; fp16's scaler has a
        mark of its own."""
        if self.masks and self.accelerator.scaler is None:
            self._plain_optimizer.found_inf = stop

    def end_step(self) -> None:
        """Move the learning rate and the average on by an optimizer step."""
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step(self.parameters.values())

    # --- their use --------------------------------------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The weights as they are used: averaged, and nothing compiled for what only looks at them."""
        with eagerly() if self.config.compile is not None else nullcontext():
            if self.ema is None:
                yield
                return
            self.ema.store(self.parameters.values())
            self.ema.copy_to(self.parameters.values())
            try:
                yield
            finally:
                self.ema.restore(self.parameters.values())

    @contextmanager
    def pretrained(self) -> Iterator[None]:
        """While open, the denoiser is what it was before anything was attached to it, also in its precision. Not for
        weights that all train."""
        denoiser, prepared = self.family.denoiser, vars(self.family.denoiser).get("forward")
        with Teacher(self.family).pretrained():
            _set_forward(denoiser, self._own_forward)
            try:
                yield
            finally:
                _set_forward(denoiser, prepared)

    def _whole(self) -> AbstractContextManager[None]:
        """Where they are sharded, the main process has them whole for the while."""
        if not self.sharded:
            return nullcontext()
        from difftuning_control.training.sharding import gathered  # saves torch's FSDP for one process

        return gathered(self.family, self.accelerator.is_main_process)

    # --- writing ----------------------------------------------------------------------------------------------------

    def _write(self) -> Path:
        """The weights as they would be used, in a temporary folder of the output that the main process writes."""
        partial, main = self.output / ".result.partial", self.accelerator.is_main_process
        with self.averaged(), self._whole():
            if main:
                shutil.rmtree(partial, ignore_errors=True)
                try:
                    with named_errors(self.output / self.tuning.result):
                        self.tuning.save(partial)
                except OSError:  # what fits on no disk takes no room on it
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
        return partial

    def keep(self, step: int, losses: LossChanges) -> None:
        """The weights after `step` steps, loadable like the result, with their losses by noise band."""
        partial, folder = self._write(), self.output / f"step-{step:06d}"
        if not self.accelerator.is_main_process:
            return
        write_json(partial / "losses.json", plain_losses(losses))
        if folder.exists():  # of a run that broke off since
            discard(folder)
        place(partial, folder)

    def save(self) -> None:
        """The result in diffusers' own format, renamed into place once it is whole."""
        partial, result = self._write(), self.output / self.tuning.result
        if not self.accelerator.is_main_process:
            return
        if result.suffix == ".safetensors":
            for file in partial.iterdir():  # beside an adapter perhaps what trains whole
                place(file, self.output / file.name)
            partial.rmdir()
        else:
            if result.exists():  # of a run that broke off after saving
                discard(result)
            place(partial, result)
