"""What each verb of `difftune` takes: a dataclass, whose docstring is its help."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field

from difftuning_control.errors import UserError
from difftuning_control.recipe.inputs import MAX_SEED, DataConfig, ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.requests import ExportRequest, Moved, RunsRequest, VerifyRequest
from difftuning_control.recipe.studies import AnalysisConfig, Evaluation, PilotConfig, check_domain_scale
from difftuning_control.system.home import expand_paths
from difftuning_control.verbs.bench.settings import Bench

T = typing.TypeVar("T")


def _unnamed() -> DataConfig:
    """Data that the user has yet to name."""
    return DataConfig(path="")


@dataclass
class TrainCommand(Recipe):
    """Tune a model by a recipe (--config), by flags alone, or from the weights of another run (--from RUN).

    Args:
        overwrite: replace an earlier run in the output folder.
    """

    data: DataConfig = field(default_factory=_unnamed)
    overwrite: bool = False


@dataclass
class ResumeCommand(Recipe):
    """Go on with a run that broke off, or make a finished one longer: difftune resume RUN --training.max_steps 400.

    Args:
        run: folder of the run, which has its recipe. Length, learning rate and its schedule, and how often it saves,
            samples and validates may change; of inputs that were moved the new place is given (--data.path).
    """

    run: str = ""


@dataclass
class BankCommand(Recipe):
    """Draw ahead of training the knowledge bank that `train` with the same flags uses, at bank.path or in the cache."""

    data: DataConfig = field(default_factory=_unnamed)


@dataclass
class SampleCommand:
    """Draw pictures with a trained model (--run) or a pretrained one (--model.id), seed by seed comparable.

    Args:
        run: folder of a finished run, or RUN/step-000010 that its training.save_at kept.
        model: the pretrained model (--model.id, --model.variant, --model.quantization, --model.offload); that of
            the run when --run is given.
        prompts: what to draw, as a list: '["red apple", "dog face"]'.
        control: a photo, from which the condition of a ControlNet (--run) is prepared as in training.
        control_ready: the picture given as --control is a condition already.
        compare: also draw the base's pictures and put both into one grid.
        kept: with --compare, also draw with the weights of every step that training.save_at kept.
        output: folder of the pictures.
        steps: sampling steps.
        guidance_scale: classifier-free guidance.
        domain_guidance_scale: the run draws at this scale (1 or more) with Domain Guidance instead, the base as before.
        resolution: side in pixels; the model's own when empty.
        seed: of the noise.
        overwrite: replace pictures in the output folder.
        moved: where the run's inputs lie now, if they were moved.
    """

    prompts: list[str] = field(default_factory=list)
    run: str | None = None
    model: ModelConfig | None = None
    control: str | None = None
    control_ready: bool = False
    compare: bool = False
    kept: bool = False
    output: str = "runs/samples"
    steps: int = 25
    guidance_scale: float = 4.0
    domain_guidance_scale: float | None = None
    resolution: int | None = None
    seed: int = 0
    overwrite: bool = False
    moved: Moved = field(default_factory=Moved)

    def __post_init__(self) -> None:
        expand_paths(self, "run", "control", "output")
        if not self.prompts:
            raise UserError("there is no prompt; give --prompts '[\"red apple\"]'.")
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}; expected at least 1.")
        if not 0 <= self.guidance_scale < math.inf:
            raise UserError(f"guidance_scale is {self.guidance_scale}; expected at least 0.")
        check_domain_scale(self.domain_guidance_scale)
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
class EvaluateCommand(Evaluation):
    """Judge finished runs and their base on the same prompts, seeds, steps and guidance.

    Args:
        overwrite: replace an earlier evaluation.
    """

    overwrite: bool = False


@dataclass
class ExportCommand(ExportRequest):
    """Write a finished run as a diffusers directory, or as a LoRA for kohya or ComfyUI: difftune export RUN --to DIR.

    Args:
        overwrite: replace an earlier export.
    """

    overwrite: bool = False


@dataclass
class AnalyzeCommand(Recipe):
    """Measure where along the noise a model must learn, which schedule follows, and (--run) what a run forgot.

    Args:
        run: a finished run, or RUN/step-000010 that it kept, instead of a recipe.
        analysis: what is measured.
        language: of the report.
        overwrite: replace an earlier analysis.
        moved: where the run's inputs lie now, if they were moved.
    """

    data: DataConfig = field(default_factory=_unnamed)
    run: str | None = None
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)
    language: str = "en"
    overwrite: bool = False
    output: str = "runs/analysis"
    moved: Moved = field(default_factory=Moved)

    def __post_init__(self) -> None:
        super().__post_init__()
        expand_paths(self, "run")


@dataclass
class PilotCommand(Recipe):
    """Compare plain fine-tuning with Diff-Tuning on your data, and write a report.

    Args:
        pilot: what is compared.
        language: of the report.
        overwrite: replace an earlier pilot; without it the same command goes on where it was interrupted.
    """

    data: DataConfig = field(default_factory=_unnamed)
    pilot: PilotConfig = field(default_factory=PilotConfig)
    language: str = "en"
    overwrite: bool = False
    output: str = "runs/pilot"


@dataclass
class DemoCommand:
    """Plain fine-tuning and Diff-Tuning side by side on the embedded model, with a report.

    Args:
        output: folder of the demo.
        steps: optimizer steps of each run.
        seed: the first of three.
        language: of the report.
        overwrite: replace an earlier demo.
    """

    output: str = "runs/demo"
    steps: int = 120
    seed: int = 0
    language: str = "en"
    overwrite: bool = False

    def __post_init__(self) -> None:
        expand_paths(self, "output")


@dataclass
class BenchCommand(Bench):
    """Time this trainer against diffusers' scripts, Diff-Tuning against plain tuning, and more, side by side.

    Args:
        overwrite: replace an earlier benchmark; its model and pictures are used again.
    """

    overwrite: bool = False


@dataclass
class RecipesCommand:
    """List the recipes that come with the package, or print one: difftune recipes sd15_lora > mine.yaml.

    Args:
        name: of the one that is printed; all are listed when empty.
    """

    name: str | None = None


COMMANDS: dict[str, type] = {
    "train": TrainCommand,
    "resume": ResumeCommand,
    "bank": BankCommand,
    "sample": SampleCommand,
    "evaluate": EvaluateCommand,
    "export": ExportCommand,
    "analyze": AnalyzeCommand,
    "pilot": PilotCommand,
    "demo": DemoCommand,
    "verify": VerifyRequest,
    "runs": RunsRequest,
    "recipes": RecipesCommand,
    "bench": BenchCommand,
}
POSITIONAL = {
    "resume": "run",
    "export": "run",
    "verify": "run",
    "runs": "folder",
    "recipes": "name",
}  # what a word without a key is, at such a verb

ALIASES = {"train": {"from": "training.begin_from"}}


def check_named(verb: str, command: typing.Any) -> None:
    """Refuse a verb that reads data and was told of none.

    Raises:
        UserError: naming the option.
    """
    if not isinstance(command, (TrainCommand, BankCommand, AnalyzeCommand, PilotCommand)) or command.data.path:
        return
    if isinstance(command, AnalyzeCommand) and command.run is not None:
        return
    said = f"{verb} is told of no data; give --data.path FOLDER (embedded/icons to try it), or a recipe that names data"
    if command.training.resume:
        said += f"; to go on with the run in {command.output}: difftune resume {command.output}"
    raise UserError(f"{said}.")


def only(kind: type[T], command: T) -> T:
    """What a command takes of the dataclass that it extends, as that dataclass."""
    return kind(**{f.name: getattr(command, f.name) for f in dataclasses.fields(kind)})  # type: ignore[arg-type]
