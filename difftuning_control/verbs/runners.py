"""What each verb of `difftune` runs and prints; the work itself is imported when it is asked for."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from functools import partial
from pathlib import Path
from typing import Any

from difftuning_control.errors import ChangedError, UserError
from difftuning_control.recipe.inputs import MAX_SEED, DataConfig
from difftuning_control.recipe.measured_schedule import MeasuredSchedule
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.requests import ExportRequest, RunsRequest, VerifyRequest
from difftuning_control.recipe.studies import Evaluation
from difftuning_control.runs import audit
from difftuning_control.runs.gate_results import gates_of
from difftuning_control.runs.gates import stop_if_failed
from difftuning_control.runs.kept import place_of_run
from difftuning_control.runs.listing import as_csv, as_json, list_runs, print_table
from difftuning_control.system.digests import digest_of_file
from difftuning_control.system.terminal import say, showing_activities
from difftuning_control.verbs.bench.settings import Bench
from difftuning_control.verbs.commands import (
    AnalyzeCommand,
    BankCommand,
    BenchCommand,
    CompletionCommand,
    DemoCommand,
    EvaluateCommand,
    ExportCommand,
    PilotCommand,
    RecipesCommand,
    ResumeCommand,
    SampleCommand,
    TrainCommand,
    UiCommand,
    only,
)
from difftuning_control.verbs.resume import recipes_of_resumption
from difftuning_control.verbs.run_lines import print_gates, print_run
from difftuning_control.verbs.ui.settings import UiSettings


def run_train(command: TrainCommand) -> None:
    from difftuning_control.verbs.train import train  # saves torch for --help and for `runs`

    with showing_activities():
        result = train(only(Recipe, command), command.overwrite, say)
    print_run(result.record, command.output)


def run_resume(command: ResumeCommand) -> None:
    from difftuning_control.verbs.train import train  # saves torch for --help and for `runs`

    written, here = recipes_of_resumption(only(Recipe, command), command.run)
    with showing_activities():
        result = train(written, False, say, here)
    print_run(result.record, command.run)


def run_bank(asked: BankCommand) -> None:
    from difftuning_control.data.prepare import (  # saves torch for --help and for `runs`
        cache_folder,
        check_captions,
        prepare_bank,
        read_data,
        read_stream,
        resolution_of,
        silent,
    )
    from difftuning_control.families.fitting import fitted  # saves torch for --help and for `runs`
    from difftuning_control.families.loading import load_base
    from difftuning_control.runs.folder import data_places, refuse_among_data, written_places
    from difftuning_control.runs.identity import rows_of_step
    from difftuning_control.system.processes import check_shared, ending_together
    from difftuning_control.training.setup import make_accelerator

    command = fitted(only(Recipe, asked))  # of which a bank takes the precision alone
    if not command.uses_bank and command.bank.path is None:
        raise UserError(
            "training by this recipe reads no bank (tuning.retention_ratio is 0, or its teacher retains on the "
            "pictures); give --bank.path to draw one all the same."
        )
    for option, place in written_places(command).items():
        if option != "--output":  # which a bank does not use
            refuse_among_data(place, data_places(command), option)
    accelerator = make_accelerator(command)
    tell = say if accelerator.is_main_process else silent
    with ending_together(accelerator):
        check_shared(accelerator, cache_folder(command.data), "data.cache")
        family = load_base(command).to(accelerator.device)
        size = command.bank_size(rows_of_step(command, accelerator.num_processes))
        if command.data.stream:
            captions = read_stream(command, family, tell)[0].captions(size)
        else:
            data, held_out = read_data(command, tell)
            check_captions(family, command, data, held_out)
            captions = [e.caption for e in data.examples]
        resolution = resolution_of(family, command.data)
        bank = prepare_bank(family, command.bank, command.data, captions, resolution, accelerator, tell, size)
    if accelerator.is_main_process:
        if bank.folder is not None:
            with audit.noted(bank.folder) as artefacts:
                artefacts["manifest.json"] = digest_of_file(bank.folder / "manifest.json")
        say(f"done: {bank.folder or command.bank.path} holds {len(bank)} samples of {command.model.id}")
    accelerator.end_training()


def run_sample(command: SampleCommand) -> None:
    from difftuning_control.verbs.sample import RESULT, sample_to_folder  # saves torch for --help and for `runs`

    with audit.noted(*([place_of_run(command.run)[0]] if command.run else [])) as artefacts:
        folder = sample_to_folder(command, command.overwrite)
        artefacts[RESULT] = digest_of_file(folder / RESULT)
    count = len(command.prompts)
    say(f"done: {count} picture{'s' if count != 1 else ''} in {folder}")


def run_evaluate(command: EvaluateCommand) -> None:
    from difftuning_control.evaluation.report.tables import table  # saves torch for --help and for `runs`
    from difftuning_control.runs.finished import data_of_runs
    from difftuning_control.runs.folder import check_folder, refuse_among_data
    from difftuning_control.verbs.evaluate import evaluate

    refuse_among_data(command.output, [command.data, command.source, *data_of_runs(*command.runs, moved=command.moved)])
    check_folder(command.output, "evaluation.json", command.overwrite)
    with audit.noted(*dict.fromkeys(place_of_run(run)[0] for run in command.runs)) as artefacts:
        result = evaluate(only(Evaluation, command), say)
        artefacts["evaluation.json"] = digest_of_file(Path(command.output) / "evaluation.json")
    say(table(result))
    for warning in result["warnings"]:
        say(f"note: {warning}")
    say(f"done: {command.output}/evaluation.json, grid.png")
    judged = [(side["name"], gates_of(side)) for side in result["sides"]]
    for _, gates in judged:
        print_gates(gates)
    for name, gates in judged:
        stop_if_failed(gates, name)


def run_export(command: ExportCommand) -> None:
    from difftuning_control.verbs.export.export import MARKER, export  # saves torch for --help and for `runs`

    with audit.noted(place_of_run(command.run)[0]) as artefacts:

        def note(folder: Path) -> None:
            artefacts[MARKER] = digest_of_file(folder / MARKER)

        folder = export(only(ExportRequest, command), command.overwrite, note)
    say(f"done: {folder}/README.md says how it is used")
    if command.push is not None:
        say(f"uploaded: https://huggingface.co/{command.push}")


def run_analyze(command: AnalyzeCommand) -> None:
    from difftuning_control.evaluation.report.language import load_texts  # saves torch for --help and for `runs`
    from difftuning_control.families.fitting import fitted
    from difftuning_control.runs.finished import data_of_runs
    from difftuning_control.runs.folder import check_folder, data_places, refuse_among_data
    from difftuning_control.verbs.analyze import analyze, write_analysis

    recipe = only(Recipe, command)
    if command.run is not None and dataclasses.replace(recipe, output="") != Recipe(data=DataConfig(""), output=""):
        raise UserError("give --run or a recipe, not both; a run knows its model, data and bank.")
    refuse_among_data(
        command.output,
        data_of_runs(command.run, moved=command.moved) if command.run is not None else data_places(recipe),
    )
    check_folder(command.output, "analysis.json", command.overwrite)
    load_texts(command.language)
    with audit.noted(place_of_run(command.run)[0] if command.run else command.output) as artefacts:
        recipe = recipe if command.run is not None else fitted(recipe, say)
        result = analyze(recipe, command.analysis, command.run, command.moved, say)
        report = write_analysis(result, Path(command.output), command.language)
        artefacts["analysis.json"] = digest_of_file(Path(command.output) / "analysis.json")
    say(f"  {'u':>5}{'target':>10}{'bank':>10}{'gap':>8}{'psi':>7}{'xi':>7}")
    schedule = MeasuredSchedule.from_dict(result["schedule"])
    columns = (
        result["u"],
        result["target"]["loss"],
        result["bank"]["loss"],
        result["gap"]["mean"],
        schedule.psi,
        schedule.xi,
    )
    for u, target, bank, gap, psi, xi in zip(*columns):
        say(f"  {u:>5.2f}{target:>10.4f}{bank:>10.4f}{gap:>8.0%}{psi:>7.2f}{xi:>7.2f}")
    if result["forgetting"] is not None:
        rises = zip(result["forgetting"]["u"], result["forgetting"]["mean"])
        say("  forgotten on the bank: " + ", ".join(f"{rise:+.1%} at u {u:.1f}" for u, rise in rises))
    say(f"done: {report}" + (f" ({', '.join(result['advice'])})" if result["advice"] else ""))


def run_pilot(command: PilotCommand) -> None:
    from difftuning_control.evaluation.report.language import load_texts  # saves torch for --help and for `runs`
    from difftuning_control.families.fitting import fitted
    from difftuning_control.verbs.pilot.pilot import pilot

    load_texts(command.language)  # a language that is not there is said before the work, not after it
    pilot(fitted(only(Recipe, command), say), command.pilot, command.language, command.overwrite, say)


def run_demo(command: DemoCommand) -> None:
    from difftuning_control.evaluation.report.language import load_texts  # saves torch for --help and for `runs`
    from difftuning_control.verbs.demo import demo

    load_texts(command.language)
    if command.steps < 1:
        raise UserError(f"steps is {command.steps}; expected at least 1.")
    if not 0 <= command.seed <= MAX_SEED - 2:
        raise UserError(f"seed is {command.seed}; expected 0 to {MAX_SEED - 2}.")
    demo(Path(command.output), command.steps, command.seed, command.language, command.overwrite)


def run_verify(command: VerifyRequest) -> None:
    from difftuning_control.runs.verify import table, verify  # saves torch for --help and for `runs`

    result = verify(command)
    say(json.dumps(result, indent=2) if command.json else table(result))
    if result["status"] == "changed":
        differing = ", ".join(p["part"] for p in result["parts"] if p["findings"]) or "nothing that could be checked"
        unchecked = f"; not checked: {', '.join(result['unchecked'])}" if result["unchecked"] else ""
        raise ChangedError(f"{command.run} is not what it was ({differing}){unchecked}.")


def run_runs(command: RunsRequest) -> None:
    rows = list_runs(command.folder)
    if command.json or command.csv:
        sys.stdout.write(as_json(rows) + "\n" if command.json else as_csv(rows))  # made harmless in their own ways
    else:
        print_table(rows)


def run_recipes(command: RecipesCommand) -> None:
    from difftuning_control.verbs.recipes import recipes  # saves it for the other verbs

    recipes(command.name)


def run_ui(command: UiCommand) -> None:
    from difftuning_control.verbs.ui.run import serve  # saves the page for the other verbs

    serve(only(UiSettings, command), partial(print, flush=True))  # not `say`, which hides the token and the password


def run_bench(command: BenchCommand) -> None:
    from difftuning_control.verbs.bench.run import bench  # saves torch for --help and for `runs`

    bench(only(Bench, command), command.overwrite)
    say(f"done: {command.output}/bench.json")


def run_completion(command: CompletionCommand) -> None:
    from importlib.util import find_spec  # these save it for the other verbs

    from difftuning_control.verbs.parse import make_parser

    if find_spec("shtab") is None:
        raise UserError("completion needs shtab; run pip install 'difftuning-control[completion]'.")
    sys.stdout.write(make_parser("*").get_completion_script(f"shtab-{command.shell}").rstrip() + "\n")


RUNNERS: dict[str, typing.Callable[[Any], None]] = {
    "train": run_train,
    "resume": run_resume,
    "bank": run_bank,
    "sample": run_sample,
    "evaluate": run_evaluate,
    "export": run_export,
    "analyze": run_analyze,
    "pilot": run_pilot,
    "demo": run_demo,
    "verify": run_verify,
    "runs": run_runs,
    "recipes": run_recipes,
    "ui": run_ui,
    "bench": run_bench,
    "completion": run_completion,
}
