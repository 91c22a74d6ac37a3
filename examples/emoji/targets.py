"""Eight targets: a pilot on each style, with 8 and with 24 pictures, and what the sides differ by over all of them.

    python examples/emoji/targets.py --work build/targets --worker 0 --workers 2           # one of two processes
    python examples/emoji/targets.py --work build/targets --collect examples/emoji/targets.json
    python examples/emoji/targets.py --table examples/emoji/targets.json                   # the tables

Of every side the learning rate, the length, and the way and scale of guidance are chosen on prompts that the figures do
not use. An effect is the mean over targets of log(KID of a side / KID of another), each a mean over seeds; its interval
is a bootstrap that draws targets, and in each of them seeds, with replacement. A cell that is done is not done again,
and one that was interrupted goes on. The styles come from npm, by styles.py.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
from common import digest_of_model
from styles import STYLES, data_of

from difftuning_control.evaluation.band_losses import losses_of
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.pilot_record import PilotRecord, read_pilot
from difftuning_control.system.durable import write_json
from difftuning_control.verbs.commands import only
from difftuning_control.verbs.parse import parse
from difftuning_control.verbs.pilot.pilot import pilot

HERE = Path(__file__).parent
DEFAULT = "difftuning_tau0.3"  # the package's own, "difftuning" among the rows
RIVALS = ("prior", "teacher_empty", "teacher_own")  # that have no schedule
FULL_RATES = [3e-4, 6e-4]
FIGURES = ("kid", "domain_hit", "pair_similarity", "memorisation")
DRAWS = 10_000  # of the bootstrap


class Cell(NamedTuple):
    """One pilot."""

    target: str
    images: int
    adapter: str

    @property
    def folder(self) -> str:
        return f"{self.target}-{self.images}-{self.adapter}"


CELLS = [
    *(Cell(target, images, "lora") for images in (8, 24) for target in STYLES),
    *(Cell(target, 24, "full") for target in ("icons", "flat")),
]


def run(cell: Cell, work: Path, flags: Sequence[str]) -> None:
    """The pilot of a cell, or what is left of it."""
    tuned_on, held_out = data_of(cell.target, work)
    own = {
        "method": cell.adapter,
        "data.path": tuned_on,
        "data.validation_path": held_out,
        "data.holdout": 0,
        "data.limit": cell.images,
        "data.cache": work / "cache",
        "output": work / cell.folder,
    }
    if cell.adapter == "full":
        own["pilot.learning_rates"] = FULL_RATES
    words = ["pilot", f"--config={HERE / 'targets.yaml'}", *(f"--{k}={v}" for k, v in own.items()), *flags]
    _, command = parse(words)
    recipe = only(Recipe, command)
    pilot(recipe, command.pilot, "en", False)


# --- rows -----------------------------------------------------------------------------------------------------------


def rows_of(cell: Cell, record: PilotRecord) -> Iterator[dict[str, Any]]:
    """A row a side and seed, each side at what its search chose; the base's first."""
    name = {"target": cell.target, "n_images": cell.images, "adapter": cell.adapter}
    base = {figure: record.base[figure] for figure in FIGURES}
    gap = [v for v in ((record.analysis or {}).get("gap") or {}).get("mean", []) if v is not None]
    name["gap"] = mean(gap) if gap else None
    yield {**name, "method": "base", "seed": None, "steps": 0, "guidance": record.settings["guidance_scale"]} | base
    for side in record.sides:
        length, guidance = side["best_length"], side["guidance"]
        way = min(guidance["search"], key=lambda row: row["kid"])["way"]
        chosen = guidance["ways"][way]
        for seed, drawn in zip((r["seed"] for r in chosen["runs"]), chosen["runs"]):
            trained = next(r for r in side["runs"] if (r["seed"], r["steps"]) == (seed, length))
            bank = losses_of(trained)["bank"]
            yield {
                **name,
                "method": "difftuning" if side["name"] == DEFAULT else side["name"],
                "seed": seed,
                "learning_rate": side["learning_rate"],
                "steps": length,
                "guidance": chosen["scale"],
                "way": way,
                **{figure: drawn[figure] for figure in FIGURES},
                "forgetting": bank.tuned.mean / bank.base.mean - 1,
                "kid_by_length": {str(r["steps"]): r["kid"] for r in side["runs"] if r["seed"] == seed},
            }


def collect(work: Path) -> dict[str, Any]:
    """The rows of every finished cell, and what each took."""
    found = {cell: read_pilot(work / cell.folder) for cell in CELLS}
    records = {cell: record for cell, record in found.items() if record is not None}
    if not records:
        raise SystemExit(f"{work} holds no finished pilot; run the study first.")
    some = next(iter(records.values()))
    settings = {k: v for k, v in some.settings.items() if k not in ("method", "learning_rates")}
    settings["model"] = digest_of_model()
    cost = [
        {
            "cell": cell.folder,
            "sides": [side["name"] for side in record.sides],
            "seconds": record.cost.seconds,
            "device": record.cost.device,
        }
        for cell, record in records.items()
    ]
    rows = [row for cell, record in records.items() for row in rows_of(cell, record)]
    return {"settings": settings, "versions": some.versions, "cost": cost, "rows": rows}


def joined(earlier: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier collection holds beside a new one: other cells, and other sides of the same cells.

    Raises:
        SystemExit: if their settings differ, so that their rows could not stand in one table.
    """
    differing = [k for k, v in new["settings"].items() if earlier["settings"].get(k) != v]
    if differing:
        raise SystemExit(
            f"the earlier rows were made with other settings ({', '.join(differing)}); collect into another file."
        )

    def side(row: Mapping[str, Any]) -> tuple:
        return row["target"], row["n_images"], row["adapter"], row["method"]

    replaced = {side(row) for row in new["rows"]}
    order = [(cell.target, cell.images, cell.adapter) for cell in CELLS]
    rows = [row for row in earlier["rows"] if side(row) not in replaced] + new["rows"]
    sides = {entry["cell"]: set(entry["sides"]) for entry in new["cost"]}
    cost = [entry for entry in earlier["cost"] if not set(entry["sides"]) <= sides.get(entry["cell"], set())]
    return {**new, "cost": cost + new["cost"], "rows": sorted(rows, key=lambda row: order.index(side(row)[:3]))}


# --- effects --------------------------------------------------------------------------------------------------------


def by_target(rows: Sequence[Mapping[str, Any]], method: str, figure: str) -> dict[tuple, dict[int, float]]:
    """A side's figure by target, number of pictures and adapter, and by seed."""
    values: dict[tuple, dict[int, float]] = {}
    for row in rows:
        if row["method"] == method:
            values.setdefault((row["target"], row["n_images"], row["adapter"]), {})[row["seed"]] = row[figure]
    return values


def effect(
    rows: Sequence[Mapping[str, Any]],
    method: str,
    against: str,
    figure: str = "kid",
    ratio: bool = True,
    draws: int = DRAWS,
) -> tuple[float, float, float]:
    """Mean over targets of a side's relative (or absolute) difference to another, and its 95 % interval.

    The relative one is exp(mean over targets of log(mean over seeds / mean over seeds)) − 1. Cells of one target are
    drawn together, since they share its pictures.
    """
    ours, theirs = (by_target(rows, name, figure) for name in (method, against))
    cells = sorted(set(ours) & set(theirs))
    if not cells:
        return math.nan, math.nan, math.nan
    pairs = {c: np.array([(ours[c][s], theirs[c][s]) for s in sorted(set(ours[c]) & set(theirs[c]))]) for c in cells}
    targets = sorted({c[0] for c in cells})
    cells_of = [[pairs[c] for c in cells if c[0] == target] for target in targets]

    def one(found: np.ndarray) -> float:
        mine, other = found.mean(0)
        return math.log(max(mine, 1e-6) / max(other, 1e-6)) if ratio else mine - other

    generator = np.random.default_rng(0)
    drawn = np.empty(draws)
    for i in range(draws):
        chosen = (cells_of[j] for j in generator.integers(len(cells_of), size=len(cells_of)))
        drawn[i] = np.mean([one(f[generator.integers(len(f), size=len(f))]) for several in chosen for f in several])
    middle = float(np.mean([one(f) for f in pairs.values()]))
    values = [middle, *np.quantile(drawn, (0.025, 0.975))]
    low, mid, high = sorted(math.expm1(v) if ratio else v for v in values)
    return mid, low, high


def seeds_needed(rows: Sequence[Mapping[str, Any]], difference: float = 0.1) -> float:
    """Pairs of runs after which a relative difference in KID is told from chance (5 %, power 80 %).

    From the spread over the seeds of log(KID / KID of plain), pooled over cells and sides: 7.85 s² / difference².
    """
    plain, spread = by_target(rows, "plain", "kid"), []
    for method in {row["method"] for row in rows} - {"plain", "base"}:
        for cell, seeds in by_target(rows, method, "kid").items():
            logs = [math.log(kid / plain[cell][seed]) for seed, kid in seeds.items() if seed in plain.get(cell, {})]
            spread += [stdev(logs) ** 2] if len(logs) > 1 else []
    return (1.96 + 0.84) ** 2 * mean(spread) / difference**2 if spread else math.nan


class Foresight(NamedTuple):
    """Mean relative difference in KID to plain fine-tuning, over cells.

    Args:
        foreseen: of the side that the transfer gap called for, by a threshold found without the cell's target.
        always: of the one side everywhere.
        hindsight: of the better of both in each cell.
    """

    foreseen: float
    always: float
    hindsight: float


def foresight(rows: Sequence[Mapping[str, Any]], method: str = "difftuning") -> Foresight | None:
    """Does the transfer gap of the pretrained model, measured before any training, say where a side beats plain?

    A threshold on the mean gap over the noise bands, beyond which the side is taken and else plain fine-tuning; each
    target is judged by the threshold that is best for all others. None where no gap was measured.
    """
    ours, plain = by_target(rows, method, "kid"), by_target(rows, "plain", "kid")
    gaps = {(r["target"], r["n_images"], r["adapter"]): r.get("gap") for r in rows}
    gain = {
        c: math.log(mean(ours[c].values()) / mean(plain[c].values()))
        for c in set(ours) & set(plain)
        if gaps[c] is not None
    }
    if not gain:
        return None

    def total(cells: Sequence[tuple], threshold: float) -> float:
        return sum(gain[c] for c in cells if gaps[c] >= threshold)

    cells, found = sorted(gain), 0.0
    for target in {c[0] for c in cells}:
        others, own = [c for c in cells if c[0] != target], [c for c in cells if c[0] == target]
        values = sorted(gaps[c] for c in others)
        candidates = [-math.inf, *((a + b) / 2 for a, b in pairwise(values)), math.inf]
        found += total(own, min(candidates, key=lambda threshold: total(others, threshold)))
    sums = (found, sum(gain.values()), sum(min(v, 0.0) for v in gain.values()))
    return Foresight(*(math.expm1(v / len(cells)) for v in sums))


# --- tables ---------------------------------------------------------------------------------------------------------


def overrun(rows: Sequence[Mapping[str, Any]], method: str) -> dict[str, float]:
    """A side's KID at each length, relative to that of plain fine-tuning at the same one; both at ordinary guidance.

    The geometric mean over cells, each at the learning rate that its search chose.
    """
    found: dict[str, float] = {}
    for length in rows[-1].get("kid_by_length", {}):
        at = [{**row, "kid": row["kid_by_length"][length]} for row in rows if row.get("kid_by_length")]
        found[length] = effect(at, method, "plain", draws=1)[0]
    return found


def table(result: Mapping[str, Any]) -> str:
    """KID × 1000 of every cell and side, and the effects over targets, as Markdown."""
    rows = result["rows"]
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m != "base"]
    lines = ["| target, pictures | base | " + " | ".join(methods) + " |", "|---" * (len(methods) + 2) + "|"]
    for cell in dict.fromkeys((row["target"], row["n_images"], row["adapter"]) for row in rows):
        found = {m: by_target(rows, m, "kid").get(cell, {}) for m in methods}
        base = by_target(rows, "base", "kid")[cell][None]
        shown = [f"{1000 * mean(v.values()):.0f} ± {_spread([*v.values()]):.0f}" if v else "" for v in found.values()]
        lines.append(f"| {cell[0]}, {cell[1]}, {cell[2]} | {1000 * base:.0f} | {' | '.join(shown)} |")
    lines += ["", "| against plain | KID | in the new style | memorisation | forgetting |", "|---|---|---|---|---|"]
    for method in (m for m in methods if m != "plain"):
        kid = effect(rows, method, "plain")
        points = [
            effect(rows, method, "plain", name, ratio=False) for name in ("domain_hit", "memorisation", "forgetting")
        ]
        lines.append(f"| {method} | {' | '.join(interval(v) for v in (kid, *points))} |")
    rivals = {name: effect(rows, "difftuning", name) for name in RIVALS if name in methods}
    lines += ["", *(f"difftuning against {name}: KID {interval(found)}" for name, found in rivals.items())]
    if (seen := foresight(rows)) is not None:
        lines.append(
            f"difftuning or plain by the transfer gap, each target left out of the threshold: KID {seen.foreseen:+.0%};"
            f" difftuning always {seen.always:+.0%}, the better of both in hindsight {seen.hindsight:+.0%}"
        )
    targets = len({row["target"] for row in rows})
    lines.append(
        f"{targets} targets; {seeds_needed(rows):.0f} pairs of runs tell a difference of 10 % in KID from chance."
    )
    return "\n".join(lines)


def interval(found: tuple[float, float, float]) -> str:
    return "{:+.0%} ({:+.0%} to {:+.0%})".format(*found)


def _spread(values: Sequence[float]) -> float:
    return 1000 * stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/targets"))
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--targets", nargs="+", choices=list(STYLES), default=list(STYLES))
    parser.add_argument("--table", type=Path, help="only print the tables of this file")
    parser.add_argument("--collect", type=Path, help="only add the rows of the finished pilots to this file")
    args, flags = parser.parse_known_args()  # what is left goes to every pilot: --pilot.pictures=40
    if args.table is not None:
        print(table(json.loads(args.table.read_text())))
    elif args.collect is not None:
        rows = collect(args.work)
        write_json(args.collect, joined(json.loads(args.collect.read_text()), rows) if args.collect.exists() else rows)
    else:
        for cell in [cell for cell in CELLS if cell.target in args.targets][args.worker :: args.workers]:
            run(cell, args.work, flags)


if __name__ == "__main__":
    main()
