"""The optimization, read downwards: noise → model → loss → backward, with what is measured and saved on the way."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from difftuning_control.adapters.tuning import AdapterTuning, ControlNetTuning, FullTuning
from difftuning_control.data.batches import BatchSource, TrainingRows
from difftuning_control.data.buckets import BucketSource
from difftuning_control.data.framing import Framing
from difftuning_control.errors import NonFiniteLossError
from difftuning_control.evaluation.drawing import sample_pictures, save_grid
from difftuning_control.evaluation.fidelity import FidelityCurve
from difftuning_control.evaluation.losses import BandLosses
from difftuning_control.families.loss import compute_loss
from difftuning_control.objective.budget import ForgettingBudget
from difftuning_control.objective.difftuning import DiffTuningObjective
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.system.durable import discard, place, sync, write_json, write_text
from difftuning_control.system.secrets import without_secrets
from difftuning_control.system.seeds import step_seed
from difftuning_control.system.signals import Interrupted, asked, deferred
from difftuning_control.system.tensors import named_errors
from difftuning_control.system.terminal import say
from difftuning_control.training.checkpoint import TrainingState, checkpoints, load_checkpoint, save_checkpoint
from difftuning_control.training.compiling import check_compiler, compile_blocks, eagerly
from difftuning_control.training.inputs import TrainingInputs

if TYPE_CHECKING:
    from difftuning_control.data.stream import Stream
    from difftuning_control.data.stream_batches import StreamSource
    from difftuning_control.families.family import Family


def _optimizer(name: str) -> Any:
    """The class; that bitsandbytes is there was asked before."""
    if name == "adamw":
        return torch.optim.AdamW
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit


class TrainingLoop:
    """The optimization itself, with what it measures on the way."""

    def __init__(
        self,
        recipe: Recipe,
        family: Family,
        objective: DiffTuningObjective,
        inputs: TrainingInputs,
        accelerator: Accelerator,
        identity: str,
        budget: ForgettingBudget | None = None,
    ):
        self.recipe, self.family, self.objective = recipe, family, objective
        self.inputs, self.accelerator, self.identity, self.budget = inputs, accelerator, identity, budget
        self.output, self.config = Path(recipe.output), recipe.training
        self.end, self.sharded = self.config.max_steps, False
        self.saved: int | None = None  # the step of the last checkpoint
        # measured on the pretrained weights, before anything is attached to them
        self.model = family.model
        self.base_losses = self._validate(self.model)
        self.base_pictures = self._sample(controlled=False) if self.config.sample_every else []

        self.tuning = self._attach()
        family.freeze_unused()
        if self.config.gradient_checkpointing:
            for module in (family.denoiser, family.controlnet):
                if module is not None:
                    module.enable_gradient_checkpointing()
        if self.config.compile is not None:
            check_compiler(self.config.compile, accelerator.device)
            compile_blocks(self.model, self.config.compile)
        if self.config.shard and accelerator.num_processes > 1:
            from difftuning_control.training.sharding import shard

            shard(self.model, accelerator)
            self.sharded = True
        self.parameters = self.tuning.parameters()
        optimizer = _optimizer(self.config.optimizer)(self.tuning.groups(self.config))
        self.lr_scheduler = get_scheduler(
            self.config.lr_scheduler,
            optimizer,
            num_warmup_steps=self.config.lr_warmup_steps,
            num_training_steps=self.config.max_steps,
        )
        self.denoiser = self.model if self.sharded else accelerator.prepare(self.model)
        self.optimizer = accelerator.prepare(optimizer)
        self.ema = None
        if self.config.ema_decay is not None:
            self.ema = EMAModel(self.parameters.values(), decay=self.config.ema_decay, use_ema_warmup=True)
        self.probe = inputs.control.probe if inputs.control is not None else None
        self.curve = FidelityCurve(self.probe.kind) if self.probe is not None else None
        self.state = TrainingState(
            self.tuning.state(),
            optimizer,
            self.lr_scheduler,
            self.ema,
            accelerator.scaler,
            budget,
            self.curve,
            self.sharded,
        )
        plain = BatchSource(
            family,
            objective,
            inputs.targets,
            inputs.embeddings,
            inputs.bank,
            recipe.tuning.retention_prompts,
            recipe.tuning.prompt_dropout,
            self.config.batch_size,
            self.config.seed,
            accelerator.process_index,
            accelerator.num_processes,
            inputs.control.bank if inputs.control is not None else None,
            recipe.control.dropout,
            self.config.gradient_accumulation_steps,
            nothing=inputs.control.nothing if inputs.control is not None else None,
        )
        self.source: BatchSource | BucketSource | StreamSource = plain
        if inputs.buckets is not None:
            self.source = BucketSource(plain, inputs.buckets)
        if inputs.stream is not None:
            self.source = self._streamed(plain, inputs.stream)

    def _attach(self) -> AdapterTuning | FullTuning | ControlNetTuning:
        """What trains, by the recipe's method."""
        adapter, seed = self.recipe.adapter, self.config.seed
        if self.recipe.method == "lora":
            return AdapterTuning(self.family, adapter, seed)
        if self.recipe.method == "full":
            return FullTuning(self.family)
        assert self.inputs.control is not None
        spec = self.inputs.control.conditioner.spec
        return ControlNetTuning(self.family, spec, adapter if adapter.on == "controlnet" else None, seed)

    def _streamed(self, plain: BatchSource, stream: Stream) -> StreamSource:
        """A source of the pictures of a stream."""
        from difftuning_control.data.prepare import check_caption
        from difftuning_control.data.stream_batches import StreamSource

        data, family = self.recipe.data, self.family
        framing = Framing(self.inputs.resolution, data.flip, data.crops)
        return StreamSource(
            plain, stream, framing, lambda e: None if data.truncate_captions else check_caption(family, e)
        )

    def run(self) -> tuple[dict[str, Any], float | None]:
        """Train to the end; returns the losses by role, before and after, and the optimizer steps a second."""
        first = self._resume()
        if self.config.trackers:
            self.accelerator.init_trackers(
                "difftuning-control", {"recipe": without_secrets(json.dumps(self.recipe.to_dict()))}
            )
        if self.curve is not None and first == 0:
            self._measure_fidelity(0)
        self.denoiser.train()
        self.end = self._planned_end(first)
        seconds, step = 0.0, first
        with (
            deferred(),
            tqdm(
                total=self.config.max_steps,
                initial=first,
                desc="training",
                mininterval=1.0,
                disable=not self.accelerator.is_main_process,
            ) as bar,
        ):
            while step < self.end:
                begun = time.time()
                losses = self._step(step)
                seconds += time.time() - begun
                step += 1
                bar.update(1)
                bar.set_postfix({k: f"{v:.4f}" for k, v in losses.items() if k.endswith("loss")}, refresh=False)
                watched = {"learning_rate": float(self.lr_scheduler.get_last_lr()[0])}
                if self.budget is not None:
                    watched |= {f"multiplier/{b}": float(m) for b, m in enumerate(self.budget.multipliers)}
                self._log(step, losses | watched)
                self._watch(step)
                self._stop_if_asked(step)
            tuned = self._validate_tuned(step)
            self._save()  # after the last step a signal lets the run end: that is as fast as a checkpoint
        losses_by_role = {
            role: {"base": base.to_dict(), "tuned": tuned[role].to_dict()} for role, base in self.base_losses.items()
        }
        done = step - first
        return losses_by_role, done / seconds if done else None

    def _step(self, step: int) -> dict[str, float]:
        """One optimizer step over `gradient_accumulation_steps` forwards."""
        sums: dict[str, float] = {}
        seen: list[Tensor] = []
        forwards = self.config.gradient_accumulation_steps
        for forward in range(forwards):
            number = step * forwards + forward
            torch.manual_seed(step_seed(self.config.seed, 1, number, self.accelerator.process_index))  # dropout
            with self.accelerator.accumulate(self.denoiser):
                rows = self.source.rows(step, forward)
                loss, seen_here = self._backward(rows, step)
                if self.accelerator.sync_gradients:
                    norm = self._clip()
                    if self.state.scaler is None:  # fp16's scaler meets infinite gradients by itself and skips the step
                        self._stop_if_not_finite(norm.reshape(1), step, ["the gradient"])
                self.optimizer.step()
                self.optimizer.zero_grad()
            seen.append(seen_here)
            for name, value in self._by_role(loss, seen_here, rows.counts).items():
                sums[name] = sums.get(name, 0.0) + value
        if self.budget is not None:
            self._follow_budget(torch.cat(seen))
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step(self.parameters.values())
        return sums

    def _backward(self, rows: TrainingRows, step: int) -> tuple[Tensor, Tensor]:
        """The gradients of one forward, or of two where bank rows have another shape; processes average them once.

        Each part's backward comes before the next part's forward, which may mask layers in another way (T-LoRA).

        Returns:
            the objective, and ℓ, u and whether it is of the bank of each row, (B, 3).
        """
        total, seen, parts = torch.zeros(()), [], rows.parts
        for part in parts:
            with nullcontext() if part is parts[-1] else self.accelerator.no_sync(self.denoiser):
                batch = part.batch.to(self.accelerator.device, self.family.dtype)
                levels, noise = part.levels.to(batch.latents.device), part.noise.to(batch.latents)
                with self.accelerator.autocast():
                    losses = compute_loss(self.family, self.denoiser, self.objective, batch, noise, levels)
                u = self.objective.process.u.to(levels.device)[levels]
                multipliers = self.budget.weights(u) if self.budget is not None else None
                loss = self.objective.combine(losses, levels, batch.is_retention, part.counts, multipliers)
                # the loss is a sum over the step's rows; processes average their gradients, and accelerate divides by
                # the number of forwards
                count = self.accelerator.num_processes * self.config.gradient_accumulation_steps
                self.accelerator.backward(loss * count)
            total = total.to(loss.device) + loss.detach()
            seen.append(torch.stack([losses.detach().float(), u.float(), batch.is_retention.float()], 1))
        found = torch.cat(seen)
        # all processes ask once, however many parts each has
        self._stop_if_not_finite(found[:, 0], step, [name for part in parts for name in part.batch.ids])
        return total, found

    def _clip(self) -> Tensor:
        """Scale the gradients down to the norm that they may have; gives the norm before."""
        parameters, most = self.parameters.values(), self.config.max_grad_norm or math.inf
        if not self.sharded:
            return self.accelerator.clip_grad_norm_(parameters, most)
        from difftuning_control.training.sharding import clip_grad_norm

        return clip_grad_norm(parameters, most)

    def _follow_budget(self, rows: Tensor) -> None:
        """One step of dual ascent on the bank rows of all processes, with the same result on each.

        Args:
            rows: ℓ, u and whether it is a bank row of each of this process's rows, (B, 3).
        """
        assert self.budget is not None
        found, places, banks = self.accelerator.gather(rows).unbind(1)
        self.budget.update(found[banks > 0], places[banks > 0])

    def _by_role(self, loss: Tensor, seen: Tensor, counts: tuple[int, int]) -> dict[str, float]:
        """The objective and the unweighted mean ℓ of target and bank rows, over all processes."""
        losses, is_retention = seen[:, 0], seen[:, 2] > 0
        parts = torch.stack([loss, losses[~is_retention].sum(), losses[is_retention].sum()])
        total, target, bank = self.accelerator.reduce(parts, "sum").tolist()
        found = {"loss": total, "target_loss": target / counts[0]}
        return found | {"bank_loss": bank / counts[1]} if counts[1] else found

    def _stop_if_not_finite(self, losses: Tensor, step: int, names: list[str]) -> None:
        finite = torch.isfinite(losses)
        bad = self.accelerator.reduce((~finite).sum(), "sum")
        if int(bad) == 0:
            return
        rows = [name for name, ok in zip(names, finite.tolist()) if not ok]
        which = ", ".join(rows[:8]) or "of another process"
        raise NonFiniteLossError(
            f"the loss is not finite at step {step + 1} (rows: {which}); the weights were not touched. "
            "Lower training.learning_rate, or use --training.mixed_precision bf16 instead of fp16."
        )

    def _stop_if_asked(self, done: int) -> None:
        """Save a checkpoint and end the run if any process was sent SIGTERM or Ctrl-C."""
        number = asked()
        if self.accelerator.num_processes > 1:
            number = int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())
        if not number:
            return
        self._checkpoint(done)
        self.accelerator.wait_for_everyone()
        raise Interrupted(number, done)

    # --- watching ---------------------------------------------------------------------------------------------------

    def _watch(self, done: int) -> None:
        """What is due after `done` steps: validation, pictures, weights to keep, a checkpoint."""
        every = self.recipe.control.fidelity.every
        if self.curve is not None and (done % every == 0 or done == self.end):
            self._measure_fidelity(done)
            self.end = self._planned_end(done)
        last = done == self.end
        if self.config.validate_every and done % self.config.validate_every == 0 and not last:
            self._validate_tuned(done)
        if self.config.sample_every and (done % self.config.sample_every == 0 or last):
            self._sample_grid(done)
        if done in self.config.save_at:
            self._keep(done)
        if done % self.config.checkpoint_every == 0 and not last:
            self._checkpoint(done)

    def _checkpoint(self, done: int) -> None:
        """Save what `done` steps made, by all processes together where the weights are spread over them."""
        if done == self.saved:  # the only good one is not written over
            return
        if self.accelerator.is_main_process:
            sync(self.output / "metrics.jsonl")
        if self.sharded or self.accelerator.is_main_process:
            save_checkpoint(self.output, done, self.state, self.identity)
        self.saved = done

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
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

    def _whole_weights(self) -> AbstractContextManager[None]:
        """Where they are sharded, the main process has them whole for the while."""
        if not self.sharded:
            return nullcontext()
        from difftuning_control.training.sharding import gathered

        return gathered(self.family, self.accelerator.is_main_process)

    def _validate(self, denoiser: torch.nn.Module) -> dict[str, BandLosses]:
        with self.accelerator.autocast():
            return {role: validator.measure(denoiser) for role, validator in self.inputs.validation.items()}

    def _validate_tuned(self, step: int) -> dict[str, BandLosses]:
        with self._averaged_weights():
            found = self._validate(self.model)
        row: dict[str, float] = {}
        for role, bands in found.items():
            row |= {f"validation/{role}_{u:.1f}": value for u, value in zip(bands.centres, bands.losses)}
        self._log(step, row)
        return found

    def _sample(self, controlled: bool = True) -> list[Any]:
        """The pictures of a sample grid; `controlled` off draws them without the ControlNet."""
        if not self.accelerator.is_main_process and not self.sharded:  # of a sharded model no process can draw alone
            return []
        shown = self.inputs.control.shown if self.inputs.control is not None and controlled else None
        with self.accelerator.autocast():
            return sample_pictures(
                self.family,
                self.inputs.sample_prompts,
                seed=self.config.seed,
                steps=self.config.sample_steps,
                guidance_scale=self.config.sample_guidance_scale,
                resolution=self.inputs.resolution,
                control=shown,
            )

    def _sample_grid(self, step: int) -> None:
        with self._averaged_weights():
            tuned = self._sample()
        if not self.accelerator.is_main_process:
            return
        rows = {"base": self.base_pictures, f"step {step}": tuned}
        if self.inputs.control is not None:
            conditions = self.inputs.control.shown.permute(0, 2, 3, 1).numpy()
            rows = {"condition": [Image.fromarray(c) for c in conditions], **rows}
        save_grid(self.output / "samples" / f"step-{step:06d}.png", rows, self.inputs.sample_prompts)

    def _measure_fidelity(self, step: int) -> None:
        """The next point of the curve, the same on every process."""
        assert self.probe is not None
        assert self.curve is not None
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            with self._averaged_weights(), self.accelerator.autocast():
                found[0] = self.probe.measure(self.family)
                found[1] = self.probe.measure(self.family, controlled=False) if not self.curve.without else None
        found = broadcast_object_list(found)
        if found[1] is not None:
            self.curve.without = found[1]
        self.curve.add(step, found[0])
        self._log(step, {f"fidelity/{name}": value for name, value in found[0].items()})
        if self.accelerator.is_main_process:
            write_json(self.output / "fidelity.json", self.curve.describe())

    def _planned_end(self, done: int) -> int:
        """The step at which the run will end, as far as can be said after `done` steps."""
        found = None
        if self.config.stop_when is not None:
            assert self.curve is not None
            found = self.curve.stop_at(self.config.stop_after)
        return self.config.max_steps if found is None else min(self.config.max_steps, max(found, done))

    def _log(self, step: int, values: dict[str, float]) -> None:
        if not values or not self.accelerator.is_main_process:
            return
        with (self.output / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.state.logged += 1
        if self.config.trackers:
            self.accelerator.log(values, step=step)

    # --- resuming and saving ----------------------------------------------------------------------------------------

    def _resume(self) -> int:
        """The step to go on from; metrics logged after its checkpoint are cut off."""
        found = checkpoints(self.output) if self.config.resume else []
        step = load_checkpoint(found[0], self.state, self.identity) if found else 0
        self.saved = step if found else None
        metrics = self.output / "metrics.jsonl"
        if self.accelerator.is_main_process and (metrics.exists() or self.state.logged):
            text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.exists() else ""
            lines = text.splitlines(keepends=True)[: self.state.logged]
            if len(lines) < self.state.logged:
                say(f"note: {metrics} lacks {self.state.logged - len(lines)} of {self.state.logged} lines of before")
            self.state.logged = len(lines)
            write_text(metrics, "".join(lines))
        return step

    def _write_weights(self) -> Path:
        """The weights as they would be used, in a temporary folder of the output that the main process writes."""
        partial, main = self.output / ".result.partial", self.accelerator.is_main_process
        with self._averaged_weights(), self._whole_weights():
            if main:
                shutil.rmtree(partial, ignore_errors=True)
                try:
                    with named_errors(self.output / self.tuning.result):
                        self.tuning.save(partial)
                except OSError:  # what fits on no disk takes no room on it
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
        return partial

    def _keep(self, step: int) -> None:
        """The weights after `step` steps, loadable like the result, with their losses by noise band."""
        losses = self._validate_tuned(step)
        partial, folder = self._write_weights(), self.output / f"step-{step:06d}"
        if not self.accelerator.is_main_process:
            return
        table = {role: {"base": self.base_losses[role].to_dict(), "tuned": t.to_dict()} for role, t in losses.items()}
        write_json(partial / "losses.json", table)
        if folder.exists():  # of a run that broke off since
            discard(folder)
        place(partial, folder)

    def _save(self) -> None:
        """The result in diffusers' own format, renamed into place once it is whole."""
        partial, result = self._write_weights(), self.output / self.tuning.result
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
