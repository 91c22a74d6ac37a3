"""What tuning does to a model of few steps, and what keeps them: the embedded model, distilled to four steps.

    python examples/emoji/turbo.py --work build/turbo                                     # distils, trains, measures
    python examples/emoji/turbo.py --work build/turbo --collect examples/emoji/turbo.json
    python examples/emoji/turbo.py --table examples/emoji/turbo.json                      # the tables

`distil.py` makes the turbo model. LoRA on 8 pictures of a style: of the turbo model with three kinds of retention and
with none, and of the base with and without, which are drawn by the base in 15 steps at guidance 4, and loaded on the
turbo. All at one rate; the length is chosen for each by the KID of names that the figures do not use. Every style has
its first seed before any has its second, so it can be collected at any time; what is done is not done again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import digest_of_model, spread
from distil import Trajectories, make_turbo
from styles import CARRIED, data_of

from difftuning_control.data.prepare import read_data
from difftuning_control.evaluation.drawing import save_grid
from difftuning_control.evaluation.features import load_features
from difftuning_control.evaluation.figures import Sampling, build_reference, decoded, figures
from difftuning_control.families.family import Family
from difftuning_control.families.loading import load_family
from difftuning_control.recipe.inputs import BankConfig, DataConfig, ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.training import ScheduleConfig, TrainingConfig, TuningConfig
from difftuning_control.runs.finished import finished_run, tuned_model
from difftuning_control.runs.identity import versions
from difftuning_control.runs.record import read_run
from difftuning_control.system.durable import write_json
from difftuning_control.verbs.train import train

TARGETS, SEEDS = (*CARRIED, "streamline"), (0, 1, 2)
ROWS, RATE, LENGTHS, PICTURES = 16, 5e-3, (40, 80), 32
JUDGED_BY = 160  # real pictures, and samples of the base
FIGURES = ("kid", "domain_hit", "pair_similarity", "memorisation")
PLAIN = TuningConfig(ScheduleConfig("constant"), retention_ratio=0.0, retention_weight=0.0)
DIFFTUNING = TuningConfig(ScheduleConfig("power", tau=0.3), retention_ratio=0.2, retention_weight=0.1)


@dataclass(frozen=True)
class Drawn:
    """A way to draw: by the turbo model or by the base, in so many steps, at a guidance."""

    model: str
    steps: int
    guidance: float

    def __str__(self) -> str:
        return f"{self.model}-{self.steps}"


FOUR, EIGHT, ONE, BASE = Drawn("turbo", 4, 1.0), Drawn("turbo", 8, 1.0), Drawn("turbo", 1, 1.0), Drawn("base", 15, 4.0)


@dataclass(frozen=True)
class Side:
    """A way to tune, and the ways that what was tuned is drawn."""

    name: str
    model: str
    tuning: TuningConfig
    drawn: tuple[Drawn, ...]


SIDES = [
    Side("plain", "turbo", PLAIN, (FOUR, EIGHT, ONE)),
    Side("difftuning", "turbo", DIFFTUNING, (FOUR, EIGHT, ONE)),
    Side(
        "teacher_own",  # guidance 1 never asks the empty prompt, so it is the bank's own that are to be retained
        "turbo",
        TuningConfig(  # and at all noise levels alike, since few steps are most of them at high ones
            ScheduleConfig("constant", xi=1.0),
            retention_ratio=0.2,
            retention_weight=1.0,
            retention="teacher",
            retention_prompts="own",
        ),
        (FOUR, EIGHT, ONE),
    ),
    Side("plain", "base", PLAIN, (FOUR, EIGHT, ONE, BASE)),
    Side("difftuning", "base", DIFFTUNING, (FOUR, EIGHT, ONE, BASE)),
    Side("teacher", "turbo", replace(DIFFTUNING, retention="teacher"), (FOUR, EIGHT, ONE)),
]
FIRST = 4  # of them without which the others say little
NAMES = {
    "untuned": "not tuned",
    "plain": "plain",
    "difftuning": "Diff-Tuning, own bank, τ = 0.3",
    "teacher": "teacher on the bank, empty prompt",
    "teacher_own": "teacher on the bank, own prompts, ψ = ξ = λ = 1",
}


def recipe_for(side: Side, target: str, seed: int, work: Path, lengths: tuple[int, ...] = LENGTHS) -> Recipe:
    """One run of a side; its bank is drawn as its model draws."""
    tuned_on, held_out = data_of(target, work)
    turbo = side.model == "turbo"
    return Recipe(
        model=ModelConfig(str(work / "turbo") if turbo else "embedded"),
        data=DataConfig(tuned_on, holdout=0.0, validation_path=held_out, limit=8, cache=str(work / "cache")),
        tuning=side.tuning,
        bank=BankConfig(32, guidance_scale=1.0 if turbo else 1.5, steps=4 if turbo else 15, seed=seed),
        training=TrainingConfig(
            max_steps=lengths[-1],
            batch_size=ROWS,
            learning_rate=RATE,
            lr_scheduler="constant",
            ema_decay=0.999,
            seed=seed,
            save_at=list(lengths),
            validate_every=0,
            validation_size=4,
            sample_every=0,
            checkpoint_every=1000,
            resume=True,
        ),
        output=str(work / target / f"{side.model}-{side.name}" / f"seed-{seed}"),
    )


class Models:
    """The base and the turbo model, and features of the base's own samples."""

    def __init__(self, work: Path):
        self.base, self.turbo = load_family("embedded"), load_family(str(work / "turbo"))
        self.features = load_features("lite0")
        ends = Trajectories.load(work / "trajectories").ends[:JUDGED_BY]
        self.source = self.features(decoded(self.base, ends))


class Bench:
    """Both models, what pictures of a target are judged against, and the names of the search and of the figures."""

    def __init__(self, target: str, work: Path, models: Models, pictures: int = PICTURES):
        self.models = {"base": models.base, "turbo": models.turbo}
        self.target, self.resolution = target, models.base.native_resolution
        tuned_on, held_out = read_data(recipe_for(SIDES[0], target, 0, work))
        self.reference = build_reference(
            models.base,
            models.features,
            real=held_out.sample(JUDGED_BY),
            training=tuned_on,
            source=models.source,
            resolution=self.resolution,
        )
        names = [e.caption for e in held_out.sample(2 * pictures).examples]
        self.names = {"search": names[::2], "final": names[1::2]}

    def judge(self, family: Family, way: Drawn, names: str, seed: int) -> tuple[dict[str, Any], list[Any]]:
        prompts = self.names[names]
        pictures = Sampling(prompts, [seed], way.steps, way.guidance, self.resolution, 32).draw(family)
        found = figures(pictures, prompts, self.reference)
        return {"model": way.model, "steps": way.steps, **{name: found[name] for name in FIGURES}}, pictures

    def judge_run(self, side: Side, run: Path, seed: int, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
        """A row a way of drawing, at the length that is best on the names of the search."""
        rows, record = [], finished_run(run)
        for way in side.drawn:
            family = self.models[way.model]
            found: dict[int, float] = {}
            if way in (FOUR, BASE):  # 8 and 1 steps at the length of four
                for length in lengths:
                    with tuned_model(family, run, record, length) as tuned:
                        found[length] = self.judge(tuned, way, "search", seed)[0]["kid"]
                best = min(found, key=lambda length: found[length])
            with tuned_model(family, run, record, best) as tuned:
                row, pictures = self.judge(tuned, way, "final", seed)
            search = {str(length): value for length, value in found.items()}
            rows.append({**self.about(side.name, side.model, seed), **row, "length": best, "search": search})
            if seed == 0 and way in (FOUR, BASE):
                save_grid(run / f"{way}.png", {str(way): pictures[:12]}, self.names["final"][:12])
        return rows

    def about(self, side: str, tuned: str, seed: int) -> dict[str, Any]:
        return {"target": self.target, "side": side, "tuned": tuned, "seed": seed}

    def judge_untuned(self, seed: int) -> list[dict[str, Any]]:
        """Both models as they are."""
        rows = []
        for way in (FOUR, EIGHT, ONE, BASE):
            row, _ = self.judge(self.models[way.model], way, "final", seed)
            rows.append({**self.about("untuned", way.model, seed), **row, "length": 0, "search": {}})
        return rows


def jobs(seeds: list[int], targets: list[str]) -> Iterator[tuple[int, str, Side | None]]:
    """All of it; None for both models as they are. The last sides come after the first ones of all targets."""
    for seed in seeds:
        for sides in ((None, *SIDES[:FIRST]), SIDES[FIRST:]):
            yield from ((seed, target, side) for target in targets for side in sides)


def run(
    work: Path, seeds: list[int], targets: list[str], lengths: tuple[int, ...] = LENGTHS, pictures: int = PICTURES
) -> None:
    benches: dict[str, Bench] = {}
    models: Models | None = None
    for seed, target, side in jobs(seeds, targets):
        place = work / target / (f"{side.model}-{side.name}" if side else "untuned") / f"seed-{seed}"
        if (place / "judged.json").exists():
            continue
        if side is not None:
            recipe = recipe_for(side, target, seed, work, lengths)
            record = read_run(place)
            if record is None or not record.is_complete:
                train(recipe)
        models = models or Models(work)
        if target not in benches:
            benches[target] = Bench(target, work, models, pictures)
        bench = benches[target]
        rows = bench.judge_untuned(seed) if side is None else bench.judge_run(side, place, seed, lengths)
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / "judged.json", rows)
        for row in rows:
            shown = f"KID {1000 * row['kid']:.0f}, hit {row['domain_hit']:.0%}, like {row['pair_similarity']:.3f}"
            drawn = f"by {row['model']} in {row['steps']}"
            print(f"{target} {row['tuned']} {row['side']} seed {seed}, {drawn}: {shown}", flush=True)


# --- tables ---------------------------------------------------------------------------------------------------------


def collect(work: Path) -> dict[str, Any]:
    """Every judged row, and how the turbo model was made."""
    rows = [row for path in sorted(work.glob("*/*/seed-*/judged.json")) for row in json.loads(path.read_text())]
    if not rows:
        raise SystemExit(f"{work} holds no judged run; run the study first.")
    settings = {"rows": ROWS, "learning_rate": RATE, "lengths": LENGTHS, "pictures": PICTURES}
    settings["model"] = digest_of_model()
    turbo = json.loads((work / "turbo.json").read_text())
    return {"settings": settings, "versions": versions(), "turbo": turbo, "rows": rows}


def tables(result: dict[str, Any]) -> str:
    """How the turbo model draws, and a table a target: mean ± standard deviation over the seeds."""
    lines = ["| | KID × 1000 to the base's own pictures | name found among 5 of all |", "|---|---|---|"]
    for way, row in result["turbo"]["ways"].items():
        lines.append(f"| {way} | {1000 * row['kid']:.0f} | {row['recognised']:.0%} |")
    for target in dict.fromkeys(r["target"] for r in result["rows"]):
        of_target = [r for r in result["rows"] if r["target"] == target]
        lines += ["", f"**{target}** ({len({r['seed'] for r in of_target})} of 3 seeds)", ""]
        lines += [
            "| tuned | how | drawn by | KID × 1000 | in the new style, % | like the true picture | KID in 8 | in 1 |",
            "|---" * 8 + "|",
        ]
        order = list(NAMES)
        ways = {(r["tuned"], r["side"], r["model"]) for r in of_target if r["steps"] in (4, 15)}
        for tuned, side, model in sorted(
            ways, key=lambda way: (way[2] != "turbo", way[0] != "turbo", order.index(way[1]))
        ):
            by_steps: dict[int, list[dict[str, Any]]] = {}
            for row in of_target:
                if (row["tuned"], row["side"], row["model"]) == (tuned, side, model):
                    by_steps.setdefault(row["steps"], []).append(row)
            main = by_steps[4 if model == "turbo" else 15]
            cells = [spread([1000 * r["kid"] for r in main], "{:.0f}")]
            cells += [spread([100 * r["domain_hit"] for r in main], "{:.0f}")]
            cells += [spread([r["pair_similarity"] for r in main], "{:.3f}")]
            cells += [spread([1000 * r["kid"] for r in by_steps.get(n, [])], "{:.0f}") for n in (8, 1)]
            drawn = "turbo, 4 steps, guidance 1" if model == "turbo" else "base, 15 steps, guidance 4"
            lines.append(f"| {tuned} | {NAMES[side]} | {drawn} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/turbo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--table", type=Path, help="only print the tables of this file")
    parser.add_argument("--collect", type=Path, help="only write the rows of what was judged to this file")
    args = parser.parse_args()
    if args.table is not None:
        print(tables(json.loads(args.table.read_text())))
    elif args.collect is not None:
        write_json(args.collect, collect(args.work))
    else:
        make_turbo(args.work)
        run(args.work, args.seeds, args.targets)


if __name__ == "__main__":
    main()
