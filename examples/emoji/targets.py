"""Eight targets: a pilot on each style, with 8 and with 24 pictures, and what the sides differ by over all of them.

    python examples/emoji/targets.py --work build/targets --worker 0 --workers 2           # one of two processes
    python examples/emoji/targets.py --work build/targets --collect examples/emoji/targets.json
    python examples/emoji/targets.py --table examples/emoji/targets.json                   # the tables

Of every side the learning rate, the length, and the way and scale of guidance are chosen on prompts that the figures do
not use. A cell that is done is not done again, and one that was interrupted goes on. The styles come from npm, by
styles.py; what an effect is says target_effects.py.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from common import digest_of_model, kept_and_new
from styles import STYLES, UNSEEN, WORDED, data_of
from target_effects import at_end, by_target, by_way, cell_of, effect, foresight, seeds_needed

from difftuning_control.evaluation.band_losses import losses_of
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.pilot_record import PilotRecord, read_pilot
from difftuning_control.system.durable import write_json
from difftuning_control.verbs.commands import only
from difftuning_control.verbs.parse import parse
from difftuning_control.verbs.pilot.guidance_search import DOMAIN, MIXTURE, ORDINARY, best_way
from difftuning_control.verbs.pilot.pilot import pilot

HERE = Path(__file__).parent
DEFAULT = "prior"  # what the package does by default, "difftuning" among the rows: ψ = ξ = 1, λ = 0.1
FULL_RATES = [3e-4, 6e-4]
FIRST = ("plain", "difftuning")  # columns of the tables; the others by name
OUTSIDE_FIGURES = ("outside_kid", "still_drawn")  # where the pilot asked
FIGURES = ("kid", "domain_hit", "pair_similarity", "memorisation")


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
    *(Cell(target, 8, "lora") for target in (*UNSEEN, *(f"{style}{WORDED}" for style in STYLES))),
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
    run_pilot(own, flags)


def run_pilot(own: Mapping[str, Any], flags: Sequence[str]) -> None:
    """A pilot with the settings of targets.yaml and some of its own by dotted key, or what is left of it."""
    words = ["pilot", f"--config={HERE / 'targets.yaml'}", *(f"--{k}={v}" for k, v in own.items()), *flags]
    _, command = parse(words)
    pilot(only(Recipe, command), command.pilot, "en", False)


# --- rows -----------------------------------------------------------------------------------------------------------


def rows_of(cell: Cell, record: PilotRecord) -> Iterator[dict[str, Any]]:
    """A row a side and seed, each side at what its search chose; the base's first.

    Forgetting is None where it was measured with other prompts than plain fine-tuning's, as earlier versions did.
    """
    name = {"target": cell.target, "n_images": cell.images, "adapter": cell.adapter}
    base = {figure: record.base[figure] for figure in FIGURES}
    gap = [v for v in ((record.analysis or {}).get("gap") or {}).get("mean", []) if v is not None]
    name["gap"] = mean(gap) if gap else None
    if asked := _outside(record.base).values():
        base |= {figure: mean(row[figure] for row in asked) for figure in OUTSIDE_FIGURES}
    yield {**name, "method": "base", "seed": None, "steps": 0, "guidance": record.settings["guidance_scale"]} | base
    alike = losses_of(record.sides[0]["runs"][0])["bank"].base
    for side in record.sides:
        length, guidance = side["best_length"], side["guidance"]
        way, _ = best_way(guidance)
        chosen, outside = guidance["ways"][way], _outside(side)
        for drawn in chosen["runs"]:
            seed = drawn["seed"]
            trained = next(r for r in side["runs"] if (r["seed"], r["steps"]) == (seed, length))
            losses = losses_of(trained)
            if "bank" in losses and losses["bank"].base != alike:
                del losses["bank"]
            bank = losses.get("bank")
            yield {
                **name,
                "method": "difftuning" if side["name"] == DEFAULT else side["name"],
                "seed": seed,
                "learning_rate": side["learning_rate"],
                "steps": length,
                "guidance": chosen["scale"],
                "way": way,
                **{figure: drawn[figure] for figure in FIGURES},
                **{figure: outside.get(seed, {}).get(figure) for figure in OUTSIDE_FIGURES},
                "forgetting": bank.tuned.mean / bank.base.mean - 1 if bank is not None else None,
                "rise_by_band": {role: change.rises for role, change in losses.items()},
                "kid_by_way": {
                    name: next(r["kid"] for r in found["runs"] if r["seed"] == seed)
                    for name, found in guidance["ways"].items()
                },
                "kid_by_length": {str(r["steps"]): r["kid"] for r in side["runs"] if r["seed"] == seed},
            }


def _outside(side: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """What a side, or the base, draws outside the new domain, by seed; none where it was not asked."""
    return {row["seed"]: row for row in (side.get("outside") or {"runs": []})["runs"]}


def collect(work: Path, targets: Sequence[str]) -> dict[str, Any]:
    """The rows of every finished cell of some targets, and what each took."""
    return collection({work / cell.folder: cell for cell in CELLS if cell.target in targets}, work)


def collection(cells: Mapping[Path, Cell], work: Path) -> dict[str, Any]:
    """The rows of those pilots that are finished, what each took, and their settings.

    Args:
        cells: which cell each folder's pilot is of.
    """
    found = {folder: read_pilot(folder) for folder in cells}
    records = {folder: record for folder, record in found.items() if record is not None}
    if not records:
        raise SystemExit(f"{work} holds no finished pilot; run the study first.")
    some = next(iter(records.values()))
    settings = {k: v for k, v in some.settings.items() if k not in ("method", "learning_rates")}
    settings["model"] = digest_of_model()
    cost = [
        {
            "cell": folder.name,
            "sides": [side["name"] for side in record.sides],
            "seconds": record.cost.seconds,
            "device": record.cost.device,
        }
        for folder, record in records.items()
    ]
    rows = [row for folder, record in records.items() for row in rows_of(cells[folder], record)]
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
    rows = kept_and_new(earlier["rows"], new["rows"], lambda row: (*cell_of(row), row["method"]))
    sides = {entry["cell"]: set(entry["sides"]) for entry in new["cost"]}
    cost = [entry for entry in earlier["cost"] if not set(entry["sides"]) <= sides.get(entry["cell"], set())]
    return {**new, "cost": cost + new["cost"], "rows": sorted(rows, key=lambda row: CELLS.index(cell_of(row)))}


# --- tables ---------------------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> str:
    """The tables of each number of pictures and adapter apart, named where there are several."""
    kinds = dict.fromkeys(cell_of(row)[1:] for row in result["rows"])
    parts = {kind: {**result, "rows": [r for r in result["rows"] if cell_of(r)[1:] == kind]} for kind in kinds}
    named = {kind: f"**{kind[0]} pictures, {kind[1]}**\n\n" if len(parts) > 1 else "" for kind in parts}
    return "\n\n".join(named[kind] + table(part) for kind, part in parts.items())


def table(result: Mapping[str, Any]) -> str:
    """KID × 1000 of every cell and side, and the effects over targets, as Markdown."""
    rows = result["rows"]
    others = {row["method"] for row in rows} - {"base", *FIRST}
    methods = [m for m in (*FIRST, *sorted(others)) if any(row["method"] == m for row in rows)]
    highest = max(result["settings"]["guidance_scales"])
    lines = [
        *cells_table(rows, methods),
        "",
        *plain_table(rows, methods),
        "",
        *outside_table(rows, methods),
        "",
        *ways_table(rows, methods, highest),
        "",
        *bands_table(rows, methods),
        "",
    ]
    rivals = {name: effect(rows, "difftuning", name) for name in methods if name not in ("plain", "difftuning")}
    lines += [f"difftuning against {name}: KID {interval(found)}" for name, found in rivals.items()]
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


def cells_table(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> list[str]:
    """The transfer gap, and KID × 1000 of each side at its best; D where Domain Guidance was."""
    lines = ["| target, pictures | gap | base | " + " | ".join(methods) + " |", "|---" * (len(methods) + 3) + "|"]
    gaps = {cell_of(row): row.get("gap") for row in rows}
    kids = {method: by_target(rows, method, "kid") for method in ("base", *methods)}
    ways = {(cell_of(row), row["method"]): row.get("way") for row in rows}
    for cell, gap in gaps.items():
        shown = []
        for method in methods:
            values = [*kids[method].get(cell, {}).values()]
            spread = 1000 * stdev(values) if len(values) > 1 else 0.0
            way = {DOMAIN: " D", MIXTURE: " M"}.get(ways.get((cell, method)), "")
            shown.append(f"{1000 * mean(values):.0f} ± {spread:.0f}{way}" if values else "")
        base, gap = kids["base"][cell][None], "" if gap is None else f"{gap:.1f}"
        lines.append(f"| {', '.join(map(str, cell))} | {gap} | {1000 * base:.0f} | {' | '.join(shown)} |")
    return lines


def plain_table(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> list[str]:
    """Effects against plain fine-tuning, each side at its best."""
    figures = ("domain_hit", "pair_similarity", "memorisation", "forgetting")
    lines = [
        "| against plain | KID | in the new style | like the true one | memorisation | forgetting |",
        "|---" * 6 + "|",
    ]
    for method in (m for m in methods if m != "plain"):
        points = [effect(rows, method, "plain", name, ratio=False) for name in figures]
        lines.append(f"| {method} | {' | '.join(interval(v) for v in (effect(rows, method, 'plain'), *points))} |")
    return lines


def outside_table(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> list[str]:
    """What sides still draw outside the new domain, where that was asked: still drawn in %, KID × 1000 in brackets."""
    asked = [row for row in rows if row.get("still_drawn") is not None]
    shown = [m for m in ("base", *methods) if any(row["method"] == m for row in asked)]
    if not shown:
        return []
    found = {(m, figure): by_target(asked, m, figure) for m in shown for figure in OUTSIDE_FIGURES}
    cells = list(dict.fromkeys(cell_of(row) for row in asked))
    lines = [f"| still drawn, % (KID × 1000) | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
    for cell in cells:
        values = [[found[m, figure].get(cell, {}).values() for figure in ("still_drawn", "outside_kid")] for m in shown]
        parts = [f"{100 * mean(share):.0f} ({1000 * mean(kid):.0f})" if share else "" for share, kid in values]
        lines.append(f"| {', '.join(map(str, cell))} | {' | '.join(parts)} |")
    points = [effect(asked, m, "plain", "still_drawn", ratio=False) for m in shown if m not in ("base", "plain")]
    lines.append(f"| against plain, points |  |  | {' | '.join(map(interval, points))} |")
    return lines


def ways_table(rows: Sequence[Mapping[str, Any]], methods: Sequence[str], highest: float) -> list[str]:
    """What guidance does to the KID of the same weights, what each side at its best does beside stock pictures, and how
    often its best was the longest length or the highest scale that were tried."""
    ways = by_way(rows)
    others = {DOMAIN: "Domain Guidance for ordinary"}
    if any(MIXTURE in row.get("kid_by_way", {}) for row in rows):
        others[MIXTURE] = "the mixture for ordinary"
    head = ("side", *others.values(), "its best for plain with ordinary", "best at the longest", "at the highest scale")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method in methods:
        own = [effect(ways, f"{method}, {way}", f"{method}, {ORDINARY}") for way in others]
        stock = effect([*rows, *ways], method, f"plain, {ORDINARY}")
        longest, scale, count = at_end(rows, method, highest)
        cells = [*map(interval, (*own, stock)), f"{longest} of {count}", f"{scale} of {count}"]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def bands_table(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> list[str]:
    """How the losses on held-out pictures of the target and of the bank change, from nearly clean to pure noise."""
    bands = len(next(row for row in rows if "rise_by_band" in row)["rise_by_band"]["target"])
    edges = [f"{i / bands:g} to {(i + 1) / bands:g}" for i in range(bands)]
    lines = [f"| side, loss on | u {' | '.join(edges)} |", "|---" * (bands + 1) + "|"]
    for role in ("target", "bank"):
        for method in methods:
            found = [row["rise_by_band"].get(role) for row in rows if row["method"] == method]
            if None in found:
                continue
            shown = " | ".join(f"{mean(band):+.0%}" for band in zip(*found, strict=True))
            lines.append(f"| {method}, {role} | {shown} |")
    return lines


def interval(found: tuple[float, float, float]) -> str:
    """Middle and ends; of one or two targets, which have no ends, the middle."""
    if math.isnan(found[0]):
        return ""
    return f"{found[0]:+.0%}" if math.isnan(found[1]) else "{:+.0%} ({:+.0%} to {:+.0%})".format(*found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/targets"))
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    known = list(dict.fromkeys(cell.target for cell in CELLS))
    parser.add_argument("--targets", nargs="+", choices=known, default=list(STYLES))
    parser.add_argument("--table", type=Path, help="only print the tables of this file")
    parser.add_argument("--collect", type=Path, help="only add the rows of the finished pilots to this file")
    args, flags = parser.parse_known_args()  # what is left goes to every pilot: --pilot.pictures=40
    if args.table is not None:
        print(tables(json.loads(args.table.read_text())))
    elif args.collect is not None:
        rows = collect(args.work, args.targets)
        write_json(args.collect, joined(json.loads(args.collect.read_text()), rows) if args.collect.exists() else rows)
    else:
        for cell in [cell for cell in CELLS if cell.target in args.targets][args.worker :: args.workers]:
            run(cell, args.work, flags)


if __name__ == "__main__":
    main()
