"""What `sample`, `export`, `verify` and `runs` are asked for, apart from how they do it: reading a command is cheap."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from difftuning_control.errors import UserError
from difftuning_control.recipe.drawing import SamplerSettings, check_domain_scale, check_least
from difftuning_control.recipe.inputs import MAX_SEED, ModelConfig
from difftuning_control.system.home import expand_paths
from difftuning_control.system.text import harmless

if TYPE_CHECKING:
    import torch

REPO = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]{0,95}")
PARTS = ("record", "audit", "outputs", "base", "controlnet", "schedule", "begin", "data", "validation", "bank")


@dataclass(frozen=True)
class Moved:
    """Where the inputs of a run lie now, if they were moved since it was trained.

    Args:
        model: the base's directory.
        data: the pictures that were tuned on.
        validation: those of data.validation_path.
        masks: the folder of masks.
        bank: the knowledge bank.
        control: the folder of supplied conditions.
        control_validation: the folder of those of data.validation_path.
        controlnet: the ControlNet that training started from.
        schedule: the file of the measured schedule.
        begin: the run or LoRA that training began from.
    """

    model: str | None = None
    data: str | None = None
    validation: str | None = None
    masks: str | None = None
    bank: str | None = None
    control: str | None = None
    control_validation: str | None = None
    controlnet: str | None = None
    schedule: str | None = None
    begin: str | None = None


@dataclass
class SampleRequest(SamplerSettings):
    """What is drawn, by which model, and where to.

    Args:
        run: folder of a finished run, or RUN/step-000010 that its training.save_at kept.
        model: the pretrained model (--model.id, --model.variant, --model.quantization, --model.offload); that of
            the run when --run is given.
        prompts: what to draw; with a key as a list: '["red apple", "dog face"]'.
        control: a photo, from which the condition of a ControlNet (--run) is prepared as in training.
        control_ready: the picture given as --control is a condition already.
        compare: also draw the base's pictures and put both into one grid.
        kept: with --compare, also draw with the weights of every step that training.save_at kept.
        output: folder of the pictures.
        steps: sampling steps (when empty 25, or the few that the model was distilled to).
        domain_guidance_scale: the run draws at this scale (1 or more) with Domain Guidance instead, the base as before.
        unconditional_strength: in [0, 1], with domain_guidance_scale; of the adapter in the unconditional branch, 0 for
            the pretrained model and 1 for ordinary guidance.
        resolution: side in pixels; the model's own when empty.
        seed: of the noise.
        moved: where the run's inputs lie now, if they were moved.
    """

    usual_steps: ClassVar[int] = 25

    prompts: list[str] = field(default_factory=list)
    run: str | None = None
    model: ModelConfig | None = None
    control: str | None = None
    control_ready: bool = False
    compare: bool = False
    kept: bool = False
    output: str = "runs/samples"
    domain_guidance_scale: float | None = None
    unconditional_strength: float | None = None
    resolution: int | None = None
    seed: int = 0
    moved: Moved = field(default_factory=Moved)

    def __post_init__(self) -> None:
        expand_paths(self, "run", "control", "output")
        if not self.prompts:
            raise UserError('there is no prompt; give one: difftune sample RUN "red apple".')
        check_least("", self, {"steps": 1, "guidance_scale": 0})
        check_domain_scale(self.domain_guidance_scale, self.unconditional_strength)
        if self.domain_guidance_scale is not None and self.run is None:
            raise UserError(
                "a pretrained model alone has nothing to guide; give --run or omit --domain_guidance_scale."
            )
        if self.resolution is not None and self.resolution < 8:
            raise UserError(f"resolution is {self.resolution}; expected at least 8 pixels.")
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed is {self.seed}; expected 0 to {MAX_SEED}.")
        if self.run is not None and self.model is not None:
            raise UserError("give --run or --model.id, not both; a run knows its model.")
        if self.compare and self.run is None:
            raise UserError("--compare needs --run: it sets a trained model beside its base.")
        if self.kept and not self.compare:
            raise UserError("--kept needs --compare: it sets the steps that a run kept beside its base.")
        if self.control is not None and self.run is None:
            raise UserError("--control needs --run: the folder of a trained ControlNet.")
        if self.control_ready and self.control is None:
            raise UserError("--control_ready is given without --control; name the picture of the condition.")


@dataclass
class ExportRequest:
    """What is exported, as what, and where to.

    Args:
        run: folder of a finished run, or RUN/step-000010 that its training.save_at kept.
        to: folder of the export.
        format: diffusers, or one LoRA file for kohya or comfyui.
        base: copied gives a whole pipeline directory; referenced only what was tuned, and which base it belongs to.
        adapter: separate keeps the LoRA in its own file; fused adds it to the weights.
        pipeline: difftuning lets diffusers find our class (with trust_remote_code); stock needs nothing of ours.
        source_unet: what goes along of the base of fully tuned weights, for Domain Guidance: none, the whole denoiser
            (of a transformer, as source_transformer), or its difference to the tuned one.
        dtype: float32, float16 or bfloat16, of what is written; as it lies when empty. Fused into a base in half
            precision a LoRA is rounded to it.
        evaluation: an evaluation.json of `difftune evaluate` that has this run; its figures go into the model card.
        push: repository on the Hub that the export is uploaded to (user/name); nothing is uploaded when empty.
        despite_gates: export a run that fails its gates, or was not judged by them; the card says so.
        moved: where the run's inputs lie now, if they were moved.
    """

    run: str
    to: str
    format: Literal["diffusers", "kohya", "comfyui"] = "diffusers"
    base: Literal["copied", "referenced"] = "copied"
    adapter: Literal["separate", "fused"] = "separate"
    pipeline: Literal["difftuning", "stock"] = "difftuning"
    source_unet: Literal["none", "whole", "difference"] = "none"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    evaluation: str | None = None
    push: str | None = None
    despite_gates: bool = False
    moved: Moved = field(default_factory=Moved)

    def __post_init__(self) -> None:
        expand_paths(self, "run", "to", "evaluation")
        chosen = {"base": "referenced", "adapter": "fused", "pipeline": "stock"}
        given = [f"--{name} {value}" for name, value in chosen.items() if getattr(self, name) == value]
        given += [f"--source_unet {self.source_unet}"] if self.source_unet != "none" else []
        if self.format != "diffusers" and given:
            raise UserError(f"--format {self.format} writes one LoRA file; leave out {' and '.join(given)}.")
        if self.adapter == "fused" and self.base == "referenced":
            raise UserError("--adapter fused changes the base's weights; it needs --base copied.")
        if self.source_unet != "none" and self.pipeline == "stock":
            raise UserError("stock pipelines have no use for a source UNet; it needs --pipeline difftuning.")
        if self.push is not None and not REPO.fullmatch(self.push):
            raise UserError(f"push is {self.push!r}; expected a repository on the Hub, such as user/name.")

    @property
    def torch_dtype(self) -> torch.dtype | None:
        import torch  # saves torch until a request is carried out

        return None if self.dtype is None else getattr(torch, self.dtype)


@dataclass(frozen=True)
class VerifyRequest:
    """Check that all that a run was made of, and all that it left, is still what it was: difftune verify RUN.

    Args:
        run: folder of a finished run, or of a finished pilot.
        head: a hash of the audit's chain that was kept elsewhere; the chain must still have it.
        skip: parts to leave out: base, controlnet, schedule, begin, data, validation, bank.
        strict: what cannot be checked, or is left out, counts as changed.
        json: print the result as JSON.
        moved: where the run's inputs lie now, if they were moved.
    """

    run: str
    head: str | None = None
    skip: list[str] = field(default_factory=list)
    strict: bool = False
    json: bool = False
    moved: Moved = field(default_factory=Moved)

    def __post_init__(self) -> None:
        expand_paths(self, "run")
        if self.head is not None and re.fullmatch(r"[0-9a-f]{64}", self.head) is None:
            raise UserError(f"head is {harmless(self.head)!r}; expected the 64 hexadecimal digits of a line's hash.")
        strange = [name for name in self.skip if name not in PARTS[3:]]
        if strange:
            raise UserError(f"skip names {harmless(strange[0])!r}; expected any of {', '.join(PARTS[3:])}.")


@dataclass(frozen=True)
class RunsRequest:
    """List the runs below a folder with their state, figures and gates: difftune runs DIR.

    Args:
        folder: runs are looked for in it and in all folders below.
        json: print a JSON array.
        csv: print CSV; cells that a spreadsheet would take for formulas begin with an apostrophe.
    """

    folder: str = "runs"
    json: bool = False
    csv: bool = False

    def __post_init__(self) -> None:
        expand_paths(self, "folder")
        if self.json and self.csv:
            raise UserError("give --json or --csv, not both.")
