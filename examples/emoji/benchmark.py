"""The benchmark: `difftune pilot` on every cell of adapters × numbers of pictures, and its rows in one JSON file.

    python examples/emoji/benchmark.py --work build/benchmark --worker 0 --workers 2     # one of two processes
    python examples/emoji/benchmark.py --work build/benchmark --collect examples/emoji/benchmark.json
    python examples/emoji/benchmark.py --table examples/emoji/benchmark.json             # the README's tables

A cell that is done is not done again, and one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from difftuning_control.recipe.recipe import Recipe
from difftuning_control.system.durable import write_json
from difftuning_control.verbs.commands import only
from difftuning_control.verbs.parse import parse
from difftuning_control.verbs.pilot.pilot import Pilot

HERE = Path(__file__).parent
RATES = {"lora": [2.5e-3, 5e-3], "full": [3e-4, 6e-4]}
CELLS = [("lora", 8), ("full", 8), ("full", 64), ("lora", 64), ("lora", 32), ("full", 32)]
COLUMNS = ("kid", "fid", "domain_hit", "pair_similarity", "memorisation", "coverage", "target_loss", "bank_loss")


def run(adapter: str, images: int, work: Path, config: Path) -> None:
    flags = {
        "method": adapter,
        "data.limit": images,
        "data.cache": work / "cache",
        "bank.path": work / "bank",
        "pilot.learning_rates": RATES[adapter],
        "output": work / f"{adapter}-{images}",
    }
    _, command = parse(["pilot", f"--config={config}", *(f"--{k}={v}" for k, v in flags.items())])
    recipe = only(Recipe, command)
    Pilot(recipe, command.pilot, Path(recipe.output)).run()


def collect(work: Path) -> dict:
    """Every run of every finished cell as a row, and what it took."""
    rows, cells = [], {}
    for adapter, images in sorted(CELLS):
        path = work / f"{adapter}-{images}" / "pilot.json"
        if not path.exists():
            continue
        pilot = json.loads(path.read_text())
        name = {"adapter": adapter, "n_images": images}
        cells[f"{adapter}-{images}"] = {
            "base": {k: pilot["base"].get(k) for k in COLUMNS},
            "learning_rates": {s["name"]: s["learning_rate"] for s in pilot["sides"]},
            "schedule": pilot["analysis"]["schedule"],
            "gap": pilot["analysis"]["gap"],
            "cost": pilot["cost"],
        }
        for side in pilot["sides"]:
            for r in side["runs"]:
                figures = {k: round(r[k], 5) if r[k] is not None else None for k in COLUMNS}
                rows.append({"method": side["name"], **name, "steps": r["steps"], "seed": r["seed"], **figures})
        settings = {k: v for k, v in pilot["settings"].items() if k not in ("method", "learning_rates")}
        versions = pilot["versions"]
    if not rows:
        raise SystemExit(f"{work} holds no finished cell; run the benchmark first.")
    return {"settings": settings, "versions": versions, "cells": cells, "rows": rows}


def tables(result: dict) -> str:
    """KID (× 1000) and domain hit rate at the length where each side is best, and KID by length, as Markdown."""
    methods = list(dict.fromkeys(r["method"] for r in result["rows"]))
    lengths = result["settings"]["lengths"]
    found: dict[tuple, dict[str, list[float]]] = {}
    for r in result["rows"]:
        for column in ("kid", "domain_hit", "pair_similarity"):
            cell = found.setdefault((r["adapter"], r["n_images"], r["method"], r["steps"]), {})
            cell.setdefault(column, []).append(r[column])

    def best(adapter: str, images: int, method: str) -> tuple[int, dict[str, list[float]]]:
        cells = [(n, found[adapter, images, method, n]) for n in lengths if (adapter, images, method, n) in found]
        return min(cells, key=lambda cell: mean(cell[1]["kid"]))

    head = "| adapter, pictures | base | " + " | ".join(methods) + " | "
    rule = "|---" * (len(methods) + 3) + "|"
    kid = [head + "measured against plain |", rule]
    hit = [head + "similarity to the true icon, plain → measured |", rule]
    for adapter, images in sorted({(r["adapter"], r["n_images"]) for r in result["rows"]}):
        base, each = result["cells"][f"{adapter}-{images}"]["base"], [best(adapter, images, m) for m in methods]
        chosen = dict(zip(methods, each))
        plain, measured = (chosen[m][1] for m in ("plain", "difftuning_measured"))
        start = f"| {adapter}, {images} | "
        cells = [f"{1000 * mean(c['kid']):.0f} ± {1000 * stdev(c['kid']):.0f} ({n})" for n, c in each]
        change = mean(measured["kid"]) / mean(plain["kid"]) - 1
        kid.append(f"{start}{1000 * base['kid']:.0f} | {' | '.join(cells)} | {change:+.0%} |")
        cells = [f"{mean(c['domain_hit']):.0%}" for _, c in each]
        pairs = " → ".join(f"{mean(c['pair_similarity']):.3f}" for c in (plain, measured))
        hit.append(f"{start}{base['domain_hit']:.0%} | {' | '.join(cells)} | {pairs} |")
    by_length = ["| adapter, pictures | side | " + " | ".join(f"{n} steps" for n in lengths) + " |"]
    by_length.append("|---" * (len(lengths) + 2) + "|")
    for adapter, images in sorted({(r["adapter"], r["n_images"]) for r in result["rows"]}):
        for method in ("plain", "difftuning_measured"):
            cells = [f"{1000 * mean(found[adapter, images, method, n]['kid']):.0f}" for n in lengths]
            by_length.append(f"| {adapter}, {images} | {method} | " + " | ".join(cells) + " |")
    return "\n".join([*kid, "", *hit, "", *by_length])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/benchmark"))
    parser.add_argument("--recipe", type=Path, default=HERE / "benchmark.yaml")
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--table", type=Path, help="only print the tables of this file")
    parser.add_argument("--collect", type=Path, help="only write the rows of the finished cells to this file")
    args = parser.parse_args()
    if args.table is not None:
        print(tables(json.loads(args.table.read_text())))
        return
    if args.collect is None:
        for adapter, images in CELLS[args.worker :: args.workers]:
            run(adapter, images, args.work, args.recipe)
        return
    write_json(args.collect, collect(args.work))


if __name__ == "__main__":
    main()
