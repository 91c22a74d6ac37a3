"""`difftune demo`: plain fine-tuning against a LoRA's default on a far and a near style, with the embedded model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from difftuning_control.errors import UserError
from difftuning_control.evaluation.band_losses import losses_of
from difftuning_control.evaluation.comparison import verdict
from difftuning_control.evaluation.drawing import save_grid
from difftuning_control.evaluation.pilot_figures import PilotPictures
from difftuning_control.families.hub import best_device
from difftuning_control.families.loading import embedded_model
from difftuning_control.recipe.inputs import BankConfig, DataConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import PilotConfig
from difftuning_control.recipe.training import TrainingConfig
from difftuning_control.runs.pilot_files import REPORT
from difftuning_control.runs.pilot_record import PilotRecord
from difftuning_control.system.durable import write_json
from difftuning_control.system.text import harmless
from difftuning_control.verbs.beside import beside
from difftuning_control.verbs.pilot.pilot import pilot

COMPARED = {"plain": "plain", "prior": "with retention"}  # the second as where a LoRA's recipe names no schedule
LABELS = {"truth": "true picture", "base": "base"} | COMPARED
TARGETS = {"icons": "far", "flat": "near"}  # sets that the package carries, as the base sees them
RATES = {"icons": 5e-3, "flat": 2.5e-3}  # a near style asks for less change
GRID, SUMMARY = "grid.png", "summary.json"


def demo_study(output: Path, target: str, steps: int, seed: int) -> tuple[Recipe, PilotConfig]:
    """The demo's recipe on a target, in which the sides differ in `tuning` alone, and what is compared."""
    recipe = Recipe(
        data=DataConfig(
            f"embedded/{target}",
            holdout=0.0,
            validation_path=f"embedded/{target}-eval",
            limit=8,
            cache=str(output / "cache"),
        ),
        bank=BankConfig(size=24, steps=10, batch_size=24),
        training=TrainingConfig(
            max_steps=steps,
            batch_size=10,
            learning_rate=RATES[target],
            lr_scheduler="constant",
            ema_decay=0.999,
            validation_size=8,
            checkpoint_every=max(steps, 1),
            seed=seed,
        ),
        output=str(output / target),
    )
    seeds = [seed, seed + 1, seed + 2]
    return recipe, PilotConfig(
        list(COMPARED),
        seeds=seeds,
        learning_rates=[recipe.training.learning_rate],
        pictures=16,
        steps=8,
        guidance_scale=3.0,
    )


def demo(output: Path, steps: int, seed: int, language: str, overwrite: bool) -> dict[str, PilotRecord]:
    """A pilot on each target in a folder of its own, a page and a grid of both, a table on the screen.

    Raises:
        UserError: if the output holds something else, or a demo with other settings without `overwrite`.
    """
    from difftuning_control.evaluation.report.demo import write_demo_report  # read at its end, after the pilots

    _refuse_foreign(output)
    begun = time.monotonic()
    records = _records(output, steps, seed, language, overwrite)
    save_grid(output / GRID, *_grid(output, records))
    write_demo_report(records, output, language)
    targets = {name: {"verdict": verdict(r), "table": loss_table(r)} for name, r in records.items()}
    write_json(output / SUMMARY, {"targets": targets, "steps": steps, "seed": seed})
    _print_summary(output, records, time.monotonic() - begun)
    return records


def _records(output: Path, *settings: Any) -> dict[str, PilotRecord]:
    """Of both pilots. On a CPU of several cores they run side by side: with a model this small two processes gain more
    than two threads."""
    far, near = TARGETS
    threads = torch.get_num_threads()
    if best_device().type != "cpu" or threads < 2:
        return {target: _compared(output, target, *settings) for target in TARGETS}
    with beside(_compared, output, near, *settings, threads=threads // 2) as waited_for:
        record = _compared(output, far, *settings)
        found, printed = waited_for()
    print(printed, end="", flush=True)
    return {far: record, near: found}


def _compared(output: Path, target: str, steps: int, seed: int, language: str, overwrite: bool) -> PilotRecord:
    """The pilot on a target."""
    recipe, study = demo_study(output, target, steps, seed)
    told = f"{steps} steps on {recipe.data.limit} pictures, {len(study.seeds)} seeds a side"
    print(f"\n{target}, a {TARGETS[target]} style: {told}", flush=True)
    return pilot(recipe, study, language, overwrite)


def _refuse_foreign(output: Path) -> None:
    """Raises UserError where the folder holds anything that no demo wrote, since parts of it would be overwritten."""
    known = {*TARGETS, "cache", GRID, SUMMARY, REPORT}
    foreign = sorted(entry.name for entry in output.iterdir() if entry.name not in known) if output.is_dir() else []
    if foreign:
        raise UserError(
            f"the output {output} holds {harmless(foreign[0])}, which no demo writes; choose another "
            "folder, or empty it."
        )


def _grid(output: Path, records: Mapping[str, PilotRecord]) -> tuple[dict[str, list[Image.Image]], list[str]]:
    """Rows of both targets, and the names above them where both drew the same."""
    rows: dict[str, list[Image.Image]] = {}
    names = []
    for target, record in records.items():
        pictures = record.pictures or PilotPictures()
        names.append(pictures.prompts)
        for row in pictures.rows:
            rows[f"{TARGETS[target]}: {LABELS[row.name]}"] = [Image.open(output / target / f) for f in row.files]
    return rows, ["/".join(dict.fromkeys(each)) for each in zip(*names)]


def loss_table(record: PilotRecord) -> list[dict[str, Any]]:
    """One row for each role and noise band: the base's loss, and each side's mean over the seeds."""
    rows = []
    runs = {side["name"]: [losses_of(r) for r in side["runs"]] for side in record.sides}
    for role in ("target", "bank"):
        base = runs["plain"][0][role].base
        for i, u in enumerate(base.centres):
            row = {"rows": role, "u": u, "base": base.losses[i]}
            for side, records in runs.items():
                values = [losses[role].tuned.losses[i] for losses in records]
                row[side] = sum(values) / len(values)
            rows.append(row)
    return rows


def _print_summary(output: Path, records: Mapping[str, PilotRecord], seconds: float) -> None:
    figures = (("kid", 1000, 1), ("domain_hit", 100, 0), ("pair_similarity", 1, 3))
    print("\nPictures of names that were never trained on, mean ± standard deviation of three seeds; the bank's loss")
    print("against the pretrained model's is what was forgotten")
    for target, record in records.items():
        print(f"\n  {f'{target} ({TARGETS[target]})':<14}{'KID ×1000':>14}{'in the new style, %':>21}", end="")
        print(f"{'like the true one':>19}{'forgotten':>11}")
        base = [f"{factor * record.base[metric]:.{digits}f}" for metric, factor, digits in figures]
        print(f"  {'base':<14}{base[0]:>14}{base[1]:>21}{base[2]:>19}")
        for side in record.sides:
            found = side["summary"][str(side["best_length"])]
            cells = [
                f"{factor * found[metric]['mean']:.{digits}f} ± {factor * found[metric]['spread']:.{digits}f}"
                for metric, factor, digits in figures
            ]
            rise = found["bank_loss"]["mean"] / record.base["bank_loss"] - 1
            print(f"  {COMPARED[side['name']]:<14}{cells[0]:>14}{cells[1]:>21}{cells[2]:>19}{rise:>+11.0%}")
    target, record = next(iter(records.items()))
    tuned = next(s for s in record.sides if s["name"] != "plain")["runs"][0]["folder"]
    print(f"\nReport: {output / REPORT}   pictures: {output / GRID}   {seconds:.0f} s")
    print("\nUse it in stock diffusers:")
    print("  from diffusers import DiffusionPipeline")
    print(f'  pipe = DiffusionPipeline.from_pretrained("{embedded_model()}")')
    print(f'  pipe.load_lora_weights("{output / target / tuned}")')
    print("\nNext, your own pictures (a folder with captions) on your own model:")
    print("  difftune train my_pictures --model stable-diffusion-v1-5/stable-diffusion-v1-5 --out runs/mine")
