"""The training run, read downwards: prepare → encode → noise → model → loss → backward → validate → save."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

from difftuning_control.adapters import LORA_FILE, FullTuning, LoRATuning
from difftuning_control.batches import BatchSource, step_seed
from difftuning_control.checkpoint import TrainingState, checkpoints, load_checkpoint, save_checkpoint
from difftuning_control.errors import NonFiniteLossError, UserError
from difftuning_control.families import load_family
from difftuning_control.fingerprint import digest_of_file, write_json, write_text
from difftuning_control.inputs import TrainingInputs, prepare_inputs
from difftuning_control.noise import NoiseProcess
from difftuning_control.objective import DiffTuningObjective
from difftuning_control.pictures import sample_pictures, save_grid
from difftuning_control.provenance import (
    OutputFolder,
    describe_device,
    model_card,
    read_run,
    recipe_identity,
    versions,
    write_recipe,
)
from difftuning_control.recipe import Recipe
from difftuning_control.validation import BandLosses, compute_loss

if TYPE_CHECKING:
    from difftuning_control.families.sd import StableDiffusion

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def train(recipe: Recipe, overwrite: bool = False) -> dict[str, Any]:
    """Run a recipe and return what `run.json` holds. A finished run that is resumed is returned as it is.

    Raises:
        UserError: for a mistake in recipe, data or output folder; nothing is written then.
        NonFiniteLossError: if the loss becomes NaN or infinite.
    """
    accelerator = make_accelerator(recipe)
    output = Path(recipe.output)
    folder = OutputFolder(output, recipe.training.resume, overwrite) if accelerator.is_main_process else None
    try:
        return _train(recipe, accelerator, output, folder)
    finally:
        accelerator.end_training()
        if folder is not None:
            folder.release()


def _train(recipe: Recipe, accelerator: Accelerator, output: Path, folder: OutputFolder | None) -> dict[str, Any]:
    started = time.time()
    family = load_family(recipe.model.id, base_dtype(recipe), recipe.model.variant).to(accelerator.device)
    fingerprints: dict[str, Any] = {"base": dict(family.fingerprints)}
    objective = build_objective(recipe, family.process)
    inputs = prepare_inputs(recipe, family, objective, accelerator)
    fingerprints |= {"data": inputs.data.fingerprint, "held_out": inputs.held_out.fingerprint}
    fingerprints["bank"] = inputs.bank.fingerprint if inputs.bank is not None else None
    identity = recipe_identity(recipe, fingerprints, accelerator.num_processes)
    if recipe.training.resume and (finished := _finished(output, identity)) is not None:
        return finished
    loop = _Loop(recipe, family, objective, inputs, accelerator, identity)

    run = _describe(recipe, family, inputs, fingerprints, identity, accelerator)
    if folder is not None:
        if not recipe.training.resume:
            folder.clear()
        write_json(output / "run.json", run)
        write_recipe(output, recipe)
    prepared = time.time()
    try:
        run["losses"], run["steps_per_second"] = loop.run()
    except NonFiniteLossError as error:
        if folder is not None:
            write_json(output / "run.json", run | {"status": "failed", "error": str(error)})
        raise
    run["timings"] = {"preparation": prepared - started, "training": time.time() - prepared}
    run["status"] = "complete"
    if folder is not None:
        run["outputs"] = _hash_outputs(output)
        write_text(output / "README.md", model_card(recipe, run))
        write_json(output / "run.json", run)
        for checkpoint in checkpoints(output):  # only now is the result on disk and recorded
            shutil.rmtree(checkpoint)
    accelerator.wait_for_everyone()
    return run


def base_dtype(recipe: Recipe) -> torch.dtype:
    """Full weights train in float32; under LoRA the frozen base can lie in the lower precision."""
    return torch.float32 if recipe.method == "full" else DTYPES[recipe.training.mixed_precision]


def make_accelerator(recipe: Recipe) -> Accelerator:
    """accelerate's engine, with the trackers that the recipe names.

    Raises:
        UserError: if a tracker is not installed or the precision is not to be had on this machine.
    """
    from importlib.util import find_spec

    for tracker in recipe.training.trackers:
        if find_spec(tracker) is None:
            raise UserError(
                f"training.trackers names {tracker}, which is not installed; run "
                f"pip install 'difftuning-control[{tracker}]' or leave it out."
            )
    precision = recipe.training.mixed_precision
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("training.mixed_precision is fp16, which needs a GPU; use bf16 or no on a CPU.")
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=recipe.training.gradient_accumulation_steps,
        log_with=list(recipe.training.trackers) or None,
        project_dir=str(Path(recipe.output) / "logs"),
    )
    set_seed(recipe.training.seed)
    return accelerator


def build_objective(recipe: Recipe, process: NoiseProcess) -> DiffTuningObjective:
    """The recipe's objective on a model's forward process.

    Raises:
        UserError: if the settings do not fit together.
    """
    tuning = recipe.tuning
    try:
        return DiffTuningObjective(
            process,
            tuning.schedule.build(len(process)),
            tuning.estimator,
            tuning.retention_weight,
            tuning.retention_ratio,
            tuning.min_snr_gamma,
            tuning.stratified,
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"tuning: {error}") from None


def _finished(output: Path, identity: str) -> dict[str, Any] | None:
    run = read_run(output)
    if run is None:
        return None
    if run["identity"] != identity:
        raise UserError(
            f"the run in {output} had another recipe, base or data; resume with the same, or start "
            "afresh with --overwrite."
        )
    return run if run["status"] == "complete" else None


def _describe(
    recipe: Recipe,
    family: StableDiffusion,
    inputs: TrainingInputs,
    fingerprints: dict[str, Any],
    identity: str,
    accelerator: Accelerator,
) -> dict[str, Any]:
    bank = inputs.bank
    return {
        "status": "running",
        "identity": identity,
        "recipe": recipe.to_dict(),
        "family": family.name,
        "base_path": str(family.pipe.config._name_or_path),
        "fingerprints": fingerprints,
        "data": {
            "pictures": len(inputs.data),
            "held_out": len(inputs.held_out),
            "skipped": inputs.data.skipped | inputs.held_out.skipped,
            "ignored_files": inputs.data.ignored_files,
            "resolution": inputs.resolution,
        },
        "bank": None if bank is None else {"items": len(bank), "folder": str(bank.folder or bank.manifest["source"])},
        "prompts": inputs.sample_prompts,
        "versions": versions(),
        "device": describe_device(accelerator.device),
        "processes": accelerator.num_processes,
        "seed": recipe.training.seed,
    }


def _hash_outputs(output: Path) -> dict[str, str]:
    files = [output / LORA_FILE, *sorted((output / "pipeline").rglob("*"))]
    return {str(p.relative_to(output)): digest_of_file(p) for p in files if p.is_file()}


class _Loop:
    """The optimization itself, with what it measures on the way."""

    def __init__(
        self,
        recipe: Recipe,
        family: StableDiffusion,
        objective: DiffTuningObjective,
        inputs: TrainingInputs,
        accelerator: Accelerator,
        identity: str,
    ):
        self.recipe, self.family, self.objective = recipe, family, objective
        self.inputs, self.accelerator, self.identity = inputs, accelerator, identity
        self.output, self.config = Path(recipe.output), recipe.training
        # measured on the pretrained weights, before anything is attached to them
        self.base_losses = self._validate(family.denoiser)
        self.base_pictures = self._sample() if self.config.sample_every else []

        adapter = recipe.adapter
        self.tuning: LoRATuning | FullTuning
        if recipe.method == "lora":
            self.tuning = LoRATuning(
                family, adapter.rank, adapter.alpha, adapter.targets, adapter.dropout, self.config.seed
            )  # fmt: skip
        else:
            self.tuning = FullTuning(family)
        if self.config.gradient_checkpointing:
            family.denoiser.enable_gradient_checkpointing()
        self.parameters = self.tuning.parameters()
        optimizer = torch.optim.AdamW(
            self.parameters.values(), self.config.learning_rate, weight_decay=self.config.weight_decay
        )  # fmt: skip
        self.lr_scheduler = get_scheduler(
            self.config.lr_scheduler, optimizer, num_warmup_steps=self.config.lr_warmup_steps,
            num_training_steps=self.config.max_steps,
        )  # fmt: skip
        self.denoiser, self.optimizer = accelerator.prepare(family.denoiser, optimizer)
        self.ema = None
        if self.config.ema_decay is not None:
            self.ema = EMAModel(self.parameters.values(), decay=self.config.ema_decay, use_ema_warmup=True)
        self.state = TrainingState(self.parameters, optimizer, self.lr_scheduler, self.ema, accelerator.scaler)
        self.source = BatchSource(
            family, objective, inputs.targets, inputs.embeddings, inputs.bank, recipe.tuning.retention_prompts,
            recipe.tuning.prompt_dropout, self.config.batch_size, self.config.seed, accelerator.process_index,
            accelerator.num_processes,
        )  # fmt: skip

    def run(self) -> tuple[dict[str, Any], float]:
        """Train to the end; returns the losses by role, before and after, and the optimizer steps a second."""
        first = self._resume()
        if self.config.trackers:
            self.accelerator.init_trackers("difftuning-control", {"recipe": json.dumps(self.recipe.to_dict())})
        self.denoiser.train()
        seconds = 0.0
        with tqdm(
            total=self.config.max_steps, initial=first, desc="training", mininterval=1.0,
            disable=not self.accelerator.is_main_process,
        ) as bar:  # fmt: skip
            for step in range(first, self.config.max_steps):
                begun = time.time()
                losses = self._step(step)
                seconds += time.time() - begun
                bar.update(1)
                bar.set_postfix({k: f"{v:.4f}" for k, v in losses.items() if k.endswith("loss")}, refresh=False)
                self._log(step + 1, losses | {"learning_rate": float(self.lr_scheduler.get_last_lr()[0])})
                self._watch(step + 1)
        tuned = self._validate_tuned(self.config.max_steps)
        losses_by_role = {
            role: {"base": base.to_dict(), "tuned": tuned[role].to_dict()} for role, base in self.base_losses.items()
        }
        self._save()
        done = self.config.max_steps - first
        return losses_by_role, done / seconds if seconds else math.nan

    def _step(self, step: int) -> dict[str, float]:
        """One optimizer step over `gradient_accumulation_steps` forwards."""
        sums: dict[str, float] = {}
        accumulation = self.config.gradient_accumulation_steps
        for part in range(accumulation):
            number = step * accumulation + part
            torch.manual_seed(step_seed(self.config.seed, 1, number, self.accelerator.process_index))  # dropout
            with self.accelerator.accumulate(self.denoiser):
                rows = self.source.rows(number)
                batch = rows.batch.to(self.accelerator.device, self.family.dtype)
                levels, noise = rows.levels.to(batch.latents.device), rows.noise.to(batch.latents)
                with self.accelerator.autocast():
                    losses = compute_loss(self.family, self.denoiser, self.objective, batch, noise, levels)
                self._stop_if_not_finite(losses, step, batch.ids)
                loss = self.objective.combine(losses, levels, batch.is_retention, rows.counts)
                # processes average their gradients, and accelerate divides by the accumulation steps
                self.accelerator.backward(loss * self.accelerator.num_processes)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(
                        self.parameters.values(), self.config.max_grad_norm or math.inf
                    )  # fmt: skip
                    if self.state.scaler is None:  # fp16's scaler meets infinite gradients by itself and skips the step
                        self._stop_if_not_finite(norm.reshape(1), step, ["the gradient"])
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, value in self._by_role(loss.detach(), losses.detach(), batch.is_retention, rows.counts).items():
                sums[name] = sums.get(name, 0.0) + value / accumulation
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step(self.parameters.values())
        return sums

    def _by_role(self, loss: Tensor, losses: Tensor, is_retention: Tensor, counts: tuple[int, int]) -> dict[str, float]:
        """The objective and the unweighted mean ℓ of target and bank rows, over all processes."""
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

    # --- watching ---------------------------------------------------------------------------------------------------

    def _watch(self, done: int) -> None:
        """What is due after `done` steps: validation, pictures, a checkpoint."""
        last = done == self.config.max_steps
        if self.config.validate_every and done % self.config.validate_every == 0 and not last:
            self._validate_tuned(done)
        if self.config.sample_every and (done % self.config.sample_every == 0 or last):
            self._sample_grid(done)
        if done % self.config.checkpoint_every == 0 and not last and self.accelerator.is_main_process:
            save_checkpoint(self.output, done, self.state, self.identity)

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters.values())
        self.ema.copy_to(self.parameters.values())
        try:
            yield
        finally:
            self.ema.restore(self.parameters.values())

    def _validate(self, denoiser: torch.nn.Module) -> dict[str, BandLosses]:
        with self.accelerator.autocast():
            return {role: validator.measure(denoiser) for role, validator in self.inputs.validation.items()}

    def _validate_tuned(self, step: int) -> dict[str, BandLosses]:
        with self._averaged_weights():
            found = self._validate(self.family.denoiser)
        row: dict[str, float] = {}
        for role, bands in found.items():
            row |= {f"validation/{role}_{u:.1f}": value for u, value in zip(bands.centres, bands.losses)}
        self._log(step, row)
        return found

    def _sample(self) -> list[Any]:
        if not self.accelerator.is_main_process:
            return []
        with self.accelerator.autocast():
            return sample_pictures(
                self.family, self.inputs.sample_prompts, seed=self.config.seed, steps=self.config.sample_steps,
                guidance_scale=self.config.sample_guidance_scale, resolution=self.inputs.resolution,
            )  # fmt: skip

    def _sample_grid(self, step: int) -> None:
        with self._averaged_weights():
            tuned = self._sample()
        if self.accelerator.is_main_process:
            rows = {"base": self.base_pictures, f"step {step}": tuned}
            save_grid(self.output / "samples" / f"step-{step:06d}.png", rows, self.inputs.sample_prompts)

    def _log(self, step: int, values: dict[str, float]) -> None:
        if not values or not self.accelerator.is_main_process:
            return
        with (self.output / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.config.trackers:
            self.accelerator.log(values, step=step)

    # --- resuming and saving ----------------------------------------------------------------------------------------

    def _resume(self) -> int:
        """The step to go on from; metrics logged after it are cut off."""
        found = checkpoints(self.output) if self.config.resume else []
        step = load_checkpoint(found[0], self.state, self.identity) if found else 0
        metrics = self.output / "metrics.jsonl"
        if self.accelerator.is_main_process and metrics.exists():
            lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            write_text(metrics, "".join(whole))
        return step

    def _save(self) -> None:
        """The result in diffusers' own format, renamed into place once it is whole."""
        if not self.accelerator.is_main_process:
            return
        partial = self.output / ".result.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with self._averaged_weights():
            self.tuning.save(partial)
        if isinstance(self.tuning, LoRATuning):
            (partial / LORA_FILE).replace(self.output / LORA_FILE)
            partial.rmdir()
        else:
            shutil.rmtree(self.output / "pipeline", ignore_errors=True)  # of a run that broke off after saving
            partial.replace(self.output / "pipeline")
