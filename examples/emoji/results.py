"""Make anew what the repository shows of the embedded model: grids, the demo's picture, and the benchmarks' JSON files.

    python examples/emoji/results.py                       # everything, hours on two cores; what is done is not redone
    python examples/emoji/results.py --stages base demo    # only these
    python examples/emoji/results.py --list

A stage's own work lies in `--work`, in a folder named by the digest of the model's weights, so that no figure of one
model is ever taken for another's; only a finished stage writes into the repository. Where a stage can, two processes of
one thread each share it. The tables for the README go to `tables.md` beside the work. `report.png` is the one picture
that is left: the first page of the demo's report in a browser, 1200 pixels wide.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from common import digest_of_model

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PICTURES = ROOT / "examples" / "pictures"


@dataclass
class Stage:
    """Commands in which {work} is the stage's folder.

    Args:
        first: before the others, one after the other.
        shared: one command that two processes run at the same time, with {worker} in it where each needs its number.
        last: after them.
        copies: file in the stage's folder → its place in the repository.
        tables: scripts' tables, kept in tables.md.
    """

    first: list[str] = field(default_factory=list)
    shared: str | None = None
    last: list[str] = field(default_factory=list)
    copies: dict[str, Path] = field(default_factory=dict)
    tables: str | None = None


def study(script: str, processes: str = " --worker {worker} --workers 2", **more) -> Stage:
    """A script that works through cells, collects them into JSON, and prints tables of it.

    Args:
        processes: what tells it that two share the work; empty where they find that out by themselves.
    """
    collect = f"{script}.py --work {{work}} --collect {{work}}/{script}.json"
    more["last"] = [collect, *more.get("last", [])]
    more["copies"] = {f"{script}.json": HERE / f"{script}.json"} | more.get("copies", {})
    more.setdefault("shared", f"{script}.py --work {{work}}{processes}")
    return Stage(tables=f"{script}.py --table {{work}}/{script}.json", **more)


def alone(script: str, first: tuple[str, ...] = ()) -> Stage:
    """The same, of a script that one process runs."""
    return study(script, first=[*first, f"{script}.py --work {{work}}"], shared=None)


STAGES = {
    "base": Stage(
        first=["prepare.py --work {work}"],
        last=[
            "evaluate_base.py --work {work} --guidance 4 6 8 --steps 20 "
            "--output {work}/base.json --grid {work}/grid.png"
        ],
        copies={"base.json": HERE / "base.json", "grid.png": PICTURES / "base_grid.png"},
    ),
    "survival": Stage(
        last=["survival.py --work {work}/../base --output {work}/survival.json --grid {work}"],
        copies={"survival.json": HERE / "survival.json"},
    ),
    "demo": Stage(
        last=["difftune demo --output {work}/demo --overwrite"],
        copies={"demo/grid.png": PICTURES / "demo_grid.png"},
    ),
    "targets": study("targets"),
    "control_tasks": study(
        "control_tasks",
        processes="",
        last=["control_tasks.py --work {work} --grid {work}/grid.png"],
        copies={"grid.png": PICTURES / "controlnet_grid.png"},
    ),
    "turbo": alone("turbo", ("distil.py --work {work}",)),
    "bank_cost": alone("bank_cost"),
    "adapters": study("adapters"),
    "dit": study("dit", first=["dit.py --work {work} --source"]),
}


def start(command: str, work: Path, worker: int = 0, **settings) -> subprocess.Popen:
    words = [word.format(work=work, worker=worker) for word in command.split()]
    words[0] = str(HERE / words[0] if words[0].endswith(".py") else Path(sys.executable).with_name(words[0]))
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **settings)


def finish(*processes: subprocess.Popen) -> None:
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"{processes[0].args} ended with {codes}; the same command goes on from there.")


def run(name: str, folder: Path) -> None:
    stage, work = STAGES[name], folder / name
    done = work / "done"
    if done.exists():
        print(f"{name}: done before", flush=True)
        return
    print(f"{name} …", flush=True)
    work.mkdir(parents=True, exist_ok=True)
    for command in stage.first:
        finish(start(command, work))
    if stage.shared is not None:
        finish(*[start(stage.shared, work, worker) for worker in (0, 1)])
    for command in stage.last:
        finish(start(command, work))
    if stage.tables is not None:
        with (folder / "tables.md").open("a", encoding="utf-8") as file:
            file.write(f"\n## {name}\n\n")
            file.flush()
            finish(start(stage.tables, work, stdout=file))
    for source, place in stage.copies.items():
        shutil.copyfile(work / source, place)
    done.touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "results")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--list", action="store_true", help="only say what is done")
    args = parser.parse_args()
    folder = args.work.resolve() / digest_of_model()
    for name in args.stages:
        if args.list:
            print(f"{name}: {'done' if (folder / name / 'done').exists() else 'to do'}")
        else:
            run(name, folder)


if __name__ == "__main__":
    main()
