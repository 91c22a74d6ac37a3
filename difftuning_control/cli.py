"""`difftune <verb>`: from a recipe to a tuned model, and what was gained. A mistake is one sentence and exit code 2."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import math
import os
import re
import signal
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from difftuning_control import audit
from difftuning_control.bench.settings import Bench
from difftuning_control.domain_sampling import check_domain_scale
from difftuning_control.errors import GatesFailedError, NonFiniteLossError, UserError
from difftuning_control.export import ExportRequest
from difftuning_control.outside import is_text, read_text, without_secrets
from difftuning_control.recipe import MAX_SEED, ModelConfig, Recipe
from difftuning_control.run_list import RunsRequest
from difftuning_control.signals import Interrupted, watched
from difftuning_control.studies import AnalysisConfig, Evaluation, PilotConfig
from difftuning_control.verify import VerifyRequest
from difftuning_control.words import harmless

PROGRAM = "difftune"
T = typing.TypeVar("T")
DEEPEST, LARGEST = 32, 100_000  # levels and values of a recipe


@dataclass
class TrainCommand(Recipe):
    """Tune a model by a recipe. Without --config the flags alone suffice.

    Args:
        overwrite: replace an earlier run in the output folder.
    """

    overwrite: bool = False


@dataclass
class BankCommand(Recipe):
    """Draw ahead of training the knowledge bank that `train` with the same flags uses, at bank.path or in the cache."""


@dataclass
class SampleCommand:
    """Draw pictures with a trained model (--run) or a pretrained one (--model.id), seed by seed comparable.

    Args:
        run: folder of a finished run.
        model: the pretrained model (--model.id, --model.variant, --model.quantization, --model.offload); that of
            the run when --run is given.
        prompts: what to draw, as a list: '["red apple", "dog face"]'.
        control: a photo, from which the condition of a ControlNet (--run) is prepared as in training.
        control_ready: the picture given as --control is a condition already.
        compare: also draw the base's pictures and put both into one grid.
        output: folder of the pictures.
        steps: sampling steps.
        guidance_scale: classifier-free guidance.
        domain_guidance_scale: the run draws at this scale (above 1) with Domain Guidance instead, the base as before.
        resolution: side in pixels; the model's own when empty.
        seed: of the noise.
        overwrite: replace pictures in the output folder.
    """

    prompts: list[str] = field(default_factory=list)
    run: str | None = None
    model: ModelConfig | None = None
    control: str | None = None
    control_ready: bool = False
    compare: bool = False
    output: str = "runs/samples"
    steps: int = 25
    guidance_scale: float = 4.0
    domain_guidance_scale: float | None = None
    resolution: int | None = None
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
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
        run: a finished run, instead of a recipe.
        analysis: what is measured.
        language: of the report.
        overwrite: replace an earlier analysis.
    """

    run: str | None = None
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)
    language: str = "en"
    overwrite: bool = False
    output: str = "runs/analysis"


@dataclass
class PilotCommand(Recipe):
    """Compare plain fine-tuning with Diff-Tuning on your data, and write a report.

    Args:
        pilot: what is compared.
        language: of the report.
        overwrite: replace an earlier pilot; without it the same command goes on where it was interrupted.
    """

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


@dataclass
class BenchCommand(Bench):
    """Time this trainer against diffusers' scripts, Diff-Tuning against plain tuning, and more, side by side.

    Args:
        overwrite: replace an earlier benchmark; its model and pictures are used again.
    """

    overwrite: bool = False


COMMANDS: dict[str, type] = {
    "train": TrainCommand, "bank": BankCommand, "sample": SampleCommand, "evaluate": EvaluateCommand,
    "export": ExportCommand, "analyze": AnalyzeCommand, "pilot": PilotCommand, "demo": DemoCommand,
    "verify": VerifyRequest, "runs": RunsRequest, "bench": BenchCommand,
}  # fmt: skip
POSITIONAL = {"export": "run", "verify": "run", "runs": "folder"}  # what a word without a key is, at such a verb


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `difftune` command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    audit.COMMAND.set([PROGRAM, *arguments])
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import remarks on packages that are not needed here
    logging.setLogRecordFactory(_Record)
    with watched():
        try:
            _run(arguments)
        except UserError as error:
            sys.exit(_fail(error, str(error), 2))
        except NonFiniteLossError as error:
            sys.exit(_fail(error, str(error), 3))
        except GatesFailedError as error:
            sys.exit(_fail(error, str(error), 4))
        except OSError as error:  # no space, no permission, a file where a folder should be
            place, reason = error.filename or "a file", error.strerror or error
            said = f"{place} cannot be read or written ({reason}); mend that, or choose another place."
            sys.exit(_fail(error, said, 2))
        except KeyboardInterrupt as error:
            found = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
            again = "go on with --training.resume true" if arguments[:1] == ["train"] else "run the same command again"
            sys.exit(_fail(error, f"{found.describe()}; {again}.", found.code))


def _run(arguments: list[str]) -> None:
    verb, command = parse(arguments)
    if verb not in ("train", "bank") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{verb} runs in one process; start it without torchrun or accelerate launch.")
    RUNNERS[verb](command)


def _fail(error: BaseException | None, message: str, code: int) -> int:
    """Say it once: of the processes of a machine the first, before they know each other, then the first that failed."""
    if os.environ.get("LOCAL_RANK", "0") == "0" or getattr(error, "speaks_for_all", False):
        print(f"{PROGRAM}: {harmless(without_secrets(' '.join(message.split())))}", file=sys.stderr)
    return code


def say(text: str) -> None:
    """Print lines in which names and captions from outside cannot command the terminal."""
    print(_shown(text))


def _shown(text: str) -> str:
    return "\n".join(harmless(line) for line in without_secrets(text).split("\n"))


class _Record(logging.LogRecord):
    """What libraries log: addresses with a password in them, and prompts."""

    def getMessage(self) -> str:  # noqa: N802 as it is called there
        return _shown(super().getMessage())


def parse(arguments: list[str]) -> tuple[str, Any]:
    """The verb and its filled-in dataclass.

    Raises:
        UserError: for an unknown verb, key or value, naming the nearest valid one.
    """
    import jsonargparse

    known: dict[str, Any] = {}
    if not all(map(is_text, arguments)):
        raise UserError("the command has bytes that are no UTF-8 text; rename such files and folders.")
    if arguments and not arguments[0].startswith("-"):
        if arguments[0] not in COMMANDS:
            raise UserError(f"there is no verb {arguments[0]!r}{_nearest(arguments[0], COMMANDS)}")
        known = keys_of(COMMANDS[arguments[0]])
        arguments = _arrange(arguments, known)
    parser = jsonargparse.ArgumentParser(prog=PROGRAM, description=__doc__, exit_on_error=False)
    verbs = parser.add_subcommands(dest="verb", required=True)
    for name, command in COMMANDS.items():
        sub = jsonargparse.ArgumentParser(description=_first_line(command), exit_on_error=False)
        sub.add_argument("--config", action="config", help="a recipe in YAML; other flags override its values")
        sub.add_class_arguments(command, as_group=False)
        verbs.add_subcommand(name, sub, help=_first_line(command))
    if not arguments:
        parser.print_help()
        sys.exit(2)
    try:
        found = parser.parse_args(arguments)
        verb = found.verb
        values = parser.instantiate(found)[verb]
        settings = {f.name: values[f.name] for f in dataclasses.fields(COMMANDS[verb]) if f.name in values}
        return verb, COMMANDS[verb](**settings)
    except UserError:
        raise
    except RecursionError:
        raise UserError("a value of the command is nested too deeply; give a flat one.") from None
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise UserError(_one_sentence(str(error), known)) from None


def _first_line(command: type) -> str:
    return (command.__doc__ or "").strip().splitlines()[0]


def _section_of(hint: Any) -> type | None:
    """The dataclass that a key of this type holds, if it is a section."""
    return next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)  # type: ignore[return-value]


def keys_of(command: type, prefix: str = "") -> dict[str, Any]:
    """All dotted keys of a command, sections included, and their types."""
    found = {}
    hints = typing.get_type_hints(command)
    for entry in dataclasses.fields(command):
        hint = found[prefix + entry.name] = hints[entry.name]
        if (section := _section_of(hint)) is not None:
            found |= keys_of(section, f"{prefix}{entry.name}.")
    return found


def _arrange(arguments: list[str], known: dict[str, Any]) -> list[str]:
    """Check the keys, put --config first, so that flags override it from any place, and let a bare switch mean true."""
    recipes, flags, rest, word = [], [], arguments[1:], POSITIONAL.get(arguments[0])
    while rest:
        argument = rest.pop(0)
        key, equals, value = argument[2:].partition("=")
        if argument.startswith("--") and key not in known and key.replace("-", "_") in known:
            key = key.replace("-", "_")
            argument = f"--{key}{equals}{value}"
        bare = not equals and (not rest or rest[0].startswith("--"))
        if key in ("help", "print_config"):
            flags.append(argument)
        elif not argument.startswith("--"):
            flags.append(f"--{word}={argument}" if word is not None else argument)
        elif key == "config":
            value = value if equals or bare else rest.pop(0)
            recipes += [f"--config={value}", *_place_of_study(arguments[0], _check_recipe(value, known))]
        elif key not in known:
            raise UserError(f"there is no option --{key}{_nearest(key, known, '--')}")
        else:
            if _section_of(known[key]) is not None and not bare:
                _check_values({key: _from_yaml(value if equals else rest[0], f"--{key}")}, "", known, f"--{key}")
            flags.append(f"{argument}=true" if bare and known[key] is bool else argument)
            flags += [rest.pop(0)] if not equals and not bare else []
    if sum(flag.partition("=")[0] == f"--{word}" for flag in flags) > 1:
        raise UserError(f"{word} is given twice; give it once, as --{word} or without a key.")
    return [arguments[0], *recipes, *flags]


def _place_of_study(verb: str, recipe: dict[str, Any]) -> list[str]:
    """A study of a recipe that was written for training goes beside the training's output, not into it."""
    section = {"analyze": "analysis", "pilot": "pilot"}.get(verb)
    if section is None or section in recipe or "output" not in recipe:
        return []
    return [f"--output={recipe['output']}-{section}"]


def _check_recipe(path: str, known: dict[str, Any]) -> dict[str, Any]:
    """The values of a recipe file whose keys are all known."""
    try:
        text = read_text(path)
    except OSError:
        raise UserError(f"the recipe {path or '(no name given)'} cannot be read; name a YAML file.") from None
    except UnicodeDecodeError:
        raise UserError(f"the recipe {path} is not UTF-8 text; save it as UTF-8.") from None
    values = _from_yaml(text, f"the recipe {path}")
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise UserError(f"the recipe {path} holds {found}; expected keys and values.")
    _check_values(values, "", known, f"the recipe {path}")
    return values


def _from_yaml(text: str, where: str) -> Any:
    import yaml

    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise UserError(f"{where} is nested more than {DEEPEST} levels deep; give a flatter one.")
        values = yaml.safe_load(text)
        if _expanded(values, {}) > LARGEST:
            raise UserError(f"{where} has aliases (*) that stand for more than {LARGEST} values; write them out.")
        return values
    except UserError:
        raise
    except ValueError as error:  # a date or a number that there is not
        raise UserError(f"{where} has a value that cannot be read ({str(error).partition(';')[0]}).") from None
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where} is not valid YAML: {error.problem}{line}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}.") from None


def _expanded(value: Any, sizes: dict[int, float]) -> float:
    """How many values a YAML value has when its aliases are written out; infinite where it holds itself."""
    if not isinstance(value, (dict, list, set, tuple)):
        return 1
    if id(value) not in sizes:
        sizes[id(value)] = math.inf  # until it is known
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(_expanded(part, sizes) for part in parts)
    return sizes[id(value)]


def _is_clean(value: Any) -> bool:
    """Whether all texts in a value are Unicode without a NUL, which no path and no argument may have."""
    if isinstance(value, dict):
        return all(_is_clean(part) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_clean, value))
    return not isinstance(value, str) or ("\0" not in value and is_text(value))


def _check_values(part: dict[Any, Any], prefix: str, known: dict[str, Any], where: str) -> None:
    """Unknown keys, and sections or values left empty, which jsonargparse reports in its own terms or not at all."""
    for name, value in part.items():
        key = f"{prefix}{name}"
        if key not in known:
            raise UserError(f"{where} has an unknown key {key}{_nearest(key, known)}")
        is_section, optional = _section_of(known[key]) is not None, type(None) in typing.get_args(known[key])
        if is_section and isinstance(value, dict):
            _check_values(value, f"{key}.", known, where)
        elif not (value is None and optional) and (is_section or value is None):
            found = "empty" if value is None else value
            raise UserError(f"{key} is {found} in {where}; expected {_expected(known[key])}.")
        elif not _is_clean(value):
            raise UserError(f"{key} has a NUL or half a character (a lone surrogate) in {where}; leave it out.")


def _nearest(key: str, known: typing.Iterable[str], mark: str = "") -> str:
    """The end of a sentence: the likeliest valid name, also where a right one stands in a wrong section."""
    known = sorted(known)
    section, _, name = key.rpartition(".")
    beside = {k.rpartition(".")[2]: k for k in known if section and k.rpartition(".")[0] == section}
    if close := difflib.get_close_matches(name, beside, 1, 0.85):
        return f"; did you mean {mark}{beside[close[0]]}?"
    leaf = [k.rsplit(".", 1)[-1] for k in known]
    same = difflib.get_close_matches(key.rsplit(".", 1)[-1], leaf, 1, 0.7)
    candidates = [k for k, name in zip(known, leaf) if name in same] or known
    close = candidates if same and "." not in key else difflib.get_close_matches(key, candidates, 1, 0 if same else 0.5)
    if close:
        return f"; did you mean {' or '.join(mark + k for k in close)}?"
    return f"; expected one of {', '.join(known[:12])}{', …' if len(known) > 12 else ''}."


def _expected(hint: Any) -> str:
    """A key's type in a user's words."""
    if (section := _section_of(hint)) is not None:
        return f"a section with {', '.join(f.name for f in dataclasses.fields(section))}"
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is dict:
        return "a section of names and values"
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(json.dumps(p) for p in parts)}"
    if typing.get_origin(hint) is list:
        return f"a list: [{_expected(parts[0])}, …]"
    if parts:
        return " or ".join("null" if part is type(None) else _expected(part) for part in parts)
    return {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}[hint]


def _one_sentence(message: str, known: dict[str, Any]) -> str:
    """jsonargparse's several lines in one; where they name a key and its value, in the words of this program."""
    text = " ".join(message.split())
    found = re.search(r'key "([\w.]+)".* value: ?(.*)', text)
    if found is not None and found[1] in known:
        return f"{found[1]} is {found[2].rstrip('.') or 'empty'}; expected {_expected(known[found[1]])}."
    return text.replace("Parser key", "key") + ("" if text.endswith(".") else ".")


def only(kind: type[T], command: T) -> T:
    """What a command takes of the dataclass that it extends, as that dataclass."""
    return kind(**{f.name: getattr(command, f.name) for f in dataclasses.fields(kind)})  # type: ignore[arg-type]


def run_train(command: TrainCommand) -> None:
    from accelerate import PartialState

    from difftuning_control.gates import stop_if_failed
    from difftuning_control.trainer import train

    run = train(only(Recipe, command), command.overwrite)
    if not PartialState().is_main_process:
        return
    say(f"done: {command.output} ({run['status']})")
    for role, losses in run["losses"].items():
        base, tuned = (sum(losses[w]["loss"]) / len(losses[w]["loss"]) for w in ("base", "tuned"))
        say(f"  validation loss on {role}: base {base:.4f}, tuned {tuned:.4f}")
    _print_control(run)
    _print_gates(run.get("gates"))
    stop_if_failed(run.get("gates"), command.output)


def _print_gates(judged: dict[str, Any] | None) -> None:
    if judged is not None:
        from difftuning_control.gates import gate_lines

        for name, line in gate_lines(judged).items():
            say(f"  gate {'passed' if judged['figures'][name]['passed'] else 'FAILED'}: {line}")


def _print_control(run: dict[str, Any]) -> None:
    """How well a ControlNet follows its conditions, and on which pictures nothing was found."""
    if run.get("control") is None:
        return
    blank = run["control"]["blank"]
    if blank:
        names = ", ".join(blank[:5]) + (", …" if len(blank) > 5 else "")
        say(f"note: the annotator found nothing on {len(blank)} of {run['data']['pictures']} pictures: {names}")
    curve = run.get("fidelity")
    if curve is None:
        return
    name, found = curve["main"], curve["convergence"]
    said = "no convergence that can be told from noise"
    if found is not None:
        way = "suddenly" if found["sudden"] else "gradually"
        said = f"converged {way} at step {found['step']:.0f} (from {found['start']:.0f} to {found['end']:.0f})"
    say(
        f"  fidelity on held-out conditions ({curve['kind']}, {name}): without control {curve['without'][name]:.3f}, "
        f"after {curve['steps'][-1]} steps {curve['figures'][name][-1]:.3f}; {said}"
    )
    say(f"  report: {run['recipe']['output']}/report.html")


def run_bank(command: BankCommand) -> None:
    from difftuning_control.fingerprint import digest_of_file
    from difftuning_control.inputs import (
        cache_folder,
        check_captions,
        prepare_bank,
        read_data,
        read_stream,
        resolution_of,
    )
    from difftuning_control.processes import check_shared, ending_together
    from difftuning_control.trainer import load_base, make_accelerator

    accelerator = make_accelerator(command)
    with ending_together(accelerator):
        check_shared(accelerator, cache_folder(command.data), "data.cache")
        family = load_base(command).to(accelerator.device)
        if command.data.stream:
            captions = read_stream(command, family)[0].captions(command.bank.size)
        else:
            data, held_out = read_data(command)
            check_captions(family, command, data, held_out)
            captions = [e.caption for e in data.examples]
        resolution = resolution_of(family, command.data)
        bank = prepare_bank(family, command.bank, command.data, captions, resolution, accelerator)
    if accelerator.is_main_process:
        if bank.folder is not None:
            with audit.noted(bank.folder) as artefacts:
                artefacts["manifest.json"] = digest_of_file(bank.folder / "manifest.json")
        say(f"done: {bank.folder or command.bank.path} holds {len(bank)} samples of {command.model.id}")
    accelerator.end_training()


def run_sample(command: SampleCommand) -> None:
    from difftuning_control.fingerprint import digest_of_file
    from difftuning_control.sampling import sample_to_folder

    with audit.noted(*filter(None, [command.run])) as artefacts:
        done = sample_to_folder(**dataclasses.asdict(command))
        artefacts["samples.json"] = digest_of_file(Path(command.output) / "samples.json")
    say(f"done: {done}")


def run_evaluate(command: EvaluateCommand) -> None:
    from difftuning_control.evaluation.compare import evaluate, table
    from difftuning_control.fingerprint import digest_of_file
    from difftuning_control.gates import stop_if_failed
    from difftuning_control.provenance import check_folder

    check_folder(command.output, "evaluation.json", command.overwrite)
    with audit.noted(*command.runs) as artefacts:
        result = evaluate(only(Evaluation, command))
        artefacts["evaluation.json"] = digest_of_file(Path(command.output) / "evaluation.json")
    say(table(result))
    for warning in result["warnings"]:
        say(f"note: {warning}")
    say(f"done: {command.output}/evaluation.json, grid.png")
    for side in result["sides"]:
        _print_gates(side.get("gates"))
    for side in result["sides"]:
        stop_if_failed(side.get("gates"), side["name"])


def run_export(command: ExportCommand) -> None:
    from difftuning_control.export import MARKER, export
    from difftuning_control.fingerprint import digest_of_file

    with audit.noted(command.run) as artefacts:
        folder = export(only(ExportRequest, command), command.overwrite)
        artefacts[MARKER] = digest_of_file(folder / MARKER)
    say(f"done: {folder}/README.md says how it is used")
    if command.push is not None:
        say(f"uploaded: https://huggingface.co/{command.push}")


def run_analyze(command: AnalyzeCommand) -> None:
    from difftuning_control.analysis import analyze, write_analysis
    from difftuning_control.fingerprint import digest_of_file
    from difftuning_control.provenance import check_folder
    from difftuning_control.words import load_words

    recipe = only(Recipe, command)
    if command.run is not None and dataclasses.replace(recipe, output="") != Recipe(output=""):
        raise UserError("give --run or a recipe, not both; a run knows its model, data and bank.")
    check_folder(command.output, "analysis.json", command.overwrite)
    load_words(command.language)
    with audit.noted(command.run or command.output) as artefacts:
        result = analyze(recipe, command.analysis, command.run)
        report = write_analysis(result, Path(command.output), command.language)
        artefacts["analysis.json"] = digest_of_file(Path(command.output) / "analysis.json")
    say(f"  {'u':>5}{'target':>10}{'bank':>10}{'gap':>8}{'psi':>7}{'xi':>7}")
    columns = (result["u"], result["target"]["loss"], result["bank"]["loss"], result["gap"]["mean"],
               result["schedule"]["psi"], result["schedule"]["xi"])  # fmt: skip
    for u, target, bank, gap, psi, xi in zip(*columns):
        say(f"  {u:>5.2f}{target:>10.4f}{bank:>10.4f}{gap:>8.0%}{psi:>7.2f}{xi:>7.2f}")
    if result["forgetting"] is not None:
        rises = zip(result["forgetting"]["u"], result["forgetting"]["mean"])
        say("  forgotten on the bank: " + ", ".join(f"{rise:+.1%} at u {u:.1f}" for u, rise in rises))
    say(f"done: {report} ({', '.join(result['advice'])})")


def run_pilot(command: PilotCommand) -> None:
    from difftuning_control.pilot import pilot
    from difftuning_control.words import load_words

    load_words(command.language)  # a language that is not there is said before the work, not after it
    pilot(only(Recipe, command), command.pilot, command.language, command.overwrite)


def run_demo(command: DemoCommand) -> None:
    from difftuning_control.demo import demo
    from difftuning_control.words import load_words

    load_words(command.language)
    if command.steps < 1:
        raise UserError(f"steps is {command.steps}; expected at least 1.")
    if not 0 <= command.seed <= MAX_SEED - 2:
        raise UserError(f"seed is {command.seed}; expected 0 to {MAX_SEED - 2}.")
    demo(Path(command.output), command.steps, command.seed, command.language, command.overwrite)


def run_verify(command: VerifyRequest) -> None:
    from difftuning_control.verify import table, verify

    result = verify(command)
    say(json.dumps(result, indent=2) if command.json else table(result))
    if result["status"] == "changed":
        differing = ", ".join(p["part"] for p in result["parts"] if p["findings"]) or "nothing that could be checked"
        unchecked = f"; not checked: {', '.join(result['unchecked'])}" if result["unchecked"] else ""
        sys.exit(_fail(None, f"{command.run} is not what it was ({differing}){unchecked}.", 1))


def run_runs(command: RunsRequest) -> None:
    from difftuning_control.run_list import as_csv, as_json, list_runs, print_table

    rows = list_runs(command.folder)
    if command.json or command.csv:
        sys.stdout.write(as_json(rows) + "\n" if command.json else as_csv(rows))  # made harmless in their own ways
    else:
        print_table(rows)


def run_bench(command: BenchCommand) -> None:
    from difftuning_control.bench.run import bench

    bench(only(Bench, command), command.overwrite)
    say(f"done: {command.output}/bench.json")


RUNNERS: dict[str, typing.Callable[[Any], None]] = {
    "train": run_train, "bank": run_bank, "sample": run_sample, "evaluate": run_evaluate, "export": run_export,
    "analyze": run_analyze, "pilot": run_pilot, "demo": run_demo, "verify": run_verify, "runs": run_runs,
    "bench": run_bench,
}  # fmt: skip

if __name__ == "__main__":
    main()
