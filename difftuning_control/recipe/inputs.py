"""The sections of a recipe that say what goes in: model, data, bank, control."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from difftuning_control.errors import UserError, need
from difftuning_control.recipe.captioning import Captioning
from difftuning_control.recipe.masking import Masking
from difftuning_control.system.home import expand_paths
from difftuning_control.system.untrusted import MAX_PIXELS, MOST_PIXELS

MAX_SEED = 2**31 - 1
LEAST_SAMPLES, MOST_SAMPLES = 8, 32  # of a bank of size auto: more brought nothing, see docs/results.md
MOST_UNMEASURED = 256  # where that was not measured
MOST_AT_ONCE, PIXELS_AT_ONCE = 32, 2**21  # of samples: beyond that a GPU is no faster, and memory runs out
Solver = Literal["own", "dpmsolver++"]
Quantization = Literal["float8", "int8", "nf4"]
HELD_OUT = 5  # one in so many of a bank's samples only validation sees


def pictures_at_once(pixels: int) -> int:
    """How many pictures of so many pixels go through a model at once: at 1024 a side each takes gigabytes."""
    return max(1, PIXELS_AT_ONCE // pixels)


@dataclass
class ModelConfig:
    """The pretrained model.

    Args:
        id: `embedded` (the small model that the package carries), a diffusers directory, or a Hub id.
        variant: variant of the weights' files to load, such as fp16.
        quantization: keep the frozen weights of a transformer that is told prompts (no UNet, no DiT) in fewer bits and
            compute in training.mixed_precision: float8 (diffusers' layerwise casting), int8, or nf4 (4 bits); int8 and
            nf4 need bitsandbytes.
        offload: keep the text encoders in main memory; while prompts are encoded they take the denoiser's place on the
            GPU.
    """

    id: str = "embedded"
    variant: str | None = None
    quantization: Quantization | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        expand_paths(self, "id")


@dataclass
class DataConfig:
    """The pictures to tune on.

    Args:
        path: a folder, `embedded/icons`, `embedded/flat`, or a `datasets` data set by name or path.
        resolution: side of the square that pictures are cropped to; the model's own when empty. [pixels, ≥ 8]
        flip: also train on mirror images.
        crops: positions of the square along the longer side of pictures that are not square; 1 is the centre alone. [1
            to 64]
        holdout: share of the pictures that is kept for validation; only without validation_path. [share, ≥ 0 and < 1]
        validation_path: pictures to validate on, instead of a share of path.
        split: the split of path that is read, where it has several (of the files of a data set, or folders of pictures
            such as train and test), or all of them with `all`; train when empty.
        validation_split: the split of validation_path that is read; validation, else test, else train when empty.
        limit: use only the first so many pictures; all when empty. [pictures, ≥ 1]
        caption_column: column of the captions.
        image_column: column of the pictures, in a `datasets` data set.
        classes: take classes for captions: folders (the name of the sub-folder that a picture lies in), or label (the
            names or numbers in the column label, or in caption_column where that names another); captions as they are
            when empty.
        default_caption: caption of pictures that have none; such pictures are a mistake when empty.
        trigger: words for what is learnt (`zbx style`), put before captions that lack them and alone where there is
            none; `[trigger]` in a caption is where they stand, a bank for captions is drawn without them, and a LoRA
            whose recipe names nothing of what is retained retains general prompts under these, with λ = 0.3.
        masks: what of the pictures of path is learnt: alpha (what is opaque in them), or a folder with a mask named
            like each (what is white in it); all of them when empty. The loss on those that are held out has masks too.
        outside_mask: what the error counts where a mask is black, next to 1 where it is white. [≥ 0 and < 1]
        truncate_captions: cut captions that are longer than the text encoder takes, instead of stopping.
        skip_bad: leave out pictures that cannot be used, instead of stopping.
        buckets: frame each picture in the shape, of about the square's area, that crops least of it, and train on one
            shape a step; held-out pictures, samples and a bank of samples stay square.
        bucket_step: sides of the buckets are multiples of this; a sixteenth of the resolution when empty. [pixels, ≥ 8]
        bucket_aspect: no side of a bucket is longer than so many times the other. [> 1 and ≤ 8]
        stream: read path while training and keep no cache, for collections that fit no disk: a folder of WebDataset
            .tar shards, of Parquet files or with a metadata.jsonl, or a `datasets` data set. With a holdout the first
            training.validation_size pictures are held out; a bank takes the captions of as many rows as it has items.
        max_pixels: pictures with more are refused before they are decoded. [pixels, 1 to 178956970]
        cache: folder of the cached latents, embeddings and conditions; the user's cache folder when empty.
    """

    path: str = "embedded/icons"
    resolution: int | None = None
    flip: bool = False
    crops: int = 1
    holdout: float = 0.1
    validation_path: str | None = None
    split: str | None = None
    validation_split: str | None = None
    limit: int | None = None
    caption_column: str = "text"
    image_column: str = "image"
    classes: Literal["folders", "label"] | None = None
    default_caption: str | None = None
    trigger: str | None = None
    masks: str | None = None
    outside_mask: float = 0.1
    truncate_captions: bool = False
    skip_bad: bool = False
    buckets: bool = False
    bucket_step: int | None = None
    bucket_aspect: float = 2.0
    stream: bool = False
    max_pixels: int = MAX_PIXELS
    cache: str | None = None

    def __post_init__(self) -> None:
        expand_paths(self, "path", "validation_path", "masks", "cache")
        need(self.validation_path != "", "data.validation_path", "empty", "a folder or a data set, or null")
        need(self.cache != "", "data.cache", "empty", "a folder, or null")
        need(self.masks is None or self.masks.strip() != "", "data.masks", "empty", "alpha, a folder, or null")
        need(0 <= self.outside_mask < 1, "data.outside_mask", self.outside_mask, "at least 0 and less than 1")
        if self.masks is None and self.outside_mask != 0.1:
            raise UserError("data.outside_mask is given without data.masks; name the masks, or leave it out.")
        need(self.resolution is None or self.resolution >= 8, "data.resolution", self.resolution, "at least 8 pixels")
        need(
            self.bucket_step is None or self.bucket_step >= 8, "data.bucket_step", self.bucket_step, "at least 8 pixels"
        )
        need(1 < self.bucket_aspect <= 8, "data.bucket_aspect", self.bucket_aspect, "more than 1 and at most 8")
        if not self.buckets and (self.bucket_step is not None or self.bucket_aspect != 2.0):
            raise UserError(
                "data.bucket_step and data.bucket_aspect are for data.buckets true; give it, or leave them out."
            )
        need(1 <= self.crops <= 64, "data.crops", self.crops, "1 to 64")
        need(0 <= self.holdout < 1, "data.holdout", self.holdout, "at least 0 and less than 1")
        need(self.limit is None or self.limit >= 1, "data.limit", self.limit, "at least 1")
        need(1 <= self.max_pixels <= MOST_PIXELS, "data.max_pixels", self.max_pixels, f"1 to {MOST_PIXELS}")
        if self.validation_split is not None and self.validation_path is None:
            raise UserError("data.validation_split is given without data.validation_path; name the pictures.")
        if self.classes is not None and self.default_caption is not None:
            raise UserError(
                f"data.classes is {self.classes}, so every picture has its caption; leave out data.default_caption."
            )
        if self.trigger is not None:
            self.trigger = " ".join(self.trigger.split())
            need(self.trigger != "", "data.trigger", "empty", "a word or a few, or null")

    @property
    def captioning(self) -> Captioning:
        return Captioning(self.default_caption, self.trigger)

    @property
    def masking(self) -> Masking | None:
        return Masking(self.masks, self.outside_mask) if self.masks is not None else None


@dataclass
class BankConfig:
    """The knowledge bank.

    Args:
        size: number of samples, or auto: what the run will draw of them and a quarter more, which only validation sees,
            at least 8, and at most 32 with an adapter and 256 with other methods; of a bank that is there, what it
            holds. Of more prompts than samples auto takes some from all over, a number the first ones. [samples, ≥ 1]
        prompts: what samples are drawn for: captions (the data's), general (the package's 96), empty, or a text file
            with one a line; of a model that is told classes not general but also classes (all that it has), or both
            (its classes and the empty one by turns).
        guidance_scale: scale of classifier-free guidance while the samples are drawn; where none is named, a model that
            was distilled to few steps draws with none. [≥ 0]
        steps: sampling steps of a sample; where none are named, a model that was distilled draws in its few. [steps, ≥
            1]
        solver: what draws them: own is the model's own scheduler, dpmsolver++ DPM-Solver++, for models that predict
            noise or v.
        batch_size: samples drawn at once, or auto: as many as have two megapixels together, at most 32. The first step
            of a training waits for no more of them than it needs. [samples, ≥ 1]
        seed: seed of the noise that the samples are drawn from. [0 to 2147483647]
        path: folder where the bank lies or shall be built, or a folder of real source pictures; the cache when empty.
    """

    size: int | Literal["auto"] = "auto"
    prompts: str = "captions"
    guidance_scale: float = 1.5
    steps: int = 15
    solver: Solver = "own"
    batch_size: int | Literal["auto"] = "auto"
    seed: int = 0
    path: str | None = None

    def __post_init__(self) -> None:
        expand_paths(self, "path", "prompts")
        need(self.path != "", "bank.path", "empty", "a folder, or null")
        need(self.size == "auto" or self.size >= 1, "bank.size", self.size, "at least 1")
        need(self.steps >= 1, "bank.steps", self.steps, "at least 1")
        need(self.batch_size == "auto" or self.batch_size >= 1, "bank.batch_size", self.batch_size, "at least 1")
        need(0 <= self.seed <= MAX_SEED, "bank.seed", self.seed, f"0 to {MAX_SEED}")
        need(0 <= self.guidance_scale < math.inf, "bank.guidance_scale", self.guidance_scale, "at least 0")

    def batch_for(self, resolution: int) -> int:
        """How many samples of a side in pixels are drawn at once."""
        if self.batch_size != "auto":
            return self.batch_size
        return min(MOST_AT_ONCE, pictures_at_once(resolution**2))

    def size_for(self, draws: int, most: int = MOST_SAMPLES) -> int:
        """How many samples the bank of a run has that draws so many of them."""
        if self.size != "auto":
            return self.size
        held_out = -(-draws // (HELD_OUT - 1))
        return max(LEAST_SAMPLES, min(draws + held_out, most))


@dataclass
class FidelityConfig:
    """How well pictures follow their conditions while a ControlNet trains, on held-out pictures.

    Args:
        every: optimizer steps between measurements; 0 for none. [steps, ≥ 0]
        size: number of held-out conditions that are drawn. [conditions, ≥ 1]
        steps: sampling steps of a picture. [steps, ≥ 1]
        guidance_scale: scale of classifier-free guidance. [≥ 0]
    """

    every: int = 50
    size: int = 32
    steps: int = 12
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("size", 1), ("steps", 1)):
            need(getattr(self, name) >= least, f"control.fidelity.{name}", getattr(self, name), f"at least {least}")
        need(0 <= self.guidance_scale < math.inf, "control.fidelity.guidance_scale", self.guidance_scale, "at least 0")


@dataclass
class ControlConfig:
    """What a ControlNet is taught (method controlnet).

    Args:
        annotator: what makes conditions from pictures: a name of controlnet_aux, package.module:function, or supplied
            (pictures of yours, in path or column).
        params: parameters of the annotator, by name.
        weights: weights of the annotator, a directory or Hub id; its default place when empty.
        path: folder of supplied conditions, named like the pictures.
        validation_path: folder of the supplied conditions of data.validation_path.
        column: column of supplied conditions, instead of path.
        resize: filter for supplied conditions of another size.
        init: the ControlNet to start from, a directory or Hub id; a copy of the denoiser's encoder when empty.
        dropout: share of target rows that train with a blank (black) condition. [share, 0 to 1]
        bank_condition: condition of bank rows: own (made from the decoded bank samples) or blank.
        workers: threads that annotate; when empty one a CPU core, at most 8, or a single one for a network. [threads, 1
            to 256]
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
        expand_paths(self, "weights", "path", "validation_path", "init")
        for name in ("weights", "path", "validation_path", "init"):
            need(getattr(self, name) != "", f"control.{name}", "empty", "a path, or null")
        need(0 <= self.dropout <= 1, "control.dropout", self.dropout, "0 to 1")
        need(self.workers is None or 1 <= self.workers <= 256, "control.workers", self.workers, "1 to 256")
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
