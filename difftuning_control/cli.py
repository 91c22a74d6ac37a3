"""`difftune <verb>`: train, bank, sample, demo. A user's mistake is one sentence and exit code 2."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from difftuning_control.errors import NonFiniteLossError, UserError
from difftuning_control.recipe import BankConfig, DataConfig, ModelConfig, Recipe

PROGRAM = "difftune"


@dataclass
class TrainCommand(Recipe):
    """Tune a model by a recipe. Without --config the flags alone suffice.

    Args:
        overwrite: replace an earlier run in the output folder.
    """

    overwrite: bool = False


@dataclass
class BankCommand:
    """Draw the knowledge bank of a model ahead of training; a complete one is only checked.

    Args:
        model: the pretrained model.
        data: the pictures whose captions are the prompts.
        bank: what to draw.
        output: folder of the bank.
        seed: of the bank.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    output: str = "runs/bank"
    seed: int = 0


@dataclass
class SampleCommand:
    """Draw pictures with a trained model (--run) or a pretrained one (--model.id), seed by seed comparable.

    Args:
        run: folder of a finished run.
        model: the pretrained model; that of the run when --run is given.
        prompts: what to draw, as a list: '["red apple", "dog face"]'.
        compare: also draw the base's pictures and put both into one grid.
        output: folder of the pictures.
        steps: sampling steps.
        guidance_scale: classifier-free guidance.
        resolution: side in pixels; the model's own when empty.
        seed: of the noise.
        overwrite: replace pictures in the output folder.
    """

    prompts: list[str] = field(default_factory=list)
    run: str | None = None
    model: ModelConfig | None = None
    compare: bool = False
    output: str = "runs/samples"
    steps: int = 25
    guidance_scale: float = 4.0
    resolution: int | None = None
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserError("there is no prompt; give --prompts '[\"red apple\"]'.")
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}; expected at least 1.")
        if self.guidance_scale < 0:
            raise UserError(f"guidance_scale is {self.guidance_scale}; expected at least 0.")
        if self.run is not None and self.model is not None:
            raise UserError("give --run or --model.id, not both; a run knows its model.")
        if self.compare and self.run is None:
            raise UserError("--compare needs --run: it sets a trained model beside its base.")


@dataclass
class DemoCommand:
    """Plain fine-tuning and Diff-Tuning side by side on the embedded model.

    Args:
        output: folder of the demo.
        steps: optimizer steps of each side.
        overwrite: replace an earlier demo.
    """

    output: str = "runs/demo"
    steps: int = 240
    overwrite: bool = False


COMMANDS: dict[str, type] = {
    "train": TrainCommand, "bank": BankCommand, "sample": SampleCommand, "demo": DemoCommand,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `difftune` command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        verb, command = parse(arguments)
        RUNNERS[verb](command)
    except UserError as error:
        sys.exit(_fail(str(error), 2))
    except NonFiniteLossError as error:
        sys.exit(_fail(str(error), 3))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted; go on with --training.resume true.", 130))


def _fail(message: str, code: int) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return code


def parse(arguments: list[str]) -> tuple[str, Any]:
    """The verb and its filled-in dataclass.

    Raises:
        UserError: for an unknown verb, key or value, naming the nearest valid one.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(prog=PROGRAM, description=__doc__, exit_on_error=False)
    verbs = parser.add_subcommands(dest="verb", required=True)
    for name, command in COMMANDS.items():
        sub = jsonargparse.ArgumentParser(description=_first_line(command), exit_on_error=False)
        sub.add_argument("--config", action="config", help="a recipe in YAML; other flags go before its values")
        sub.add_class_arguments(command, as_group=False)
        verbs.add_subcommand(name, sub, help=_first_line(command))
    if not arguments:
        parser.print_help()
        sys.exit(2)
    if arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
        raise UserError(f"there is no verb {arguments[0]!r}{_nearest(arguments[0], COMMANDS)}.")
    _check_keys(arguments)
    try:
        found = parser.parse_args([_as_value(a) for a in arguments])
        verb = found.verb
        values = parser.instantiate_classes(found)[verb]
        settings = {f.name: values[f.name] for f in dataclasses.fields(COMMANDS[verb]) if f.name in values}
        return verb, COMMANDS[verb](**settings)
    except UserError:
        raise
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise UserError(_one_sentence(str(error))) from None


def _as_value(argument: str) -> str:
    """`--overwrite` and `--compare` alone mean true."""
    return f"{argument}=true" if argument in ("--overwrite", "--compare") else argument


def _first_line(command: type) -> str:
    return (command.__doc__ or "").strip().splitlines()[0]


def keys_of(command: type, prefix: str = "") -> list[str]:
    """All dotted keys of a command, sections included."""
    found = []
    hints = typing.get_type_hints(command)
    for entry in dataclasses.fields(command):
        hint = hints[entry.name]
        nested = next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)
        found.append(prefix + entry.name)
        if nested is not None:
            found += keys_of(typing.cast(type, nested), f"{prefix}{entry.name}.")
    return found


def _check_keys(arguments: list[str]) -> None:
    verb = arguments[0]
    if verb not in COMMANDS:
        return
    known = keys_of(COMMANDS[verb])
    for place, argument in enumerate(arguments[1:], start=1):
        if not argument.startswith("--"):
            continue
        key, _, value = argument[2:].partition("=")
        if key in ("config", "help", "print_config"):
            if key == "config":
                _check_config(value or (arguments[place + 1] if place + 1 < len(arguments) else ""), known)
            continue
        if key not in known:
            raise UserError(f"there is no option --{key}{_nearest(key, known, '--')}.")


def _check_config(path: str, known: list[str]) -> None:
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"the recipe {path or '(no name given)'} cannot be read; name a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the recipe {path} is not valid YAML: {' '.join(str(error).split())[:200]}.") from None
    if values is None:
        return
    if not isinstance(values, dict):
        raise UserError(f"the recipe {path} holds a {type(values).__name__}; expected keys and values.")

    def walk(part: dict[Any, Any], prefix: str) -> None:
        for name, value in part.items():
            key = f"{prefix}{name}"
            if key not in known:
                raise UserError(f"the recipe {path} has an unknown key {key}{_nearest(key, known)}.")
            if isinstance(value, dict):
                walk(value, f"{key}.")

    walk(values, "")


def _nearest(key: str, known: typing.Iterable[str], mark: str = "") -> str:
    known = list(known)
    close = difflib.get_close_matches(key, known, 1, 0.5)
    if not close:  # a right name in the wrong section
        close = [k for k in known if k.split(".")[-1] == key.split(".")[-1]][:1]
    return f"; did you mean {mark}{close[0]}?" if close else f"; expected one of {', '.join(sorted(known)[:12])}, …"


def _one_sentence(message: str) -> str:
    """jsonargparse's several lines in one; its first names the key, the others what is wrong."""
    text = " ".join(message.replace("Parser key", "key").split())
    return text.replace("typing.Literal", "one of ") + ("" if text.endswith(".") else ".")


def run_train(command: TrainCommand) -> None:
    from difftuning_control.trainer import train

    values = {f.name: getattr(command, f.name) for f in dataclasses.fields(Recipe)}
    run = train(Recipe(**values), command.overwrite)
    print(f"done: {command.output} ({run['status']})")
    for role, losses in run["losses"].items():
        base, tuned = (sum(losses[w]["loss"]) / len(losses[w]["loss"]) for w in ("base", "tuned"))
        print(f"  validation loss on {role}: base {base:.4f}, tuned {tuned:.4f}")


def run_bank(command: BankCommand) -> None:
    from difftuning_control.data import load_images
    from difftuning_control.families import load_family
    from difftuning_control.inputs import prepare_bank, resolution_of

    if command.bank.path is not None:
        raise UserError("bank.path is given; this command writes its bank to --output.")
    family = load_family(command.model.id, variant=command.model.variant)
    captions: list[str] = []
    if command.bank.prompts == "captions":
        data = command.data
        found = load_images(
            data.path, caption_column=data.caption_column, image_column=data.image_column,
            default_caption=data.default_caption, skip_bad=data.skip_bad,
        )  # fmt: skip
        captions = [e.caption for e in found.examples]
    config = dataclasses.replace(command.bank, path=command.output)
    bank = prepare_bank(family, config, command.data, captions, resolution_of(family, command.data), command.seed)
    print(f"done: {command.output} holds {len(bank)} samples of {command.model.id}")


def run_sample(command: SampleCommand) -> None:
    from difftuning_control.sampling import sample_to_folder

    print(f"done: {sample_to_folder(**dataclasses.asdict(command))}")


def run_demo(command: DemoCommand) -> None:
    from difftuning_control.demo import demo

    demo(Path(command.output), command.steps, command.overwrite)


RUNNERS: dict[str, typing.Callable[[Any], None]] = {
    "train": run_train, "bank": run_bank, "sample": run_sample, "demo": run_demo,
}  # fmt: skip

if __name__ == "__main__":
    main()
