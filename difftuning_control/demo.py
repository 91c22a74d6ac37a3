"""`difftune demo`: plain fine-tuning and Diff-Tuning side by side on the embedded model, with equal steps and seeds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from PIL import Image

from difftuning_control.data import load_images
from difftuning_control.errors import UserError
from difftuning_control.families import embedded_model, load_family, quiet_loading
from difftuning_control.fingerprint import write_json
from difftuning_control.inputs import progress
from difftuning_control.pictures import sample_pictures, save_grid
from difftuning_control.provenance import read_run
from difftuning_control.recipe import BankConfig, DataConfig, Recipe, ScheduleConfig, TrainingConfig, TuningConfig
from difftuning_control.trainer import train

NAMES = (
    "red apple", "dog face", "pizza", "guitar", "butterfly", "key", "rabbit face", "strawberry", "frog",
    "birthday cake",
)  # fmt: skip
PLAIN = TuningConfig(ScheduleConfig("constant"), retention_ratio=0.0, retention_weight=0.0)
SIDES = {"plain": PLAIN, "difftuning": TuningConfig()}


def demo_recipe(side: str, output: Path, steps: int, seed: int) -> Recipe:
    """The recipe of one side; the two differ in `tuning` alone."""
    return Recipe(
        data=DataConfig(
            "embedded/icons", holdout=0.0, validation_path="embedded/icons-eval", cache=str(output / "cache")
        ),
        tuning=SIDES[side],
        bank=BankConfig(size=192, steps=15, batch_size=64, path=str(output / "bank")),
        training=TrainingConfig(
            max_steps=steps, batch_size=32, learning_rate=2e-3, validate_every=0, validation_size=64, sample_every=0,
            checkpoint_every=steps, sample_prompts=list(NAMES), seed=seed,
        ),
        output=str(output / side),
    )  # fmt: skip


def demo(output: Path, steps: int, seed: int, overwrite: bool) -> dict[str, Any]:
    """Bank, both tunings, a grid of names that were never trained on, a table of losses by noise band.

    Raises:
        UserError: if the output holds something else, or an earlier demo without `overwrite`.
    """
    if steps < 1:
        raise UserError(f"steps is {steps}; expected at least 1.")
    if not overwrite and any(read_run(output / side) is not None for side in SIDES):
        raise UserError(f"{output} already holds a demo; give --overwrite to replace it, or another --output.")
    started = time.time()
    runs = {}
    # Diff-Tuning goes first, because it builds the bank that both sides are then validated on
    for number, side in enumerate(reversed(SIDES), start=1):
        print(f"\n[{number}/3] {side}: {steps} steps on 64 line icons", flush=True)
        runs[side] = train(demo_recipe(side, output, steps, seed), overwrite)
    print("\n[3/3] pictures of names that were never trained on", flush=True)
    rows = _pictures(output, seed)
    save_grid(output / "grid.png", rows, NAMES)
    table = loss_table(runs)
    summary: dict[str, Any] = {"table": table, "seconds": time.time() - started, "steps": steps, "seed": seed}
    write_json(output / "summary.json", summary)
    _print_summary(output, table, summary["seconds"])
    return summary


def _pictures(output: Path, seed: int) -> dict[str, list[Image.Image]]:
    settings: dict[str, Any] = {"seed": seed, "steps": 25, "guidance_scale": 2.0, "resolution": 64}
    truth = {e.caption: e for e in load_images("embedded/icons-eval").examples}
    rows = {"true icon": [truth[name].load() for name in NAMES]}
    family = load_family("embedded")
    with progress(3 * len(NAMES), "sampling") as advance:
        rows["base"] = sample_pictures(family, NAMES, **settings, advance=advance)
        for side, label in (("plain", "plain"), ("difftuning", "Diff-Tuning")):
            with quiet_loading():
                family.pipe.load_lora_weights(str(output / side))
            rows[label] = sample_pictures(family, NAMES, **settings, advance=advance)
            family.pipe.unload_lora_weights()
    return rows


def loss_table(runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each role and noise band: the losses of the base, of plain and of Diff-Tuning."""
    rows = []
    for role in ("target", "bank"):
        base = runs["plain"]["losses"][role]["base"]
        for i, u in enumerate(base["u"]):
            row = {"rows": role, "u": u, "base": base["loss"][i]}
            rows.append(row | {side: runs[side]["losses"][role]["tuned"]["loss"][i] for side in SIDES})
    return rows


def _print_summary(output: Path, table: list[dict[str, Any]], seconds: float) -> None:
    print("\nLoss by noise band (u: 0 clean, 1 pure noise); target: held-out icons, bank: held-out samples of the base")
    print(f"  {'rows':<8}{'u':>5}{'base':>10}{'plain':>10}{'Diff-Tuning':>13}")
    for row in table:
        losses = f"{row['base']:>10.4f}{row['plain']:>10.4f}{row['difftuning']:>13.4f}"
        better = "  <" if row["difftuning"] < row["plain"] else ""
        print(f"  {row['rows']:<8}{row['u']:>5.1f}{losses}{better}")
    print("  <  lower with Diff-Tuning than with plain fine-tuning")
    print(f"\nPictures: {output / 'grid.png'}   all figures: {output / 'summary.json'}   {seconds:.0f} s")
    print("\nUse it in stock diffusers:")
    print("  from diffusers import DiffusionPipeline")
    print(f'  pipe = DiffusionPipeline.from_pretrained("{embedded_model()}")')
    print(f'  pipe.load_lora_weights("{output / "difftuning"}")')
    print("\nNext, your own pictures (a folder with captions) on your own model:")
    print("  difftune train --model.id stable-diffusion-v1-5/stable-diffusion-v1-5 --data.path my_pictures \\")
    print(
        "    --training.learning_rate 1e-4 --training.batch_size 5 --training.mixed_precision bf16 --output runs/mine"
    )
