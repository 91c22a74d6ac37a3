"""The forgetting budget against fixed λ: what each keeps of the bank in every band, and what it costs on the target.

    python examples/emoji/budget.py --work build/budget --out examples/emoji/budget.json

LoRA on 8 line icons, ψ = ξ = 1, three seeds, equal steps and learning rate; λ fixed at several values, and a budget of
10 % in every band. Losses are on held-out icons and on bank samples that no run trained on.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from statistics import mean, stdev

from difftuning_control.recipe.inputs import BankConfig, DataConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.training import ScheduleConfig, TrainingConfig, TuningConfig
from difftuning_control.system.durable import write_json
from difftuning_control.verbs.train import train

HERE = Path(__file__).parent
ALLOWED, WEIGHTS, SEEDS = 0.1, (0.01, 0.03, 0.1, 0.3, 1.0), (0, 1, 2)


def recipe(work: Path, name: str, seed: int, tuning: TuningConfig, steps: int) -> Recipe:
    return Recipe(
        data=DataConfig(
            "embedded/icons", holdout=0.0, validation_path="embedded/icons-eval", limit=8, cache=str(work / "cache")
        ),
        tuning=tuning,
        bank=BankConfig(256, str(HERE / "bank_prompts.txt"), 1.5, 15, 64, path=str(work / "bank")),
        training=TrainingConfig(
            max_steps=steps,
            batch_size=16,
            learning_rate=5e-3,
            lr_scheduler="constant",
            ema_decay=0.999,
            seed=seed,
            validate_every=0,
            validation_size=64,
            sample_every=0,
            checkpoint_every=1000,
            resume=True,
        ),
        output=str(work / name / f"seed-{seed}"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/budget"))
    parser.add_argument("--out", type=Path, default=HERE / "budget.json")
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    args = parser.parse_args()
    prior = TuningConfig(ScheduleConfig("constant", xi=1.0))
    sides = {f"lambda {w:g}": dataclasses.replace(prior, retention_weight=w) for w in WEIGHTS}
    sides[f"budget {ALLOWED:.0%}"] = dataclasses.replace(prior, forgetting_budget=ALLOWED)
    rows = []
    for name, tuning in sides.items():
        runs = [train(recipe(args.work, name.replace(" ", "-"), s, tuning, args.steps)).record for s in args.seeds]
        rises = [r.losses["bank"].rises for r in runs]
        targets = [mean(r.losses["target"].tuned.losses) for r in runs]
        rows.append(
            {
                "side": name,
                "u": runs[0].losses["bank"].base.centres,
                "rise": [mean(c) for c in zip(*rises)],
                "rise_spread": [stdev(c) for c in zip(*rises)] if len(runs) > 1 else None,
                "bands_kept": sum(mean(c) <= ALLOWED for c in zip(*rises)),
                "target_loss": mean(targets),
                "target_loss_spread": stdev(targets) if len(runs) > 1 else None,
                "multipliers": [r.budget.multipliers for r in runs] if "budget" in name else None,
            }
        )
        worst = max(rows[-1]["rise"])
        kept = rows[-1]["bands_kept"]
        print(f"{name:12s} worst rise {worst:+.1%}  bands kept {kept}/5  target loss {rows[-1]['target_loss']:.4f}")
    write_json(args.out, {"allowed": ALLOWED, "seeds": args.seeds, "steps": args.steps, "rows": rows})


if __name__ == "__main__":
    main()
