"""The sections of a recipe that say how it is trained: schedule, objective, optimization."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from difftuning_control.errors import UserError, need
from difftuning_control.recipe.inputs import MAX_SEED
from difftuning_control.recipe.measured_schedule import measured_from
from difftuning_control.system.functions import named_function
from difftuning_control.system.home import expand_paths
from difftuning_control.system.untrusted import from_json, read_text

if TYPE_CHECKING:
    from difftuning_control.objective.schedules import Schedule

DEFAULT_TAU = 0.3
Precision = Literal["no", "fp16", "bf16"]
SCHEDULE_OPTIONS: dict[str, tuple[str, ...]] = {
    "power": ("tau", "retention_tau", "psi"),
    "paper": ("tau", "retention_tau", "psi"),
    "constant": ("psi", "xi"),
    "measured": ("path",),
    "function": ("path",),
    "auto": (),
}


@dataclass
class ScheduleConfig:
    """ψ and ξ over the noise coordinate u.

    Args:
        kind: shape of ψ and ξ: power (ψ = u^τ, ξ = 1 − u^τ), paper (the authors' code), constant (psi and xi), measured
            (from path), auto (measured as the run begins), or function (yours, by path). Where a recipe names no
            schedule, methods lora and full take constant with xi 1, but for models that are told classes, and method
            controlnet power with tau 1.
        tau: τ; when empty 0.3 of power, 1 of paper. [> 0]
        retention_tau: τ of ξ alone, of power and paper; that of ψ when empty. [> 0]
        psi: ψ at every noise level: of constant 1 when empty; of power and paper u^τ when empty. [> 0]
        xi: ξ of constant; 0 when empty. [≥ 0]
        path: JSON file with u, psi and xi, of measured; `difftune analyze` writes one. Of function
            package.module:function, which is code that runs: given u, (N,) from 0 to 1, it gives ψ and ξ there.
    """

    kind: Literal["power", "paper", "constant", "measured", "auto", "function"] = "power"
    tau: float | None = None
    retention_tau: float | None = None
    psi: float | None = None
    xi: float | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        expand_paths(self, "path")
        used = SCHEDULE_OPTIONS[self.kind]
        for name in ("tau", "retention_tau", "psi", "xi", "path"):
            if getattr(self, name) is not None and name not in used:
                names = " and ".join(filter(None, [", ".join(used[:-1]), *used[-1:]]))
                names = f"only {names}" if used else "none of these"
                raise UserError(f"tuning.schedule.{name} is given, but a {self.kind} schedule uses {names}.")
        if self.kind == "measured" and self.path is None:
            raise UserError("tuning.schedule.kind is measured, but tuning.schedule.path is empty; name the file.")
        if self.kind == "function" and (self.path is None or ":" not in self.path):
            raise UserError(
                f"tuning.schedule.kind is function and tuning.schedule.path is {self.path or 'empty'}; expected "
                "package.module:function."
            )
        if self.kind not in ("measured", "auto", "function"):  # a recipe that is only read runs no code
            self.build(1000)

    @property
    def file(self) -> str | None:
        """The file that a measured schedule is read from."""
        return self.path if self.kind == "measured" else None

    def build(self, num_train_timesteps: int) -> Schedule:
        """The schedule itself; of `auto`, ψ = ξ = 1 until the trainer has measured it.

        Raises:
            UserError: if a value is out of its range or the measured file cannot be read.
        """
        from difftuning_control.objective.schedules import (
            schedule_from_dict,  # saves torch for recipes that are only read
        )

        try:
            if self.kind == "measured":
                assert self.path is not None
                return measured_from(from_json(read_text(Path(self.path)))).build()
            if self.kind == "function":
                from difftuning_control.objective.schedules import tabulate  # as above

                return tabulate(named_function(self.path or "", "schedule"))
            if self.kind == "auto":
                return schedule_from_dict({"kind": "constant", "psi": 1.0, "xi": 1.0})
            if self.kind == "constant":
                psi, xi = (1.0 if self.psi is None else self.psi), (0.0 if self.xi is None else self.xi)
                return schedule_from_dict({"kind": "constant", "psi": psi, "xi": xi})
            default = DEFAULT_TAU if self.kind == "power" else 1.0
            values: dict[str, Any] = {"kind": self.kind, "tau": default if self.tau is None else self.tau}
            values |= {"retention_tau": self.retention_tau, "psi_value": self.psi}
            if self.kind == "paper":
                values["num_train_timesteps"] = num_train_timesteps
            return schedule_from_dict(values)
        except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"the measured schedule {self.path} cannot be read ({error!r}).") from None
        except ValueError as error:
            raise UserError(f"tuning.schedule: {error}") from None


@dataclass
class TuningConfig:
    """The objective.

    Args:
        schedule: ψ and ξ.
        estimator: how the schedule acts: sample (noise levels are drawn in proportion to ψ for target rows and to ξ for
            bank rows), or weight (they are drawn as the model's own training draws them, and losses are multiplied by ψ
            and ξ).
        retention_ratio: share of the batch that is for retention; 0, with retention_weight 0, for plain fine-tuning.
            [share, ≥ 0 and < 1]
        retention_weight: λ; with a forgetting budget, where its multipliers start. [≥ 0]
        forgetting_budget: how much the loss on the bank may rise in each noise band (0.02 is 2 %), one number for all
            bands or five from low noise to high; the bank rows' weight then follows by dual ascent, and λ stays fixed
            when empty. [≥ 0]
        retention: what a retention row's prediction is compared with: samples (what the noised sample of the bank was
            made of, as in the paper), or teacher (what the pretrained model predicts, at a forward more of these rows).
        retention_rows: what the teacher is asked on: bank (its latents), or pictures (those that are tuned on, so that
            no bank is needed).
        retention_prompts: prompts that retention rows train with: empty, own (those that the samples were drawn for, or
            the pictures' captions), or both (a row's own and the empty one in turn).
        prompt_dropout: share of target rows that train with the empty prompt, or without a class. [share, 0 to 1]
        label_space: of models that are told classes: own (the data's classes are the model's), or new (the data's
            classes take the place of the model's, each with a new embedding that trains whole).
        label_start: where the embeddings of a new label space begin: random (one vector a class, drawn from the seed),
            or first (the model's own first classes, in order, as in the authors' code).
        variance: what the loss is on: fixed (the prediction alone), or hybrid (also the variational bound on the
            variance, of models that predict it).
        min_snr_gamma: γ of min-SNR weighting; no such weighting when empty. [> 0]
        stratified: spread the noise levels of a batch evenly.
    """

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    estimator: Literal["sample", "weight"] = "sample"
    retention_ratio: float = 0.2
    retention_weight: float = 0.1
    forgetting_budget: float | list[float] | None = None
    retention: Literal["samples", "teacher"] = "samples"
    retention_rows: Literal["bank", "pictures"] = "bank"
    retention_prompts: Literal["empty", "own", "both"] = "empty"
    prompt_dropout: float = 0.0
    label_space: Literal["own", "new"] = "own"
    label_start: Literal["random", "first"] = "random"
    variance: Literal["fixed", "hybrid"] = "fixed"
    min_snr_gamma: float | None = None
    stratified: bool = True

    def __post_init__(self) -> None:
        need(0 <= self.retention_ratio < 1, "tuning.retention_ratio", self.retention_ratio, "at least 0 and below 1")
        weight = self.retention_weight
        need(0 <= weight < math.inf, "tuning.retention_weight", weight, "a finite number of at least 0")
        need(0 <= self.prompt_dropout <= 1, "tuning.prompt_dropout", self.prompt_dropout, "0 to 1")
        gamma = self.min_snr_gamma
        need(gamma is None or 0 < gamma < math.inf, "tuning.min_snr_gamma", gamma, "a finite number above 0")
        if (self.retention_ratio == 0) != (self.retention_weight == 0):
            raise UserError(
                f"tuning.retention_ratio is {self.retention_ratio} and tuning.retention_weight "
                f"{self.retention_weight}; set both to 0 for plain fine-tuning, or both above 0."
            )
        if self.forgetting_budget is not None:
            self._check_budget()
        if self.label_start == "first" and self.label_space == "own":
            raise UserError("tuning.label_start is first, but tuning.label_space is own; say new, or leave it out.")

        self._check_teacher()
        if self.schedule.kind == "auto" and not self.uses_bank:
            reason = (
                "retention_ratio is 0; raise it"
                if self.retention_ratio == 0
                else "retention_rows is pictures; say bank"
            )
            raise UserError(
                f"tuning.schedule.kind auto measures against the bank, but tuning.{reason}, or name another schedule."
            )

    @property
    def uses_bank(self) -> bool:
        """Whether rows of the bank are trained on."""
        return self.retention_ratio > 0 and self.retention_rows == "bank"

    def _check_teacher(self) -> None:
        if self.retention == "samples":
            if self.retention_rows == "pictures":
                raise UserError(
                    "tuning.retention_rows is pictures, which with tuning.retention samples would be learnt and not "
                    "retained; say --tuning.retention teacher, or bank."
                )
            return
        if self.retention_ratio == 0:
            raise UserError(
                "tuning.retention is teacher, but tuning.retention_ratio is 0, so no row is for retention; raise it."
            )
        if self.variance == "hybrid":
            raise UserError(
                "tuning.variance is hybrid, whose bound is about the sample itself and not about what a teacher "
                "predicts; say fixed, or --tuning.retention samples."
            )
        if self.retention_rows == "pictures" and self.label_space == "new" and self.retention_prompts != "empty":
            raise UserError(
                f"tuning.retention_prompts is {self.retention_prompts}, but the pretrained model does not know the "
                "classes of tuning.label_space new; say empty."
            )

    def _check_budget(self) -> None:
        from difftuning_control.objective.budget import (  # saves torch where no budget is named
            HIGHEST,
            LOWEST,
            spread_budget,
        )

        try:
            spread_budget(self.forgetting_budget)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"tuning.forgetting_budget: {error}") from None
        need(
            LOWEST <= self.retention_weight <= HIGHEST and self.retention_ratio > 0,
            "tuning.retention_weight",
            self.retention_weight,
            f"{LOWEST} to {HIGHEST}, with a retention_ratio above 0, for a forgetting budget",
        )


@dataclass
class TrainingConfig:
    """The loop.

    Args:
        max_steps: length of the run. [optimizer steps, ≥ 1]
        batch_size: rows of one forward on one process, bank rows included. [rows, ≥ 1]
        gradient_accumulation_steps: forwards to an optimizer step. [forwards, ≥ 1]
        learning_rate: learning rate after the warm-up. [> 0]
        optimizer: adamw, or its 8-bit form adamw8bit (bitsandbytes), whose state takes 2 bytes a weight instead of 8.
        lr_scheduler: shape of the learning rate over the run, by diffusers' names.
        lr_warmup_steps: length of the warm-up. [optimizer steps, ≥ 0]
        weight_decay: weight decay of AdamW. [≥ 0]
        max_grad_norm: gradients are scaled down to this norm; not at all when empty. [> 0]
        mixed_precision: precision of the forward and backward passes; what trains is kept in float32.
        gradient_checkpointing: compute activations again in the backward pass: less memory for more time.
        compile: compile the blocks that the model repeats: inductor (torch.compile, for GPUs: the first step takes
            minutes, and results are equal up to rounding), or aot_eager, which only shows whether a model can be
            compiled.
        shard: spread weights, gradients and optimizer over the processes (FSDP2), with method full; the model must
            still fit once on every device, 4 bytes a weight, before training.
        ema_decay: decay of the running average of the trained weights, which is what is saved; no average when empty.
            [> 0 and < 1]
        ema_warmup: the decay rises to ema_decay, 1 − (1 + s)^(−2/3) after s steps (0.978 at 300, 0.9988 at 24,000), so
            that short runs do not save their start; when false it is ema_decay from the first step on, as in the
            authors' code.
        seed: seed of everything random but the bank. [0 to 2147483647]
        checkpoint_every: optimizer steps between checkpoints. [optimizer steps, ≥ 1]
        save_at: steps up to max_steps after which the weights are also kept, loadable, in `step-<number>` of the
            output. [optimizer steps, ≥ 1]
        resume: go on from the last checkpoint in the output, or from the start if there is none; `difftune resume RUN`
            needs no recipe, and a run that it goes on with.
        begin_from: start from the weights of a finished run, of RUN/step-000010, or of a LoRA file of this base; a new
            start when empty.
        validate_every: optimizer steps between validations; 0 for only before and after. [optimizer steps, ≥ 0]
        validation_size: rows of target and of bank in a validation. [rows, ≥ 1]
        validation_prompts: prompts that held-out samples of the bank are measured with: retained (what retention rows
            train with, tuning.retention_prompts), or empty, own or both whatever those are, so that runs compare.
        sample_every: optimizer steps between sample grids; 0 for none. [optimizer steps, ≥ 0]
        sample_prompts: prompts of the sample grids; captions of the data when empty.
        sample_steps: sampling steps of the sample grids; where none are named, a model that was distilled draws in its
            few. [steps, ≥ 1]
        sample_guidance_scale: scale of classifier-free guidance of the sample grids; where none is named, a model that
            was distilled draws with none. [≥ 0]
        trackers: where figures and grids are also sent: any of tensorboard, wandb.
        stop_when: end before max_steps: converged (once a ControlNet's fidelity has risen and settled); never when
            empty.
        stop_after: optimizer steps to go on after stop_when. [optimizer steps, ≥ 0]
    """

    max_steps: int = 300
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1.0e-3
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    lr_scheduler: Literal["constant", "constant_with_warmup", "cosine", "linear"] = "cosine"
    lr_warmup_steps: int = 0
    weight_decay: float = 1.0e-2
    max_grad_norm: float | None = 1.0
    mixed_precision: Precision = "no"
    gradient_checkpointing: bool = False
    compile: Literal["inductor", "aot_eager"] | None = None
    shard: bool = False
    ema_decay: float | None = None
    ema_warmup: bool = True
    seed: int = 0
    checkpoint_every: int = 100
    save_at: list[int] = field(default_factory=list)
    resume: bool = False
    begin_from: str | None = None
    validate_every: int = 100
    validation_size: int = 32
    validation_prompts: Literal["retained", "empty", "own", "both"] = "retained"
    sample_every: int = 100
    sample_prompts: list[str] = field(default_factory=list)
    sample_steps: int = 20
    sample_guidance_scale: float = 4.0
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    stop_when: Literal["converged"] | None = None
    stop_after: int = 0

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "batch_size",
            "gradient_accumulation_steps",
            "checkpoint_every",
            "validation_size",
            "sample_steps",
        ):
            need(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "at least 1")
        for name in ("lr_warmup_steps", "validate_every", "sample_every", "stop_after"):
            need(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), "at least 0")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise UserError(
                f"training.lr_warmup_steps is {self.lr_warmup_steps}, but training.lr_scheduler constant has no "
                "warm-up; say constant_with_warmup, or leave the steps out."
            )
        rate, decay, norm = self.learning_rate, self.weight_decay, self.max_grad_norm
        need(0 < rate < math.inf, "training.learning_rate", rate, "a finite number above 0")
        need(0 <= decay < math.inf, "training.weight_decay", decay, "a finite number of at least 0")
        need(norm is None or 0 < norm < math.inf, "training.max_grad_norm", norm, "a finite number above 0")
        need(self.ema_decay is None or 0 < self.ema_decay < 1, "training.ema_decay", self.ema_decay, "between 0 and 1")
        if self.ema_decay is None and not self.ema_warmup:
            raise UserError("training.ema_warmup is false, but training.ema_decay is empty; give the decay.")
        need(0 <= self.seed <= MAX_SEED, "training.seed", self.seed, f"0 to {MAX_SEED}")
        guidance = self.sample_guidance_scale
        need(0 <= guidance < math.inf, "training.sample_guidance_scale", guidance, "at least 0")
        if self.compile is not None and self.shard:
            raise UserError("training.compile and training.shard do not go together yet; leave one of them out.")
        if self.stop_after and self.stop_when is None:
            raise UserError("training.stop_after is given without training.stop_when; say when: converged.")
        for step in self.save_at:
            need(1 <= step <= self.max_steps, "training.save_at", step, f"steps from 1 to max_steps, {self.max_steps}")
