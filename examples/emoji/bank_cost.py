"""What retention costs and what it brings: KID, domain hit and forgetting against the bank's size, steps, guidance and
solver, and against the pretrained model's own prediction as the target of retention rows.

    python examples/emoji/bank_cost.py --work build/bank_cost                                    # trains, then measures
    python examples/emoji/bank_cost.py --work build/bank_cost --collect examples/emoji/bank_cost.json
    python examples/emoji/bank_cost.py --table examples/emoji/bank_cost.json                     # the tables

LoRA on 8 pictures, 48 steps of 10 rows, of which 2 are for retention, λ = 0.1, ψ = ξ = 1. Cells differ in retention
alone; a seed has the same bank on all targets, and another than the other seeds. Every cell is judged on names that
were never trained on, drawn with the same noise, and what it forgot on one bank that no run has trained on. Every cell
has its first seed on all targets before any has its second, and what is done is not done again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import spread
from styles import CARRIED, data_of
from torch import Tensor

from difftuning_control.data.bank import BankRequest, KnowledgeBank
from difftuning_control.data.embeddings import cached_embeddings
from difftuning_control.data.latents import part_of
from difftuning_control.data.prepare import encoded, read_data
from difftuning_control.evaluation import metrics
from difftuning_control.evaluation.features import load_features
from difftuning_control.evaluation.figures import Reference, Sampling, build_reference, decoded
from difftuning_control.evaluation.forgetting import row_validator
from difftuning_control.families.hub import best_device
from difftuning_control.families.loading import load_family
from difftuning_control.objective.noise import BANDS
from difftuning_control.recipe.inputs import BankConfig, DataConfig, Solver
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.training import ScheduleConfig, TrainingConfig, TuningConfig
from difftuning_control.runs.finished import finished_run, tuned_model
from difftuning_control.runs.identity import versions
from difftuning_control.system.durable import write_json
from difftuning_control.verbs.pilot.side_tuning import side_tuning
from difftuning_control.verbs.train import train

HERE = Path(__file__).parent
TARGETS, SEEDS = (*CARRIED, "streamline"), (0, 1, 2)
STEPS, ROWS, RATIO = 48, 10, 0.2
PICTURES, SAMPLING_STEPS, GUIDANCE = 40, 8, 4.0
YARDSTICK, REAL = 24, 128  # samples that no run trains on, of 25 steps; held-out pictures
PROMPTS = HERE / "bank_prompts.txt"
SUBSETS = 20  # of KID, each of all that a run drew and as many held-out pictures


@dataclass(frozen=True)
class Cell:
    """How a run retains.

    Args:
        size, steps, guidance, solver: of its bank; no bank when the size is 0.
        teacher: what the pretrained model is asked on (bank, empty, own); samples are the target when None.
    """

    name: str
    size: int = 0
    steps: int = 15
    guidance: float = 1.5
    solver: Solver = "own"
    teacher: str | None = None

    @property
    def forwards(self) -> int:
        """Forwards of a row without gradient that retention costs beside training, bank and teacher together."""
        asked = STEPS * int(ROWS * RATIO) if self.teacher is not None else 0
        return self.size * self.steps * (2 if self.guidance > 1 else 1) + asked

    @property
    def tuning(self) -> TuningConfig:
        if self.name == "plain":
            return TuningConfig(ScheduleConfig("constant"), retention_ratio=0.0, retention_weight=0.0)
        base = TuningConfig(ScheduleConfig("constant", xi=1.0), retention_ratio=RATIO, retention_weight=0.1)
        return base if self.teacher is None else side_tuning(f"teacher_{self.teacher}", base, HERE)


CELLS = [
    Cell("plain"),
    Cell("32 of 15", 32),  # the default
    Cell("8 of 15", 8),
    Cell("32 of 8", 32, 8),
    Cell("32 of 15, guidance 1", 32, guidance=1.0),
    Cell("32 of 8, DPM-Solver++", 32, 8, solver="dpmsolver++"),
    Cell("teacher, bank 32 of 15", 32, teacher="bank"),
    Cell("teacher, empty prompt", teacher="empty"),
    Cell("teacher, own prompt", teacher="own"),
    Cell("64 of 15", 64),
]


def recipe_for(cell: Cell, target: str, seed: int, work: Path) -> Recipe:
    """One run of a cell."""
    place = cell.name.replace(",", "").replace(" ", "-")
    bank = BankConfig(  # a seed's bank is its own: the spread over seeds is also one over banks
        max(cell.size, 1), str(PROMPTS), cell.guidance, cell.steps, cell.solver, batch_size=64, seed=seed
    )
    return Recipe(
        data=DataConfig(data_of(target, work)[0], holdout=0.0, limit=8, cache=str(work / "cache")),
        tuning=cell.tuning,
        bank=bank,
        training=TrainingConfig(
            max_steps=STEPS,
            batch_size=ROWS,
            learning_rate=5e-3,
            lr_scheduler="constant",
            ema_decay=0.999,
            seed=seed,
            validate_every=0,
            validation_size=4,
            sample_every=0,
            checkpoint_every=1000,
            resume=True,
        ),
        output=str(work / target / place / f"seed-{seed}"),
    )


class Yardstick:
    """What all cells of a target are judged by: held-out pictures and names, and a bank that no run has trained on."""

    def __init__(self, target: str, work: Path):
        recipe = recipe_for(CELLS[0], target, 0, work)
        cache = work / "cache"
        self.family = load_family(recipe.model.id).to(best_device())
        self.resolution = self.family.native_resolution
        features = load_features("lite0", self.family.device)
        prompts = PROMPTS.read_text(encoding="utf-8").split("\n")
        request = BankRequest([p for p in prompts if p], YARDSTICK, 1.5, 25, self.resolution, seed=1000)
        self.bank = KnowledgeBank.build(self.family, work / "yardstick", request)
        beside = replace(recipe.data, validation_path=data_of(target, work)[1])
        tuned_on, held_out = read_data(replace(recipe, data=beside))
        self.reference: Reference = build_reference(
            self.family,
            features,
            real=held_out.sample(REAL),
            training=tuned_on,
            source=features(decoded(self.family, self.bank.latents[:])),
            resolution=self.resolution,
        )
        self.prompts = list(dict.fromkeys(e.caption for e in held_out.sample(PICTURES).examples))
        fresh = held_out.sample(YARDSTICK)
        captions = [e.caption for e in fresh.examples]
        embeddings = cached_embeddings(self.family, [*self.bank.prompts, *captions], cache, lambda count: None)
        parts = {
            "bank_empty": part_of(self.bank, [""] * len(self.bank)),
            "target": encoded(self.family, fresh, self.resolution, cache, lambda count: None),
        }
        self.rows = {
            name: row_validator(self.family, part, embeddings, YARDSTICK, 1, BANDS, 0) for name, part in parts.items()
        }
        self.base = {name: rows.measure(self.family.model).losses for name, rows in self.rows.items()}

    def judge(self, run: Path, seed: int) -> dict[str, Any]:
        """Figures of a finished run, and the rise of its losses over the pretrained model's, band by band."""
        record = finished_run(run)
        sampling = Sampling(self.prompts, [seed], SAMPLING_STEPS, GUIDANCE, self.resolution)
        with tuned_model(self.family, run, record) as tuned:
            found = self._figures(self.reference.features(sampling.draw(tuned)))
            after = {name: rows.measure(tuned.model).losses for name, rows in self.rows.items()}
        rises = {name: [b / a - 1 for a, b in zip(self.base[name], after[name])] for name in after}
        phases = {name: cost.to_dict() for name, cost in (record.phases or {}).items()}
        return found | {"rise": rises, "phases": phases}

    def _figures(self, drawn: Tensor) -> dict[str, float]:
        """Figures of the features of a run's pictures, in the order of the prompts."""
        its = self.reference
        return {
            "kid": metrics.kid(its.real, drawn, subsets=SUBSETS)[0],
            "domain_hit": metrics.domain_hit_rate(its.source, its.real, drawn)[0],
            "pair_similarity": metrics.pair_similarity(drawn, torch.stack([its.counterparts[p] for p in self.prompts])),
            "memorisation": metrics.memorisation(drawn, its.training),
        }


def jobs(seeds: list[int], targets: list[str]) -> Iterator[tuple[int, str, Cell]]:
    """All runs; every cell has its first seed before any has its second."""
    return ((seed, target, cell) for seed in seeds for target in targets for cell in CELLS)


def run(work: Path, seeds: list[int], targets: list[str]) -> None:
    yardsticks: dict[str, Yardstick] = {}
    for seed, target, cell in jobs(seeds, targets):
        recipe = recipe_for(cell, target, seed, work)
        done = Path(recipe.output) / "judged.json"
        if done.exists():
            continue
        train(recipe)
        if target not in yardsticks:
            yardsticks[target] = Yardstick(target, work)
        row = {"target": target, "cell": cell.name, "seed": seed, "forwards": cell.forwards}
        row |= yardsticks[target].judge(Path(recipe.output), seed)
        write_json(done, row)
        shown = f"KID {1000 * row['kid']:.0f}, hit {row['domain_hit']:.0%}, bank {_worst(row, 'bank_empty'):+.1%}"
        print(f"{target:6s} {cell.name:24s} seed {seed}: {shown}", flush=True)


def _worst(row: dict[str, Any], name: str) -> float:
    return max(row["rise"][name])


# --- tables ---------------------------------------------------------------------------------------------------------


def collect(work: Path) -> dict[str, Any]:
    """Every judged run as a row."""
    rows = [json.loads(path.read_text()) for path in sorted(work.glob("*/*/seed-*/judged.json"))]
    if not rows:
        raise SystemExit(f"{work} holds no judged run; run the study first.")
    settings = {"steps": STEPS, "rows": ROWS, "pictures": PICTURES, "guidance": GUIDANCE, "yardstick": YARDSTICK}
    return {"settings": settings, "versions": versions(), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """A table a target: mean ± standard deviation over the seeds."""
    lines = []
    for target in dict.fromkeys(r["target"] for r in result["rows"]):
        lines += [
            f"**{target}**",
            "",
            "| retention | forwards without gradient | KID × 1000 | in the new style | like the true picture | "
            "bank loss, mean over bands | worst band | target loss |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for cell in CELLS:
            rows = [r for r in result["rows"] if (r["target"], r["cell"]) == (target, cell.name)]
            if not rows:
                continue
            empty, new = ([mean(r["rise"][n]) for r in rows] for n in ("bank_empty", "target"))
            cells = [
                spread([1000 * r["kid"] for r in rows], "{:.0f}"),
                spread([100 * r["domain_hit"] for r in rows], "{:.0f}"),
                spread([r["pair_similarity"] for r in rows], "{:.3f}"),
                spread([100 * v for v in empty], "{:+.1f}"),
                spread([100 * _worst(r, "bank_empty") for r in rows], "{:+.1f}"),
                spread([100 * v for v in new], "{:+.1f}"),
            ]
            lines.append(f"| {cell.name} | {cell.forwards:,} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bank_cost"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--table", type=Path, help="only print the tables of this file")
    parser.add_argument("--collect", type=Path, help="only write the rows of the judged runs to this file")
    args = parser.parse_args()
    if args.table is not None:
        print(table(json.loads(args.table.read_text())))
    elif args.collect is not None:
        write_json(args.collect, collect(args.work))
    else:
        run(args.work, args.seeds, args.targets)


if __name__ == "__main__":
    main()
