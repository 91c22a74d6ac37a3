"""What the drop-in pipelines' extras are worth on the embedded model.

Domain Guidance against guidance by the tuned model's own unconditional branch, each at its best scale from one grid;
adapter schedules and hand-overs against none.

    python examples/emoji/guidance.py --work build/guidance                                  # trains, then measures
    python examples/emoji/guidance.py --work build/guidance --collect examples/emoji/guidance.json
    python examples/emoji/guidance.py --table examples/emoji/guidance.json                   # the README's tables

Scales are chosen for each cell on names that the figures do not use. What is done is not done again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from difftuning_control.data.study_inputs import materials
from difftuning_control.evaluation.drawing import save_grid
from difftuning_control.evaluation.features import load_features
from difftuning_control.evaluation.figures import Reference, Sampling, figures, reference_of
from difftuning_control.families.hub import best_device
from difftuning_control.families.loading import load_family
from difftuning_control.pipelines import DiffTuningPipeline
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.finished import finished_run, tuned_model
from difftuning_control.runs.identity import versions
from difftuning_control.runs.record import read_run
from difftuning_control.system.durable import write_json
from difftuning_control.verbs.commands import only
from difftuning_control.verbs.parse import parse
from difftuning_control.verbs.pilot.side_tuning import side_tuning
from difftuning_control.verbs.train import train

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
SCALES = (1.5, 2.0, 3.0, 4.0, 6.0)
PICTURES, STEPS = 40, 15
FIGURES = ("kid", "domain_hit", "pair_similarity", "memorisation")
OWN: dict[str, Any] = {"domain_guidance": False, "adapter_schedule": None, "hand_over": None}
DOMAIN = OWN | {"domain_guidance": True}
SCHEDULES = {  # strength of the adapter over u, at full guidance by the own branch
    "u^0.3": OWN | {"adapter_schedule": {"kind": "power", "tau": 0.3}},
    "u": OWN | {"adapter_schedule": {"kind": "power", "tau": 1.0}},
    "1 - 0.5 u": OWN | {"adapter_schedule": {"kind": "table", "u": [0, 1], "strength": [1, 0.5]}},
}
HAND_OVERS = {f"u0 = {u0}": OWN | {"hand_over": u0} for u0 in (0.1, 0.2, 0.4)}


@dataclass(frozen=True)
class Cell:
    """Weights to sample with: the benchmark's settings, at the rate and length where this side was best there."""

    adapter: str
    images: int
    side: str
    rate: float
    steps: int

    @property
    def name(self) -> str:
        return f"{self.adapter}-{self.images}-{self.side}"

    @property
    def scales(self) -> tuple[float, ...]:
        """The grid of both kinds of guidance; longer where one of them was best at 6."""
        return (*SCALES, 8.0) if self.adapter == "full" else SCALES

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        """What is compared at the best scale of the own branch."""
        if self.images != 8:
            return {}
        return (SCHEDULES if self.adapter == "lora" else {}) | HAND_OVERS


CELLS = [
    Cell("lora", 8, "plain", 5e-3, 45),
    Cell("lora", 8, "difftuning_tau0.3", 5e-3, 180),
    Cell("full", 8, "plain", 6e-4, 45),
    Cell("full", 8, "difftuning_tau0.3", 6e-4, 180),
    Cell("lora", 32, "plain", 5e-3, 90),
    Cell("lora", 32, "difftuning_tau0.3", 5e-3, 90),
]


def recipe_for(cell: Cell, seed: int, work: Path) -> Recipe:
    """The benchmark's recipe for one run of a cell."""
    flags = {
        "method": cell.adapter,
        "data.limit": cell.images,
        "data.cache": work / "cache",
        "bank.path": work / "bank",
        "training.learning_rate": cell.rate,
        "training.max_steps": cell.steps,
        "training.seed": seed,
        "training.resume": True,
        "output": work / f"{cell.name}-{seed}",
    }
    _, command = parse(["pilot", f"--config={HERE / 'benchmark.yaml'}", *(f"--{k}={v}" for k, v in flags.items())])
    recipe = only(Recipe, command)
    return replace(recipe, tuning=side_tuning(cell.side, recipe.tuning, work / "none"))


class Bench:
    """The base, what pictures are judged against, and the names of the search and of the figures."""

    def __init__(self, work: Path):
        self.work = work
        recipe = recipe_for(CELLS[0], 0, work)
        self.family = load_family(recipe.model.id).to(best_device())
        self.features = load_features("lite0", self.family.device)
        found = materials(self.family, recipe)
        captions = [e.caption for e in found.held_out.sample(2 * PICTURES).examples]
        self.prompts = {"search": captions[::2], "final": captions[1::2]}
        self.resolution = found.resolution

    def reference(self, cell: Cell) -> Reference:
        return reference_of(self.family, self.features, materials(self.family, recipe_for(cell, 0, self.work)))

    def judge(self, cell: Cell, seed: int, asked: Iterator[tuple[str, str, dict[str, Any], float]]) -> None:
        """Draw and judge what has no file yet: (file, prompts, settings, scale) each, with one run's weights."""
        folder = self.work / f"{cell.name}-{seed}"
        wanted = [a for a in asked if not (folder / f"{a[0]}.json").exists()]
        if not wanted:
            return
        reference = self.reference(cell)
        with tuned_model(self.family, folder, finished_run(folder)) as tuned:
            before, source = tuned.pipe, self.family.denoiser if tuned is not self.family else None
            tuned.pipe = DiffTuningPipeline.from_pipe(before, source_unet=source)
            for name, names, settings, scale in wanted:
                tuned.pipe.set_extras(**settings)
                prompts = self.prompts[names]
                pictures = Sampling(prompts, [seed], STEPS, scale, self.resolution).draw(tuned)
                row = figures(pictures, prompts, reference)
                write_json(folder / f"{name}.json", {k: row[k] for k in FIGURES} | {"scale": scale, "seed": seed})
                if names == "final" and seed == 0:
                    for i, picture in enumerate(pictures[:8]):
                        (folder / name).mkdir(exist_ok=True)
                        picture.save(folder / name / f"{i}.png")
            tuned.pipe = before


def read(cell: Cell, seed: int, name: str, work: Path) -> dict[str, Any]:
    return json.loads((work / f"{cell.name}-{seed}" / f"{name}.json").read_text())


def best_scale(cell: Cell, mode: str, work: Path) -> float:
    """The scale with the lowest mean KID over the seeds, on the names of the search."""
    return min(cell.scales, key=lambda s: mean(read(cell, seed, f"search-{mode}-{s:g}", work)["kid"] for seed in SEEDS))


def _final(variant: str, scale: float) -> str:
    return f"final-{variant}@{scale:g}"


def measure(cell: Cell, bench: Bench) -> None:
    modes = {"own": OWN, "domain": DOMAIN}
    for seed in SEEDS:
        bench.judge(cell, seed, ((f"search-{m}-{s:g}", "search", e, s) for m, e in modes.items() for s in cell.scales))
    scales = {mode: best_scale(cell, mode, bench.work) for mode in modes}
    asked = [(_final(mode, scales[mode]), "final", extras, scales[mode]) for mode, extras in modes.items()]
    asked += [(_final(name, scales["own"]), "final", extras, scales["own"]) for name, extras in cell.variants.items()]
    for seed in SEEDS:
        bench.judge(cell, seed, iter(asked))
        print(cell.name, seed, scales, flush=True)


def collect(work: Path) -> dict[str, Any]:
    """Every row of every cell, and the search that the scales come from."""
    rows = []
    for cell in CELLS:
        kept = {"adapter": cell.adapter, "n_images": cell.images, "side": cell.side}
        names = [f"search-{m}-{s:g}" for m in ("own", "domain") for s in cell.scales]
        scales = {n: best_scale(cell, n if n == "domain" else "own", work) for n in ("own", "domain", *cell.variants)}
        names += [_final(n, scale) for n, scale in scales.items()]
        for name in names:
            stage, _, variant = name.partition("@")[0].partition("-")
            for seed in SEEDS:
                found = {k: round(v, 5) for k, v in read(cell, seed, name, work).items()}
                rows.append(kept | {"stage": stage, "variant": variant} | found)
    settings = {
        "scales": {cell.name: cell.scales for cell in CELLS},
        "seeds": SEEDS,
        "pictures": PICTURES,
        "steps": STEPS,
        "features": "lite0",
    }
    return {"settings": settings, "versions": versions(), "rows": rows}


def _cell(rows: list[dict[str, Any]], figure: str) -> str:
    factor, digits = (1000, 0) if figure == "kid" else (100, 0) if figure == "domain_hit" else (1, 3)
    values = [factor * r[figure] for r in rows]
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def tables(result: dict[str, Any]) -> str:
    """Domain Guidance against the own branch, and schedules and hand-overs against none, as Markdown."""
    grouped: dict[tuple[str, int, str], dict[str, list[dict[str, Any]]]] = {}
    for row in result["rows"]:
        if row["stage"] == "final":
            cell = grouped.setdefault((row["adapter"], row["n_images"], row["side"]), {})
            cell.setdefault(row["variant"], []).append(row)
    lines = [
        "| weights | guidance | scale | KID × 1000 | domain hit, % | similarity | memorisation |",
        "|---" * 7 + "|",
    ]
    extras = ["| weights | variant | KID × 1000 | domain hit, % | similarity | memorisation |", "|---" * 6 + "|"]
    for (adapter, images, side), variants in grouped.items():
        weights = f"{'LoRA' if adapter == 'lora' else adapter}, {images}, {side}"
        for name, rows in variants.items():
            cells = " | ".join(_cell(rows, f) for f in FIGURES)
            if name in ("own", "domain"):
                label = "own branch" if name == "own" else "Domain Guidance"
                lines.append(f"| {weights} | {label} | {rows[0]['scale']:g} | {cells} |")
            if name != "domain" and len(variants) > 2:
                extras.append(f"| {weights} | {'none' if name == 'own' else name} | {cells} |")
    return "\n".join([*lines, "", *extras])


def grid(work: Path, place: Path, bench: Bench) -> None:
    """The same names by the base and by one plainly tuned model with either guidance."""
    from PIL import Image

    cell = CELLS[2]
    base = Sampling(bench.prompts["final"][:8], [0], STEPS, 4.0, bench.resolution).draw(bench.family)
    rows = {"base": base}
    for label, mode in (("own branch", "own"), ("Domain Guidance", "domain")):
        drawn = work / f"{cell.name}-0" / _final(mode, best_scale(cell, mode, work))
        rows[label] = [Image.open(drawn / f"{i}.png") for i in range(8)]
    save_grid(place, rows, bench.prompts["final"][:8])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/guidance"))
    parser.add_argument("--table", type=Path, help="only print the tables of this file")
    parser.add_argument("--collect", type=Path, help="only write the rows to this file")
    parser.add_argument("--grid", type=Path, help="only write a grid of pictures to this file")
    args = parser.parse_args()
    if args.table is not None:
        print(tables(json.loads(args.table.read_text())))
        return
    if args.collect is not None:
        write_json(args.collect, collect(args.work))
        return
    if args.grid is not None:
        grid(args.work, args.grid, Bench(args.work))
        return
    for cell in CELLS:
        for seed in SEEDS:
            recipe = recipe_for(cell, seed, args.work)
            record = read_run(Path(recipe.output))
            if record is None or not record.is_complete:
                train(recipe)
    bench = Bench(args.work)
    for cell in CELLS:
        measure(cell, bench)


if __name__ == "__main__":
    main()
