"""What each verb of `difftune` takes: a dataclass, whose docstring is its help."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Literal

from difftuning_control.errors import UserError
from difftuning_control.recipe.inputs import DataConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.requests import ExportRequest, Moved, RunsRequest, SampleRequest, VerifyRequest
from difftuning_control.recipe.studies import AnalysisConfig, Evaluation, PilotConfig
from difftuning_control.system.home import expand_paths
from difftuning_control.verbs.bench.settings import Bench
from difftuning_control.verbs.ui.settings import UiSettings

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
    """Go on with a run that broke off, or make a finished one longer: difftune resume RUN --steps 400.

    Args:
        run: folder of the run, which has its recipe; length, learning rate and its schedule, and how often it saves,
            samples and validates may change; of inputs that were moved the new place is given (--data.path).
    """

    run: str = ""


@dataclass
class BankCommand(Recipe):
    """Draw ahead of training the knowledge bank that `train` with the same flags uses, at bank.path or in the cache."""

    data: DataConfig = field(default_factory=_unnamed)


@dataclass
class SampleCommand(SampleRequest):
    """Draw pictures with a trained model (RUN) or a pretrained one (--model ID), seed by seed comparable.

    Args:
        overwrite: replace pictures in the output folder; without it a second command draws into output-2, and so on.
    """

    overwrite: bool = False


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
    """Fine-tuning without and with retention on a far and a near style, on the embedded model, with a report.

    Args:
        output: folder of the demo.
        steps: optimizer steps of each run.
        seed: the first of three.
        language: of the report.
        overwrite: replace an earlier demo.
    """

    output: str = "runs/demo"
    steps: int = 40
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
class CompletionCommand:
    """Print what makes a shell complete verbs and options: eval "$(difftune completion bash)".

    Args:
        shell: bash, zsh or fish.
    """

    shell: Literal["bash", "zsh", "fish"]


@dataclass
class RecipesCommand:
    """List the recipes that come with the package, or print one: difftune recipes sd15_lora > mine.yaml.

    Args:
        name: of the one that is printed; all are listed when empty.
    """

    name: str | None = None


@dataclass
class UiCommand(UiSettings):
    """Pictures, training, comparing and runs on a local page in the browser: difftune ui [FOLDER]."""


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
    "ui": UiCommand,
    "bench": BenchCommand,
    "completion": CompletionCommand,
}


NAMED = ("train", "bank", "pilot")  # verbs that take the pictures as a word


def check_named(verb: str, command: typing.Any) -> None:
    """Refuse a verb that reads data and was told of none.

    Raises:
        UserError: naming the option.
    """
    if not isinstance(command, (TrainCommand, BankCommand, AnalyzeCommand, PilotCommand)) or command.data.path:
        return
    if isinstance(command, AnalyzeCommand) and command.run is not None:
        return
    named = "the folder: difftune " + verb + " PICTURES" if verb in NAMED else "--data.path FOLDER"
    said = f"{verb} is told of no data; give {named} (embedded/icons to try it), or a recipe that names data"
    if command.training.resume:
        said += f"; to go on with the run in {command.output}: difftune resume {command.output}"
    raise UserError(f"{said}.")


def only(kind: type[T], command: T) -> T:
    """What a command takes of the dataclass that it extends, as that dataclass."""
    made = kind(**{f.name: getattr(command, f.name) for f in dataclasses.fields(kind)})  # type: ignore[arg-type]
    if isinstance(made, Recipe) and isinstance(command, Recipe):
        made.left_open = command.left_open
    return made
