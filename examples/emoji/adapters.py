"""T-LoRA against LoRA, each plain and with Diff-Tuning, at 1, 4 and 8 pictures: one pilot a kind and number.

    python examples/emoji/adapters.py --work build/adapters --worker 0 --workers 2       # one of two processes
    python examples/emoji/adapters.py --work build/adapters --collect examples/emoji/adapters.json
    python examples/emoji/adapters.py --table examples/emoji/adapters.json               # the README's table

All sides have the same data, bank, steps, batch and seeds, and each its learning rate out of the same candidates by the
KID of names of its own; the figures are on other names that were never tuned on. A cell that is done is not done again,
and one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from difftuning_control.recipe.recipe import Recipe
from difftuning_control.system.durable import write_json
from difftuning_control.verbs.commands import only
from difftuning_control.verbs.parse import parse
from difftuning_control.verbs.pilot.pilot import Pilot

HERE = Path(__file__).parent
COLUMNS = ("kid", "fid", "domain_hit", "pair_similarity", "memorisation", "coverage", "target_loss", "bank_loss")
KINDS = {"lora": "LoRA", "tlora": "T-LoRA"}
SIDES = {"plain": "plain", "prior": "Diff-Tuning"}
IMAGES = (1, 4, 8)
CELLS = [(kind, images) for images in (4, 1, 8) for kind in KINDS]
RATES = {4: [2.5e-3, 5e-3, 1e-2], 1: [5e-3, 1e-2], 8: [5e-3, 1e-2]}  # the lowest was never chosen at 4 pictures


SHOWN = {"kid": "{:.0f}", "domain_hit": "{:.0%}", "pair_similarity": "{:.3f}", "memorisation": "{:.3f}"}


def run(kind: str, images: int, work: Path, changes: list[str]) -> None:
    flags = {
        "data.limit": images,
        "data.cache": work / "cache",
        "bank.path": work / "bank",
        "pilot.sides": list(SIDES),
        "pilot.learning_rates": RATES[images],
        "output": work / f"{kind}-{images}",
    }
    given = [f"--adapter={json.dumps({'kind': kind, 'rank': 16})}", *(f"--{k}={v}" for k, v in flags.items()), *changes]
    _, command = parse(["pilot", f"--config={HERE / 'adapters.yaml'}", *given])
    recipe = only(Recipe, command)
    Pilot(recipe, command.pilot, Path(recipe.output)).run()


def collect(work: Path) -> dict[str, Any]:
    """Every run of every finished cell as a row."""
    rows, cells, found = [], {}, {}
    for kind, images in CELLS:
        path = work / f"{kind}-{images}" / "pilot.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        rates = {s["name"]: s["learning_rate"] for s in found["sides"]}
        base = {k: found["base"].get(k) for k in COLUMNS}
        cells[f"{kind}-{images}"] = {"base": base, "learning_rates": rates, "cost": found["cost"]}
        for side in found["sides"]:
            for r in side["runs"]:
                figures = {k: round(r[k], 5) if r[k] is not None else None for k in COLUMNS}
                name = {"kind": kind, "n_images": images, "side": side["name"]}
                rows.append({**name, "steps": r["steps"], "seed": r["seed"], **figures})
    if not rows:
        raise SystemExit(f"{work} holds no finished cell; run the benchmark first.")
    return {"settings": found["settings"], "versions": found["versions"], "cells": cells, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Each side at the length where its KID (× 1000) is best, mean ± standard deviation over the seeds, as Markdown."""
    head = (
        "pictures",
        "adapter",
        "steps",
        "KID × 1000",
        "domain hit rate",
        "similarity to the true icon",
        "memorisation",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for images in IMAGES:
        base = next((c["base"] for k, c in result["cells"].items() if k.endswith(f"-{images}")), None)
        if base is None:
            continue
        lines.append(f"| {images} | base | | {' | '.join(shown(name, [base[name]]) for name in SHOWN)} |")
        for kind, side in ((kind, side) for kind in KINDS for side in SIDES):
            rows = [r for r in result["rows"] if (r["kind"], r["n_images"], r["side"]) == (kind, images, side)]
            lengths = {n: [r for r in rows if r["steps"] == n] for n in result["settings"]["lengths"]}
            reached = {n: found for n, found in lengths.items() if found}
            if reached:
                best = min(reached, key=lambda n: mean(r["kid"] for r in reached[n]))
                cells = [shown(name, [r[name] for r in reached[best]]) for name in SHOWN]
                lines.append(f"| {images} | {KINDS[kind]}, {SIDES[side]} | {best} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(name: str, values: list[float | None]) -> str:
    numbers = [v * (1000 if name == "kid" else 1) for v in values if v is not None]
    if not numbers:
        return ""
    text = SHOWN[name].format(mean(numbers))
    return text if len(numbers) < 2 else f"{text} ± {SHOWN[name].format(stdev(numbers))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/adapters"))
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cells", nargs="*", help="only these, such as lora-4")
    parser.add_argument("--table", type=Path, help="only print the table of this file")
    parser.add_argument("--collect", type=Path, help="only write the rows of the finished cells to this file")
    args, changes = parser.parse_known_args()  # what else is given changes the pilot: --training.max_steps 8 …
    if args.table is not None:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))))
    elif args.collect is not None:
        write_json(args.collect, collect(args.work))
    else:
        chosen = [c for c in CELLS if args.cells is None or "{}-{}".format(*c) in args.cells]
        for kind, images in chosen[args.worker :: args.workers]:
            run(kind, images, args.work, changes)


if __name__ == "__main__":
    main()
