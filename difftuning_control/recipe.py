"""A recipe: everything a run needs, as dataclasses that check their ranges; YAML and the command line mirror them."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from difftuning_control.errors import UserError
from difftuning_control.outside import MAX_PIXELS, MOST_PIXELS, from_json, read_text
from difftuning_control.schedules import Schedule, schedule_from_dict

MAX_SEED = 2**31 - 1
GATES = ("kid", "retention_loss", "fidelity", "memorisation")
DRAWN = {"features": "lite0", "pictures": 64, "seeds": [0, 1, 2], "steps": 20, "guidance_scale": 4.0}
DEFAULT_TAU = 0.3
DEFAULT_RANK = 16
ADAPTER_OPTIONS: dict[str, tuple[str, ...]] = {
    "lora": ("rank", "alpha", "targets", "dropout", "rslora", "init", "text_encoder", "text_encoder_learning_rate"),
    "dora": ("rank", "alpha", "targets", "dropout", "rslora", "text_encoder", "text_encoder_learning_rate"),
    "tlora": ("rank", "min_rank", "alpha", "targets", "init"),
    "loha": ("rank", "alpha", "targets"),
    "lokr": ("rank", "alpha", "targets", "factor"),
    "oft": ("block_size", "targets"),
    "boft": ("block_size", "targets"),
    "ia3": ("targets",),
    "difffit": (),
}


def _need(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise UserError(f"{name} is {value}; expected {expected}.")


@dataclass
class ModelConfig:
    """The pretrained model.

    Args:
        id: `embedded`, a diffusers directory, or a Hub id.
        variant: weights variant to load, such as fp16.
        quantization: keep the weights of a frozen transformer (SD3, FLUX, PixArt, Sana, Lumina2) in fewer bits and
            compute in training.mixed_precision: float8 (diffusers' layerwise casting), int8 or nf4 (4 bits; both need
            bitsandbytes).
        offload: keep the text encoders in main memory; while prompts are encoded they take the denoiser's place.
    """

    id: str = "embedded"
    variant: str | None = None
    quantization: Literal["float8", "int8", "nf4"] | None = None
    offload: bool = False


@dataclass
class DataConfig:
    """The pictures to tune on.

    Args:
        path: a folder, `embedded/icons`, `embedded/flat`, or a `datasets` data set by name or path.
        resolution: side in pixels; the model's own when empty.
        flip: also train on mirror images.
        crops: positions of the square kept of pictures that are not square; 1 is the centre.
        holdout: share of the pictures kept for validation; only without validation_path.
        validation_path: pictures to validate on, instead of a share of path.
        limit: use only the first so many pictures.
        caption_column: column of the captions.
        image_column: column of the pictures, in a `datasets` data set.
        classes: folders (a picture's caption is the name of the sub-folder it lies in), or label (captions are the
            names or numbers in the column called label); captions as they are when empty.
        default_caption: caption of pictures that have none.
        truncate_captions: cut captions that are longer than the text encoder takes, instead of stopping.
        skip_bad: leave out pictures that cannot be used, instead of stopping.
        buckets: frame each picture in the shape, of about the square's area, that crops least of it, and train on one
            shape a step; held-out pictures, samples and a bank of samples stay square.
        bucket_step: sides of the buckets are multiples of this many pixels; a sixteenth of the resolution when empty.
        bucket_aspect: no side of a bucket is longer than so many times the other.
        stream: read path while training and keep no cache, for collections that fit no disk: a folder of WebDataset
            .tar shards, of Parquet files or with a metadata.jsonl, or a `datasets` data set. With a holdout the first
            training.validation_size pictures are held out, and a bank's captions are those of the next bank.size rows.
        max_pixels: pictures with more are refused before they are decoded.
        cache: folder of the latent and prompt caches; the user's cache folder when empty.
    """

    path: str = "embedded/icons"
    resolution: int | None = None
    flip: bool = False
    crops: int = 1
    holdout: float = 0.1
    validation_path: str | None = None
    limit: int | None = None
    caption_column: str = "text"
    image_column: str = "image"
    classes: Literal["folders", "label"] | None = None
    default_caption: str | None = None
    truncate_captions: bool = False
    skip_bad: bool = False
    buckets: bool = False
    bucket_step: int | None = None
    bucket_aspect: float = 2.0
    stream: bool = False
    max_pixels: int = MAX_PIXELS
    cache: str | None = None

    def __post_init__(self) -> None:
        _need(self.resolution is None or self.resolution >= 8, "data.resolution", self.resolution, "at least 8 pixels")
        _need(
            self.bucket_step is None or self.bucket_step >= 8, "data.bucket_step", self.bucket_step, "at least 8 pixels"
        )
        _need(1 < self.bucket_aspect <= 8, "data.bucket_aspect", self.bucket_aspect, "more than 1 and at most 8")
        if not self.buckets and (self.bucket_step is not None or self.bucket_aspect != 2.0):
            raise UserError(
                "data.bucket_step and data.bucket_aspect are for data.buckets true; give it, or leave them out."
            )
        _need(1 <= self.crops <= 64, "data.crops", self.crops, "1 to 64")
        _need(0 <= self.holdout < 1, "data.holdout", self.holdout, "at least 0 and less than 1")
        _need(self.limit is None or self.limit >= 1, "data.limit", self.limit, "at least 1")
        _need(1 <= self.max_pixels <= MOST_PIXELS, "data.max_pixels", self.max_pixels, f"1 to {MOST_PIXELS}")
        if self.classes is not None and self.default_caption is not None:
            raise UserError(
                f"data.classes is {self.classes}, so every picture has its caption; leave out data.default_caption."
            )


@dataclass
class ScheduleConfig:
    """ψ and ξ over the noise coordinate u.

    Args:
        kind: power (ψ = u^τ, ξ = 1 − u^τ), paper (the authors' code), constant (psi and xi), measured (from path), auto
            (measured on the model and the data when the run begins).
        tau: τ; when empty 0.3 of power (better than 1 in every cell of the benchmark), 1 of paper.
        psi: ψ of constant, 1 when empty.
        xi: ξ of constant, 0 when empty.
        path: a JSON file with u, psi and xi, for measured.
    """

    kind: Literal["power", "paper", "constant", "measured", "auto"] = "power"
    tau: float | None = None
    psi: float | None = None
    xi: float | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        takes = {"power": {"tau"}, "paper": {"tau"}, "constant": {"psi", "xi"}, "measured": {"path"}}
        used = takes.get(self.kind, set())
        for name in ("tau", "psi", "xi", "path"):
            if getattr(self, name) is not None and name not in used:
                names = f"only {' and '.join(sorted(used))}" if used else "none of these"
                raise UserError(f"tuning.schedule.{name} is given, but a {self.kind} schedule uses {names}.")
        if self.kind == "measured" and self.path is None:
            raise UserError("tuning.schedule.kind is measured, but tuning.schedule.path is empty; name the file.")
        if self.kind not in ("measured", "auto"):
            self.build(1000)

    def build(self, num_train_timesteps: int) -> Schedule:
        """The schedule itself; of `auto`, ψ = ξ = 1 until the trainer has measured it.

        Raises:
            UserError: if a value is out of its range or the measured file cannot be read.
        """
        try:
            if self.kind == "measured":
                assert self.path is not None
                table = from_json(read_text(Path(self.path)))
                return schedule_from_dict({"kind": "measured", **{k: table[k] for k in ("u", "psi", "xi")}})
            if self.kind == "auto":
                return schedule_from_dict({"kind": "constant", "psi": 1.0, "xi": 1.0})
            if self.kind == "constant":
                psi, xi = (1.0 if self.psi is None else self.psi), (0.0 if self.xi is None else self.xi)
                return schedule_from_dict({"kind": "constant", "psi": psi, "xi": xi})
            default = DEFAULT_TAU if self.kind == "power" else 1.0
            values: dict[str, Any] = {"kind": self.kind, "tau": default if self.tau is None else self.tau}
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
        estimator: sample (draw noise levels by role) or weight (draw as the model does, weigh the loss).
        retention_ratio: share of the batch that comes from the bank; 0 for plain fine-tuning.
        retention_weight: λ; with a forgetting budget, where its multipliers start.
        forgetting_budget: how much the loss on the bank may rise in each noise band (0.02 is 2 %), one number for all
            bands or five from low noise to high; the bank rows' weight then follows by dual ascent. None when empty.
        retention_prompts: empty, or own (the prompts the bank was drawn with).
        prompt_dropout: share of target rows that train with the empty prompt, or without a class.
        label_space: own (the data's classes are the model's), or new (the data's classes take the place of the model's,
            each with a new embedding that trains whole); of models that are told classes.
        variance: fixed (the loss on the prediction alone), or hybrid (and the variational bound on the variance, of
            models that predict it).
        min_snr_gamma: γ of min-SNR weighting, none when empty.
        stratified: spread the noise levels of a batch evenly.
    """

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    estimator: Literal["sample", "weight"] = "sample"
    retention_ratio: float = 0.2
    retention_weight: float = 0.1
    forgetting_budget: float | list[float] | None = None
    retention_prompts: Literal["empty", "own"] = "empty"
    prompt_dropout: float = 0.0
    label_space: Literal["own", "new"] = "own"
    variance: Literal["fixed", "hybrid"] = "fixed"
    min_snr_gamma: float | None = None
    stratified: bool = True

    def __post_init__(self) -> None:
        _need(0 <= self.retention_ratio < 1, "tuning.retention_ratio", self.retention_ratio, "at least 0 and below 1")
        weight = self.retention_weight
        _need(0 <= weight < math.inf, "tuning.retention_weight", weight, "a finite number of at least 0")
        _need(0 <= self.prompt_dropout <= 1, "tuning.prompt_dropout", self.prompt_dropout, "0 to 1")
        gamma = self.min_snr_gamma
        _need(gamma is None or 0 < gamma < math.inf, "tuning.min_snr_gamma", gamma, "a finite number above 0")
        if (self.retention_ratio == 0) != (self.retention_weight == 0):
            raise UserError(
                f"tuning.retention_ratio is {self.retention_ratio} and tuning.retention_weight "
                f"{self.retention_weight}; set both to 0 for plain fine-tuning, or both above 0."
            )
        if self.forgetting_budget is not None:
            self._check_budget()

        if self.schedule.kind == "auto" and self.retention_ratio == 0:
            raise UserError(
                "tuning.schedule.kind auto measures against the bank, but tuning.retention_ratio is 0; raise it, or "
                "name another schedule."
            )

    def _check_budget(self) -> None:
        from difftuning_control.budget import HIGHEST, LOWEST, spread_budget

        try:
            spread_budget(self.forgetting_budget)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"tuning.forgetting_budget: {error}") from None
        _need(
            LOWEST <= self.retention_weight <= HIGHEST and self.retention_ratio > 0, "tuning.retention_weight",
            self.retention_weight, f"{LOWEST} to {HIGHEST}, with a retention_ratio above 0, for a forgetting budget",
        )  # fmt: skip


@dataclass
class BankConfig:
    """The knowledge bank.

    Args:
        size: number of samples.
        prompts: captions (those of the data), empty, or a text file with one prompt a line; of a model that is told
            classes also classes (all that it has), or both (its classes and the empty one by turns).
        guidance_scale: classifier-free guidance while sampling.
        steps: sampling steps.
        batch_size: samples drawn at once.
        seed: of the bank.
        path: where the bank lies or shall be built, or a folder of real source pictures; the cache when empty.
    """

    size: int = 1000
    prompts: str = "captions"
    guidance_scale: float = 1.5
    steps: int = 25
    batch_size: int = 32
    seed: int = 0
    path: str | None = None

    def __post_init__(self) -> None:
        for name in ("size", "steps", "batch_size"):
            _need(getattr(self, name) >= 1, f"bank.{name}", getattr(self, name), "at least 1")
        _need(0 <= self.seed <= MAX_SEED, "bank.seed", self.seed, f"0 to {MAX_SEED}")
        _need(0 <= self.guidance_scale < math.inf, "bank.guidance_scale", self.guidance_scale, "at least 0")


@dataclass
class FidelityConfig:
    """How well pictures follow their conditions while a ControlNet trains, on held-out pictures.

    Args:
        every: optimizer steps between measurements; 0 for none.
        size: held-out conditions.
        steps: sampling steps.
        guidance_scale: classifier-free guidance.
    """

    every: int = 50
    size: int = 32
    steps: int = 12
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("size", 1), ("steps", 1)):
            _need(getattr(self, name) >= least, f"control.fidelity.{name}", getattr(self, name), f"at least {least}")
        _need(0 <= self.guidance_scale < math.inf, "control.fidelity.guidance_scale", self.guidance_scale, "at least 0")


@dataclass
class ControlConfig:
    """What a ControlNet is taught (method controlnet).

    Args:
        annotator: what makes conditions from pictures: a name of controlnet_aux, package.module:function, or supplied
            (pictures of yours, in path or column).
        params: of the annotator.
        weights: the annotator's, a directory or Hub id; its default place when empty.
        path: folder of supplied conditions, named like the pictures.
        validation_path: folder of those of data.validation_path.
        column: column of supplied conditions, instead of path.
        resize: lanczos, box or nearest, for supplied conditions of another size.
        init: the ControlNet to start from, a directory or Hub id; a copy of the denoiser's encoder when empty.
        dropout: share of target rows that train with a blank (black) condition.
        bank_condition: own (made from the decoded bank samples) or blank.
        workers: threads that annotate; when empty one a CPU core, at most 8, or a single one for a network.
        fidelity: what is measured on the way.
    """

    annotator: str = "canny"
    params: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    path: str | None = None
    validation_path: str | None = None
    column: str | None = None
    resize: Literal["lanczos", "box", "nearest"] = "lanczos"
    init: str | None = None
    dropout: float = 0.0
    bank_condition: Literal["own", "blank"] = "own"
    workers: int | None = None
    fidelity: FidelityConfig = field(default_factory=FidelityConfig)

    def __post_init__(self) -> None:
        _need(0 <= self.dropout <= 1, "control.dropout", self.dropout, "0 to 1")
        _need(self.workers is None or 1 <= self.workers <= 256, "control.workers", self.workers, "1 to 256")
        places = [name for name in ("path", "column") if getattr(self, name) is not None]
        if self.annotator != "supplied" and (places or self.validation_path is not None):
            raise UserError(
                f"control.{places[0] if places else 'validation_path'} is given, but control.annotator is "
                f"{self.annotator}; say --control.annotator supplied to train on conditions of your own."
            )
        if self.annotator == "supplied" and len(places) != 1:
            raise UserError("control.annotator is supplied; give either control.path or control.column, the one place.")
        if self.annotator == "supplied" and (self.params or self.weights is not None):
            raise UserError("control.annotator is supplied, which has no params and no weights; leave them out.")
        if self.column is not None and self.validation_path is not None:
            raise UserError("control.column is read in data.validation_path too; leave out control.validation_path.")


@dataclass
class AdapterConfig:
    """What is trained with method lora, or with method controlnet where `on` is controlnet.

    Args:
        kind: lora, dora, tlora (a LoRA whose rank falls as the noise rises), loha, lokr, oft, boft, ia3, or difffit
            (biases, norms and scale factors).
        on: denoiser, or controlnet (kind lora).
        rank: r of the update, of lora, dora, tlora and loha 16 when empty; of lokr, whose second factor trains whole
            when empty.
        min_rank: of tlora at pure noise; half of rank when empty.
        alpha: the update is scaled by alpha / rank; equal to rank when empty.
        targets: auto (the attention projections), or names of modules separated by commas.
        dropout: on the adapter's input, of lora and dora.
        rslora: scale by alpha / √rank instead, of lora and dora.
        init: how lora and tlora start: gaussian, pissa (lora only: the weight's largest singular vectors) or
            orthogonal; when empty gaussian of lora, orthogonal of tlora.
        factor: of lokr, side of the first Kronecker factor at most; as square as can be when empty.
        block_size: side of the rotations, of oft 32 and of boft 4 when empty.
        text_encoder: also train a LoRA on the text encoder, of lora and dora.
        text_encoder_learning_rate: its own; the denoiser's when empty.
    """

    kind: Literal["lora", "dora", "tlora", "loha", "lokr", "oft", "boft", "ia3", "difffit"] = "lora"
    on: Literal["denoiser", "controlnet"] = "denoiser"
    rank: int | None = None
    min_rank: int | None = None
    alpha: float | None = None
    targets: str = "auto"
    dropout: float = 0.0
    rslora: bool = False
    init: Literal["gaussian", "pissa", "orthogonal"] | None = None
    factor: int | None = None
    block_size: int | None = None
    text_encoder: bool = False
    text_encoder_learning_rate: float | None = None

    def __post_init__(self) -> None:
        self._check_options()
        _need(self.rank is None or self.rank >= 1, "adapter.rank", self.rank, "at least 1")
        _need(self.alpha is None or 0 < self.alpha < math.inf, "adapter.alpha", self.alpha, "a finite number above 0")
        _need(0 <= self.dropout < 1, "adapter.dropout", self.dropout, "at least 0 and below 1")
        _need(self.factor is None or self.factor >= 2, "adapter.factor", self.factor, "at least 2")
        _need(self.block_size is None or self.block_size >= 2, "adapter.block_size", self.block_size, "at least 2")
        rate = self.text_encoder_learning_rate
        _need(rate is None or 0 < rate < math.inf, "adapter.text_encoder_learning_rate", rate, "a number above 0")
        if self.kind == "tlora":
            _need(1 <= self.lowest_rank <= self.full_rank, "adapter.min_rank", self.lowest_rank, "1 to adapter.rank")
        if self.kind == "lokr" and self.alpha is not None and self.rank is None:
            raise UserError(
                "adapter.alpha is given, but a lokr without adapter.rank is not scaled; give both or neither."
            )
        if self.init == "pissa" and self.kind == "tlora":
            raise UserError("adapter.init is pissa, but a tlora starts gaussian or orthogonal; leave it out.")
        if self.init == "pissa" and self.dropout > 0:
            raise UserError("adapter.dropout is given, but a lora with init pissa starts away from 0; leave one out.")
        if self.init == "orthogonal" and self.kind == "lora":
            _need(self.full_rank % 2 == 0, "adapter.rank", self.full_rank, "an even number for init orthogonal")
        if rate is not None and not self.text_encoder:
            raise UserError("adapter.text_encoder_learning_rate is given, but adapter.text_encoder is false.")
        if self.on == "controlnet" and (self.kind != "lora" or self.text_encoder):
            given = "adapter.text_encoder" if self.kind == "lora" else f"adapter.kind {self.kind}"
            raise UserError(f"{given} is given for a ControlNet, which trains whole or by a lora alone; leave it out.")

    def _check_options(self) -> None:
        """Refuse options that this kind has no use for."""
        for entry in dataclasses.fields(self):
            if entry.name in ("kind", "on") or getattr(self, entry.name) == entry.default:
                continue
            takes = ADAPTER_OPTIONS[self.kind]
            if entry.name not in takes:
                said = f"takes only {', '.join(takes)}" if takes else "has no settings"
                raise UserError(f"adapter.{entry.name} is given, but kind {self.kind} {said}; leave it out.")

    @property
    def full_rank(self) -> int:
        """The rank where one is needed."""
        return DEFAULT_RANK if self.rank is None else self.rank

    @property
    def lowest_rank(self) -> int:
        """The rank of a tlora at pure noise."""
        return max(1, self.full_rank // 2) if self.min_rank is None else self.min_rank


@dataclass
class TrainingConfig:
    """The loop.

    Args:
        max_steps: optimizer steps.
        batch_size: rows of one forward on one process, bank rows included.
        gradient_accumulation_steps: forwards to an optimizer step.
        learning_rate: after the warm-up.
        optimizer: adamw, or adamw8bit (bitsandbytes), whose state takes 2 bytes a weight instead of 8.
        lr_scheduler: diffusers' names.
        lr_warmup_steps: optimizer steps.
        weight_decay: AdamW's.
        max_grad_norm: gradients are scaled down to this norm; none when empty.
        mixed_precision: no, fp16 or bf16.
        gradient_checkpointing: less memory for more time.
        shard: spread weights, gradients and optimizer over the processes (FSDP2), with method full; the model must
            still fit once on every device, 4 bytes a weight, before training.
        ema_decay: of the running average of the trained weights, which is what is saved; none when empty.
        seed: of everything random.
        checkpoint_every: optimizer steps between checkpoints.
        save_at: steps after which the weights are also kept, loadable, in `step-<number>` of the output.
        resume: go on from the last checkpoint in the output, or from the start if there is none.
        validate_every: optimizer steps between validations; 0 for only before and after.
        validation_size: rows of target and of bank in a validation.
        sample_every: optimizer steps between sample grids; 0 for none.
        sample_prompts: prompts of these grids; captions of the data when empty.
        sample_steps: sampling steps.
        sample_guidance_scale: guidance of these grids.
        trackers: any of tensorboard, wandb.
        stop_when: converged (end once a ControlNet's fidelity has risen and settled); at max_steps only when empty.
        stop_after: optimizer steps to go on after that.
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
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    shard: bool = False
    ema_decay: float | None = None
    seed: int = 0
    checkpoint_every: int = 100
    save_at: list[int] = field(default_factory=list)
    resume: bool = False
    validate_every: int = 100
    validation_size: int = 32
    sample_every: int = 100
    sample_prompts: list[str] = field(default_factory=list)
    sample_steps: int = 20
    sample_guidance_scale: float = 4.0
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    stop_when: Literal["converged"] | None = None
    stop_after: int = 0

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "checkpoint_every", "validation_size",
                     "sample_steps"):  # fmt: skip
            _need(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "at least 1")
        for name in ("lr_warmup_steps", "validate_every", "sample_every", "stop_after"):
            _need(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), "at least 0")
        rate, decay, norm = self.learning_rate, self.weight_decay, self.max_grad_norm
        _need(0 < rate < math.inf, "training.learning_rate", rate, "a finite number above 0")
        _need(0 <= decay < math.inf, "training.weight_decay", decay, "a finite number of at least 0")
        _need(norm is None or 0 < norm < math.inf, "training.max_grad_norm", norm, "a finite number above 0")
        _need(self.ema_decay is None or 0 < self.ema_decay < 1, "training.ema_decay", self.ema_decay, "between 0 and 1")
        _need(0 <= self.seed <= MAX_SEED, "training.seed", self.seed, f"0 to {MAX_SEED}")
        guidance = self.sample_guidance_scale
        _need(0 <= guidance < math.inf, "training.sample_guidance_scale", guidance, "at least 0")
        if self.stop_after and self.stop_when is None:
            raise UserError("training.stop_after is given without training.stop_when; say when: converged.")
        for step in self.save_at:
            _need(1 <= step <= self.max_steps, "training.save_at", step, f"steps from 1 to max_steps, {self.max_steps}")


@dataclass
class GatesConfig:
    """Limits that a finished run is judged by; one that fails them is marked, and not exported unasked.

    Args:
        kid: at most, on held-out pictures (the KID itself, of which tables show × 1000).
        retention_loss: at most, the rise of the loss on held-out bank samples over the base's (0.1 is 10 %).
        fidelity: of a ControlNet, the main figure on held-out conditions; at least, or at most for depth (rmse).
        memorisation: at most, the mean cosine to the nearest training picture.
        features: lite0, dinov2, clip, inception, or a local model directory, for kid and memorisation.
        pictures: how many held-out pictures give their captions.
        seeds: of the noise; every caption is drawn once a seed, and means over the seeds are judged.
        steps: sampling steps.
        guidance_scale: classifier-free guidance.
    """

    kid: float | None = None
    retention_loss: float | None = None
    fidelity: float | None = None
    memorisation: float | None = None
    features: str = "lite0"
    pictures: int = 64
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    steps: int = 20
    guidance_scale: float = 4.0

    def __post_init__(self) -> None:
        for name, low, high in (("kid", 0, math.inf), ("retention_loss", -1, math.inf), ("fidelity", 0, 1),
                                ("memorisation", -1, 1)):  # fmt: skip
            value = getattr(self, name)
            expected = f"{low} to {high}" if high < math.inf else f"a finite number of at least {low}"
            _need(value is None or (low <= value <= high and value < math.inf), f"gates.{name}", value, expected)
        for name, least in (("pictures", 5), ("steps", 1)):
            _need(getattr(self, name) >= least, f"gates.{name}", getattr(self, name), f"at least {least}")
        _need(0 <= self.guidance_scale < math.inf, "gates.guidance_scale", self.guidance_scale, "at least 0")
        seeds = self.seeds
        different = bool(seeds) and len(set(seeds)) == len(seeds) and min(seeds) >= 0
        _need(different, "gates.seeds", seeds, "different whole numbers of at least 0")
        drawn = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in GATES}
        if not self.draws and drawn != DRAWN:
            raise UserError(
                "gates has settings of the pictures to draw, but no limit on kid, fidelity or memorisation; give one, "
                "or leave them out."
            )

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set."""
        return {name: getattr(self, name) for name in GATES if getattr(self, name) is not None}

    @property
    def draws(self) -> bool:
        """Whether pictures must be drawn to judge by these."""
        return any(name != "retention_loss" for name in self.limits)


@dataclass
class Recipe:
    """A training run.

    Args:
        method: lora (an adapter of any kind), full (all weights of the denoiser), or controlnet (the denoiser stays as
            it is).
        model: the pretrained model.
        data: the pictures to tune on.
        tuning: the objective.
        bank: the pretrained model's own samples.
        adapter: what is trained with method lora, or of a ControlNet.
        control: what a ControlNet is taught.
        training: the loop.
        output: folder of the results.
        gates: limits that the finished run is judged by.
    """

    method: Literal["lora", "full", "controlnet"] = "lora"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    output: str = "runs/difftuning"
    gates: GatesConfig = field(default_factory=GatesConfig)

    def __post_init__(self) -> None:
        if self.method == "full" and self.adapter != AdapterConfig():
            raise UserError("adapter settings are given, but method full trains no adapter; leave them out.")
        self._check_quantization()
        if self.adapter.text_encoder and self.model.offload:
            raise UserError(
                "adapter.text_encoder trains the text encoder in every step, and model.offload keeps it in main "
                "memory; leave one of them out."
            )
        if self.training.shard:
            self._check_shard()
        if self.data.stream:
            self._check_stream()
        self._check_control()
        self._check_gates()

    def _check_stream(self) -> None:
        """What must know all pictures before the first step."""
        needs = {
            "method controlnet": self.method == "controlnet",
            "data.limit": self.data.limit is not None,
            "data.classes": self.data.classes is not None,
            "data.buckets": self.data.buckets,
            "tuning.label_space new": self.tuning.label_space == "new",
            "tuning.schedule.kind auto": self.tuning.schedule.kind == "auto",
            "model.offload": self.model.offload,
        }
        if (name := next((n for n, given in needs.items() if given), None)) is not None:
            raise UserError(
                f"data.stream is true and {name} is given, for which all pictures must be encoded before training; "
                "leave one of them out."
            )

    def _check_shard(self) -> None:
        """What cannot be spread over processes."""
        training = self.training
        if self.method != "full":
            raise UserError(
                f"training.shard spreads all weights of a denoiser that trains, and method is {self.method}, whose "
                "weights that train are few; leave it out."
            )
        if training.optimizer != "adamw" or training.mixed_precision == "fp16":
            given = "mixed_precision fp16" if training.optimizer == "adamw" else f"optimizer {training.optimizer}"
            raise UserError(
                f"training.shard is true and training.{given}, which does not know sharded weights; use adamw, and "
                "bf16 or no."
            )
        if self.data.buckets and self.uses_bank:
            raise UserError(
                "training.shard is true and data.buckets, where bank rows take a forward of their own that some "
                "processes lack, while sharded weights are gathered in every forward by all; leave one of them out."
            )

    def _check_quantization(self) -> None:
        """What a quantised base cannot do."""
        kind = self.model.quantization
        if kind is None:
            return
        if self.method == "full":
            raise UserError(
                f"model.quantization {kind} is for weights that do not train, and method full trains them all."
            )
        if self.method == "lora" and (self.adapter.kind not in ("lora", "tlora") or self.adapter.init == "pissa"):
            init = " with init pissa" if self.adapter.init == "pissa" else ""
            raise UserError(
                f"model.quantization is {kind} and adapter.kind {self.adapter.kind}{init}, which do not go together; "
                "use lora or tlora, or leave model.quantization out."
            )

    def _check_control(self) -> None:
        """What belongs to ControlNets, and to them only."""
        control, training = self.control, self.training
        if self.method != "controlnet":
            if control != ControlConfig() or self.adapter.on == "controlnet" or training.stop_when is not None:
                raise UserError(
                    f"control, adapter.on controlnet or training.stop_when is given, but method is {self.method}; say "
                    "--method controlnet, or leave them out."
                )
            return
        if self.adapter != AdapterConfig() and self.adapter.on == "denoiser":
            raise UserError(
                "adapter settings are given for the denoiser, which method controlnet leaves as it is; say adapter.on: "
                "controlnet, or leave them out to train the whole ControlNet."
            )
        if self.tuning.forgetting_budget is not None:
            raise UserError(
                "a forgetting budget bounds what the denoiser forgets, and beside a ControlNet it stays as it is; "
                "leave out tuning.forgetting_budget."
            )
        if training.sample_prompts:
            raise UserError("a ControlNet's sample grids show held-out pictures; leave out training.sample_prompts.")
        if training.stop_when is not None and control.fidelity.every == 0:
            raise UserError("training.stop_when needs a fidelity curve; set control.fidelity.every above 0.")
        if control.annotator == "supplied" and control.bank_condition == "own" and (self.uses_bank or self.bank.path):
            raise UserError(
                "the bank's samples have no supplied condition of their own; say --control.bank_condition blank, or "
                "name an annotator that makes conditions."
            )
        if control.path is not None and (control.validation_path is None) != (self.data.validation_path is None):
            raise UserError("give data.validation_path and control.validation_path together, or neither.")

    def _check_gates(self) -> None:
        """Gates whose figure this recipe cannot give."""
        gates = self.gates
        if gates.fidelity is not None and self.method != "controlnet":
            raise UserError(f"gates.fidelity is for ControlNets, but method is {self.method}; leave it out.")
        if gates.retention_loss is not None and self.method == "controlnet":
            raise UserError(
                "gates.retention_loss limits what the denoiser forgets, and beside a ControlNet it stays as it is; "
                "leave it out."
            )
        if gates.limits and not self.uses_bank and self.bank.path is None:
            raise UserError(
                f"gates.{next(iter(gates.limits))} needs a knowledge bank, which stands for the old domain, and this "
                "recipe has none; raise tuning.retention_ratio and retention_weight, name a bank.path, or leave the "
                "gate out."
            )
        if gates.draws and self.data.holdout == 0 and self.data.validation_path is None:
            name = next(name for name in gates.limits if name != "retention_loss")
            raise UserError(
                f"gates.{name} is judged on held-out pictures, and there are none; raise data.holdout, name a "
                "data.validation_path, or leave the gate out."
            )
        least = 5 if gates.draws else 2
        if gates.limits and self.bank.path is None:
            _need(self.bank.size >= least, "bank.size", self.bank.size, f"at least {least} with these gates")

    @property
    def uses_bank(self) -> bool:
        return self.tuning.retention_ratio > 0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
