"""The optimization, read downwards: noise → model → loss → backward, with what is due on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor

from difftuning_control.data.batches import TrainingRows
from difftuning_control.data.prepare import silent
from difftuning_control.evaluation.band_losses import LossChanges
from difftuning_control.evaluation.fidelity import FidelityCurve
from difftuning_control.families.loss import compute_loss
from difftuning_control.objective.budget import ForgettingBudget
from difftuning_control.objective.difftuning import DiffTuningObjective
from difftuning_control.objective.rows import moved, sums_by_role
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.system.seeds import step_seed
from difftuning_control.system.signals import Interrupted, asked
from difftuning_control.system.terminal import activities_are_shown, duration, say
from difftuning_control.training.calendar import Calendar
from difftuning_control.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from difftuning_control.training.inputs import TrainingInputs
from difftuning_control.training.ledger import Ledger
from difftuning_control.training.metrics_log import MetricsLog
from difftuning_control.training.monitor import Baseline, Gauge, Monitor
from difftuning_control.training.phases import Phases, plan_run, planned_line
from difftuning_control.training.progress import StepProgress
from difftuning_control.training.reader import RowReader
from difftuning_control.training.report import RunReport
from difftuning_control.training.run_bank import RunBank
from difftuning_control.training.source import training_source
from difftuning_control.training.weights import TrainedWeights

if TYPE_CHECKING:
    from difftuning_control.families.family import Family
    from difftuning_control.runs.start import Start


READ_EVERY = 8  # steps whose figures a GPU is asked for together


class TrainingLoop:
    """The steps of a run, with checkpoints and measurements where they are due.

    `weights` train, `source` gives their rows, `monitor` measures them and `log` keeps the figures.
    """

    def __init__(
        self,
        recipe: Recipe,
        family: Family,
        objective: DiffTuningObjective,
        inputs: TrainingInputs,
        accelerator: Accelerator,
        identity: str,
        budget: ForgettingBudget | None = None,
        start: Start | None = None,
        earlier: tuple[str, ...] = (),
        phases: Phases | None = None,
    ):
        self.recipe, self.family, self.objective = recipe, family, objective
        self.inputs, self.accelerator, self.identity, self.budget = inputs, accelerator, identity, budget
        self.output, self.config = Path(recipe.output), recipe.training
        self.end, self.earlier = self.config.max_steps, earlier  # identities of the run before it was changed
        self.saved: int | None = None  # the step of the last checkpoint
        self.phases = phases or Phases()
        self.done = 0
        control = inputs.control
        gauge = Gauge(recipe, family, inputs, accelerator, self.phases)
        baseline = Baseline.measure(gauge)  # before anything is attached to the pretrained weights
        spec = control.conditioner.spec if control is not None else None
        self.weights = TrainedWeights(recipe, family, spec, accelerator, start)
        self.parameters, self.denoiser = self.weights.parameters, self.weights.denoiser
        self.optimizer = self.weights.optimizer
        probe = control.probe if control is not None else None
        self.curve = FidelityCurve(probe.kind) if probe is not None else None
        self.state = self.weights.state(budget, self.curve, self.phases)
        self.log = MetricsLog(recipe, accelerator, self.state)
        gauge = replace(gauge, together=self.weights.sharded)
        self.monitor = Monitor(gauge, baseline, self.weights, self.log, self.curve)
        self.calendar = Calendar(recipe, self.curve is not None)
        self.report = RunReport(recipe, family, inputs, self.monitor, accelerator)
        self.source = training_source(recipe, family, objective, inputs, accelerator)
        ahead, pinned = inputs.stream is None, accelerator.device.type == "cuda"  # a stream reads ahead by itself
        self.reader = RowReader(self.source, self.config.gradient_accumulation_steps, ahead, pinned)
        retention = "bank_loss" if self.weights.teacher is None else "teacher_loss"
        masks = self.weights.masks
        self.ledger = Ledger(retention, masks, READ_EVERY if masks and budget is None else 1)
        self.bank = RunBank(inputs.bank, self.weights, self.phases)

    def run(
        self, tell: Callable[[str], object] = silent, settle: Callable[[], object] = lambda: None
    ) -> tuple[LossChanges, float | None]:
        """Train to the end; returns the losses by role, before and after, and the optimizer steps a second.

        Args:
            tell: is given a line on what is still to come.
            settle: called once a bank is whole that grows while training begins, to give `identity` its value.
        """
        measured = self.phases.costs()
        first = self._resume()
        if self.bank.is_growing and self.inputs.stream is None:
            self.source.rows(first)  # draws what the first step needs, of which what is to come can be told
        self.log.begin()
        if self.curve is not None and first == 0:
            self.monitor.measure_fidelity(0)
        self.denoiser.train()
        self.end = self.monitor.planned_end(first)
        rows = self.config.batch_size * self.config.gradient_accumulation_steps
        to_come = self.calendar.to_come(first, self.end)
        plan_run(self.phases, measured, to_come, (self.end - first) * rows)
        self.bank.plan()
        if (line := planned_line(self.phases)) is not None:
            tell(line)
        seconds, step, losses = 0.0, first, dict[str, float]()
        began = time.monotonic()
        main = self.accelerator.is_main_process
        self.report.write(first, self.end)
        with (
            ExitStack() as safe,
            self.phases("training"),
            StepProgress(self.calendar, self.monitor.seconds, first, self.config.max_steps, main) as shown,
        ):
            self.bank.guard(safe, settle, must=first == self.end)
            while step < self.end:
                begun = time.time() - self.bank.seconds
                self.advance(step, more=step + 1 < self.end)
                self.done = step = step + 1
                due = self.calendar.has_due(step, self.end)
                if due or self.ledger.is_due or self._is_asked():
                    losses = self._read()  # what is due must not see a loss that is not finite
                taken = time.time() - self.bank.seconds - begun
                seconds += taken
                shown.beside = self.bank.remaining()
                shown.advance(taken, losses, self.end)
                self.bank.guard(safe, settle, must=step == self.end or self.calendar.saves(step, self.end))
                if due:
                    self._watch(step)
                    self.report.write(step, self.end, shown.remaining(self.end))
                self._stop_if_asked(step)
            tuned = self.monitor.validate(step)
            with self.phases("saving"):
                self.weights.save()  # after the last step a signal lets the run end: that is as fast as a checkpoint
        done = step - first
        if main and done and activities_are_shown():
            say(f"training … {done} steps in {duration(time.monotonic() - began)}")
        self.report.write(step, self.end, tuned=tuned)
        return self.monitor.baseline.beside(tuned), done / seconds if done else None

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step, and its figures."""
        self.advance(step, more=False)
        return dict(self.ledger.read())[step]

    def advance(self, step: int, more: bool = True) -> None:
        """One optimizer step over `gradient_accumulation_steps` forwards; the ledger keeps its figures.

        Args:
            more: whether another step follows, whose rows are read meanwhile.
        """
        seen: list[Tensor] = []
        forwards = self.config.gradient_accumulation_steps
        for forward in range(forwards):
            number = step * forwards + forward
            with self.accelerator.accumulate(self.denoiser):
                ahead = (more or forward + 1 < forwards) and not self.bank.is_growing  # no thread may draw for it
                rows = self.reader.rows(step, forward, ahead)
                torch.manual_seed(step_seed(self.config.seed, 1, number, self.accelerator.process_index))  # dropout
                seen.append(self._backward(rows, step))
                if self.accelerator.sync_gradients:
                    norm = self.weights.clip_gradients()
                    if self.state.scaler is None:  # fp16's scaler meets infinite gradients by itself and skips the step
                        self.ledger.note_gradient(norm)
                self.ledger.check()
                self.weights.hold(self.ledger.stop)
                self.optimizer.step()
                self.optimizer.zero_grad()
        if self.budget is not None:
            self._follow_budget(torch.cat(seen))
        self.weights.end_step()
        watched = {"learning_rate": float(self.weights.lr_scheduler.get_last_lr()[0])}
        if self.budget is not None:
            watched |= {f"multiplier/{b}": float(m) for b, m in enumerate(self.budget.multipliers)}
        self.ledger.watch(step, watched)

    def _backward(self, rows: TrainingRows, step: int) -> Tensor:
        """The gradients of one forward, or of two where bank rows have another shape; processes average them once.

        Each part's backward comes before the next part's forward, which may mask layers in another way (T-LoRA).

        Returns:
            ℓ, u and whether it is for retention of each row, (B, 3).
        """
        parts, device = rows.parts, self.accelerator.device
        total, seen = torch.zeros((), device=device), []
        for part in parts:
            with nullcontext() if part is parts[-1] else self.accelerator.no_sync(self.denoiser):
                batch, levels, roles = part.batch.to(device, self.family.dtype), part.levels, part.batch.is_retention
                noise = part.noise.to(device, batch.latents.dtype, non_blocking=self.reader.pinned)
                retarget = self.weights.retarget(part.batch.is_retention, batch)
                with self.accelerator.autocast():
                    losses = compute_loss(self.family, self.denoiser, self.objective, batch, noise, levels, retarget)
                u = self.objective.process.u[levels]
                multipliers = self.budget.weights(u) if self.budget is not None else None
                loss = self.objective.combine(losses, levels, roles, part.counts, multipliers)
                # the loss is a sum over the step's rows; processes average their gradients, and accelerate divides by
                # the number of forwards
                count = self.accelerator.num_processes * self.config.gradient_accumulation_steps
                self.accelerator.backward(loss * count)
            total = total + loss.detach()
            told = moved(torch.stack([u.float(), roles.float()], 1), losses)
            seen.append(torch.cat([losses.detach().float()[:, None], told], 1))
        each = torch.cat(seen)
        finite = torch.isfinite(each[:, 0])
        figures = torch.stack([total, *sums_by_role(each[:, 0], each[:, 2] > 0), (~finite).sum().float()])
        figures = self.accelerator.reduce(figures, "sum")  # once, however many parts a process has
        self.ledger.note(step, figures, rows.counts, [name for part in parts for name in part.batch.ids], finite)
        return each

    def _follow_budget(self, rows: Tensor) -> None:
        """One step of dual ascent on the bank rows of all processes, with the same result on each.

        Args:
            rows: ℓ, u and whether it is a bank row of each of this process's rows, (B, 3).
        """
        assert self.budget is not None
        gathered = self.ledger.bring(self.accelerator.gather(rows))
        assert gathered is not None
        losses, levels, banks = gathered.unbind(1)
        self.budget.update(losses[banks > 0], levels[banks > 0], self.weights.teacher is not None)

    def _is_asked(self) -> bool:
        """Whether this process alone was asked to end; several answer together where they read anyway."""
        return self.accelerator.num_processes == 1 and bool(asked())

    def _stop_if_asked(self, done: int) -> None:
        """Save a checkpoint and end the run if any process was sent SIGTERM or Ctrl-C."""
        if self.ledger.is_behind:  # the figures of some steps are not read yet, nor is it known that they are finite
            return
        number = asked()
        if self.accelerator.num_processes > 1:
            number = int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())
        if not number:
            return
        self._checkpoint(done)
        self.report.write(done, self.end, stopped=True)
        self.accelerator.wait_for_everyone()
        raise Interrupted(number, done)

    # --- what is due ------------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, float]:
        """Log the figures that were not read yet; gives those of the last step."""
        figures: dict[str, float] = {}
        for step, figures in self.ledger.read():
            self.log.write(step + 1, figures)
        return figures

    def _watch(self, done: int) -> None:
        """Do what is due after `done` steps: fidelity, validation, pictures, weights to keep, a checkpoint."""
        due = self.calendar
        if due.measures_fidelity(done, self.end):
            self.monitor.measure_fidelity(done)
            self.end = self.monitor.planned_end(done)
        if done in self.config.save_at:
            losses = self.monitor.baseline.beside(self.monitor.validate(done))
            with self.phases("saving"):
                self.weights.keep(done, losses)
        elif due.validates(done, self.end) and done != self.end:  # after the last step comes a last one
            self.monitor.validate(done)
        if due.samples(done, self.end):
            self.monitor.save_grid(done)
        if due.saves(done, self.end):
            self._checkpoint(done)

    def _checkpoint(self, done: int) -> None:
        """Save what `done` steps made, by all processes together where the weights are spread over them."""
        if done == self.saved:  # the only good one is not written over
            return
        if self.accelerator.is_main_process:
            self.log.sync()
        with self.phases("saving"):
            if self.weights.sharded or self.accelerator.is_main_process:
                save_checkpoint(self.output, done, self.state, self.identity)
        self.saved = done

    def _resume(self) -> int:
        """The step to go on from."""
        complete = checkpoints(self.output) if self.config.resume else []
        step = load_checkpoint(complete[0], self.state, self.identity, self.earlier) if complete else 0
        self.saved = step if complete else None
        return step
