"""T-LoRA against LoRA, each plain and with Diff-Tuning, at 1, 4 and 8 pictures: one pilot a kind and number.

    python examples/emoji/adapters.py --work build/adapters --worker 0 --workers 2       # one of two processes
    python examples/emoji/adapters.py --work build/adapters --collect examples/emoji/adapters.json
    python examples/emoji/adapters.py --table examples/emoji/adapters.json               # the table in docs/results.md

The pilots are those of targets.py, on the line icons of the package: same data, bank, steps, batch and seeds for all
sides, and each its learning rate, length and guidance by the KID of names that the figures do not use. A cell that is
done is not done again, and one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from target_effects import by_target
from targets import DEFAULT, Cell, collection, run_pilot

from difftuning_control.system.durable import write_json

KINDS = {"lora": "LoRA", "tlora": "T-LoRA"}
SIDES = {"plain": "plain", "difftuning": "Diff-Tuning"}
CELLS = [Cell("icons", images, kind) for images in (4, 1, 8) for kind in KINDS]
SHOWN = {
    "KID × 1000": ("kid", 1000, ".0f"),
    "in the new style": ("domain_hit", 1, ".0%"),
    "like the true one": ("pair_similarity", 1, ".3f"),
    "memorisation": ("memorisation", 1, ".3f"),
    "forgetting": ("forgetting", 1, "+.0%"),
}


def name_of(cell: Cell) -> str:
    return f"{cell.adapter}-{cell.images}"


def run(cell: Cell, work: Path, changes: Sequence[str]) -> None:
    """The pilot of a cell, or what is left of it."""
    own = {
        "adapter": json.dumps({"kind": cell.adapter, "rank": 16}),
        "data.path": "embedded/icons",
        "data.validation_path": "embedded/icons-eval",
        "data.holdout": 0,
        "data.limit": cell.images,
        "data.cache": work / "cache",
        "bank.path": work / "bank",
        "pilot.sides": json.dumps(["plain", DEFAULT]),
        "pilot.outside": "[]",
        "output": work / name_of(cell),
    }
    run_pilot(own, changes)


def table(result: Mapping[str, Any]) -> str:
    """Each side at what its search chose, mean ± standard deviation over the seeds, as Markdown."""
    rows = result["rows"]
    names = ("pictures", "adapter", "rate", "steps", "guidance", *SHOWN)
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for images in sorted({row["n_images"] for row in rows}):
        base = next(row for row in rows if row["n_images"] == images and row["method"] == "base")
        lines.append(f"| {images} | base | | | | {' | '.join(shown(rows, base, figure) for figure in SHOWN)} |")
        for kind, side in ((kind, side) for kind in KINDS for side in SIDES):
            some = next((r for r in rows if (r["n_images"], r["adapter"], r["method"]) == (images, kind, side)), None)
            if some is None:
                continue
            name = f"{KINDS[kind]}, {SIDES[side]}"
            chosen = f"{some['learning_rate']:g} | {some['steps']} | {some['way']} {some['guidance']:g}"
            lines.append(f"| {images} | {name} | {chosen} | {' | '.join(shown(rows, some, n) for n in SHOWN)} |")
    return "\n".join(lines)


def shown(rows: Sequence[Mapping[str, Any]], some: Mapping[str, Any], name: str) -> str:
    """A figure of the side that a row is of, over its seeds."""
    figure, times, form = SHOWN[name]
    if some.get(figure) is None:
        return ""
    cell = (some["target"], some["n_images"], some["adapter"])
    values = [times * v for v in by_target(rows, some["method"], figure)[cell].values()]
    text = format(mean(values), form)
    return text if len(values) < 2 else f"{text} ± {format(stdev(values), form.replace('+', ''))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/adapters"))
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cells", nargs="*", choices=[name_of(cell) for cell in CELLS], help="only these")
    parser.add_argument("--table", type=Path, help="only print the table of this file")
    parser.add_argument("--collect", type=Path, help="only write the rows of the finished cells to this file")
    args, changes = parser.parse_known_args()  # what else is given changes the pilot: --training.max_steps 8 …
    if args.table is not None:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))))
    elif args.collect is not None:
        write_json(args.collect, collection({args.work / name_of(cell): cell for cell in CELLS}, args.work))
    else:
        chosen = [cell for cell in CELLS if args.cells is None or name_of(cell) in args.cells]
        for cell in chosen[args.worker :: args.workers]:
            run(cell, args.work, changes)


if __name__ == "__main__":
    main()
