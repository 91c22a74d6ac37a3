"""`difftune demo`: a small pilot on the embedded model, plain fine-tuning against Diff-Tuning, with its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from difftuning_control.evaluation.band_losses import losses_of
from difftuning_control.evaluation.comparison import verdict
from difftuning_control.evaluation.drawing import save_grid
from difftuning_control.evaluation.pilot_figures import PilotPictures
from difftuning_control.families.loading import embedded_model
from difftuning_control.recipe.inputs import BankConfig, DataConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import PilotConfig
from difftuning_control.recipe.training import TrainingConfig
from difftuning_control.runs.audit import noted
from difftuning_control.runs.pilot_files import DEMO
from difftuning_control.runs.pilot_record import PilotRecord
from difftuning_control.system.digests import digest_of_file
from difftuning_control.system.durable import write_json
from difftuning_control.verbs.pilot.pilot import pilot

COMPARED = {"plain": "plain", "difftuning_measured": "Diff-Tuning"}
LABELS = {"truth": "true icon", "base": "base"} | COMPARED


def demo_study(output: Path, steps: int, seed: int) -> tuple[Recipe, PilotConfig]:
    """The demo's recipe, in which the sides differ in `tuning` alone, and what is compared."""
    recipe = Recipe(
        data=DataConfig(
            "embedded/icons", holdout=0.0, validation_path="embedded/icons-eval", limit=8, cache=str(output / "cache")
        ),
        bank=BankConfig(size=128, steps=15, batch_size=64, path=str(output / "bank")),
        training=TrainingConfig(
            max_steps=steps,
            batch_size=16,
            learning_rate=5e-3,
            lr_scheduler="constant",
            ema_decay=0.999,
            validation_size=48,
            checkpoint_every=max(steps, 1),
            seed=seed,
        ),
        output=str(output),
    )
    seeds = [seed, seed + 1, seed + 2]
    return recipe, PilotConfig(
        list(COMPARED), seeds=seeds, learning_rates=[5e-3], pictures=32, steps=15, guidance_scale=4.0
    )


def demo(output: Path, steps: int, seed: int, language: str, overwrite: bool) -> PilotRecord:
    """The pilot, a grid of names that were never trained on, a table on the screen.

    Raises:
        UserError: if the output holds something else, or a demo with other settings without `overwrite`.
    """
    recipe, config = demo_study(output, steps, seed)
    print(f"Diff-Tuning and plain fine-tuning, {steps} steps on 8 line icons, three seeds each", flush=True)
    record = pilot(recipe, config, language, overwrite)
    pictures = record.pictures or PilotPictures()
    rows = {LABELS[row.name]: [Image.open(output / f) for f in row.files] for row in pictures.rows}
    table = loss_table(record)
    with noted(output) as artefacts:
        save_grid(output / "grid.png", rows, pictures.prompts)
        write_json(output / "summary.json", {"verdict": verdict(record), "table": table, "steps": steps, "seed": seed})
        artefacts |= {name: digest_of_file(output / name) for name in DEMO}
    _print_summary(output, record, table)
    return record


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


def _print_summary(output: Path, record: PilotRecord, table: list[dict[str, Any]]) -> None:
    print("\nPictures of names that were never trained on, mean ± standard deviation of three seeds")
    print(f"  {'':<14}{'KID ×1000':>16}{'in the new style':>20}{'like the true icon':>22}")
    figures = (("kid", 1000, 1), ("domain_hit", 100, 0), ("pair_similarity", 1, 3))
    base = [f"{factor * record.base[metric]:.{digits}f}" for metric, factor, digits in figures]
    print(f"  {'base':<14}{base[0]:>16}{base[1]:>20}{base[2]:>22}")
    for side in record.sides:
        cells = []
        for metric, factor, digits in figures:
            value = side["summary"][str(side["best_length"])][metric]
            cells.append(f"{factor * value['mean']:.{digits}f} ± {factor * value['spread']:.{digits}f}")
        print(f"  {COMPARED[side['name']]:<14}{cells[0]:>16}{cells[1]:>20}{cells[2]:>22}")
    print("\nLoss by noise band (u: 0 clean, 1 pure noise); target: held-out icons, bank: held-out samples of the base")
    print(f"  {'rows':<8}{'u':>5}{'base':>10}{'plain':>10}{'Diff-Tuning':>13}")
    for row in table:
        print(
            f"  {row['rows']:<8}{row['u']:>5.1f}"
            + "".join(
                f"{row[name]:>{width}.4f}" for name, width in (("base", 10), ("plain", 10), ("difftuning_measured", 13))
            )
        )
    best = next(s for s in record.sides if s["name"] != "plain")["runs"][0]["folder"]
    print(f"\nReport: {output / 'report.html'}   pictures: {output / 'grid.png'}   {record.cost.seconds or 0:.0f} s")
    print("\nUse it in stock diffusers:")
    print("  from diffusers import DiffusionPipeline")
    print(f'  pipe = DiffusionPipeline.from_pretrained("{embedded_model()}")')
    print(f'  pipe.load_lora_weights("{output / best}")')
    print("\nNext, your own pictures (a folder with captions) on your own model:")
    print("  difftune train my_pictures --model stable-diffusion-v1-5/stable-diffusion-v1-5 --out runs/mine")
