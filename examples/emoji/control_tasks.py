"""Five conditions: after how many steps a ControlNet follows them, plain and with what Diff-Tuning changes.

    python examples/emoji/control_tasks.py --work build/control_tasks         # trains; a second process shares the work
    python examples/emoji/control_tasks.py --work build/control_tasks --collect examples/emoji/control_tasks.json
    python examples/emoji/control_tasks.py --table examples/emoji/control_tasks.json
    python examples/emoji/control_tasks.py --work build/control_tasks --grid grid.png     # pictures by step

Edges, line drawings, silhouettes, blocks of colour, and the negative, whose right answer is known in every pixel. The
sides are plain training, Diff-Tuning's noise levels alone, and those with its bank. A run follows its condition
half-way where fidelity on held-out conditions has risen by half of what plain training rises by in the end; one that
does not get there counts with its whole length, and is said. The learning rate of every side has the highest mean
fidelity over the curve, for a seed that the figures do not use, and the search doubles or halves it until the best is
not at an edge. All sides have the same data, steps, rows, searches and seeds. A run that is done is not done again, and
one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
from common import digest_of_model, kept_and_new, spread, work_through
from PIL import Image
from targets import effect, interval

from difftuning_control.data.conditions import conditions_of
from difftuning_control.data.control_spec import Conditioner, ControlSpec
from difftuning_control.data.prepare import read_data
from difftuning_control.evaluation.convergence import find_convergence
from difftuning_control.evaluation.drawing import sample_pictures, save_grid
from difftuning_control.families.loading import load_family
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.runs.finished import tuned_model
from difftuning_control.runs.identity import versions
from difftuning_control.runs.record import RunRecord, read_run
from difftuning_control.system.durable import write_json
from difftuning_control.verbs.commands import only
from difftuning_control.verbs.parse import parse
from difftuning_control.verbs.train import train

HERE = Path(__file__).parent
NONE = {"tuning.retention_ratio": 0.0, "tuning.retention_weight": 0.0}
TASKS: dict[str, dict[str, Any]] = {
    "canny": {"control.annotator": "canny", "control.params": {"low_threshold": 100, "high_threshold": 200}},
    "lineart": {
        "control.annotator": "lineart_standard",
        "control.params": {"guassian_sigma": 2.0, "intensity_threshold": 8},  # its own spelling
    },
    "silhouette": {"control.annotator": "conditions:silhouette"},
    "colours": {"control.annotator": "conditions:colours"},
    "negative": {  # is followed sooner than the others
        "control.annotator": "conditions:negative",
        "control.fidelity.every": 20,
        "training.max_steps": 300,
    },
}
SIDES: dict[str, dict[str, Any]] = {
    "plain": {"tuning.schedule": {"kind": "constant", "tau": None}, **NONE},
    "levels": {"tuning.schedule": {"kind": "power", "tau": 1.0}, **NONE},
    "difftuning": {"tuning.schedule": {"kind": "power", "tau": 1.0}},
}
IN_GRID = {"plain": "plain", "levels": "noise levels"}  # the grid's font has no Greek
SAID = {"plain": "plain", "levels": "ψ = u alone", "difftuning": "ψ = u and bank"}
RATES = (1.4e-3, 2.8e-3, 5.6e-3)
WIDENED = 3  # times at most, by a factor of two
SEARCHED, SEEDS = 100, (0, 1, 2, 3, 4)
GRID_TASK, GRID_STEPS = "lineart", (200, 400, 600)  # shown of the first seed
LAST = 5  # measurements that "in the end" is the mean of


class Job(NamedTuple):
    """One training."""

    task: str
    side: str
    rate: float
    seed: int


def recipe_of(job: Job, work: Path, flags: Sequence[str]) -> Recipe:
    own = {
        **TASKS[job.task],
        **SIDES[job.side],
        "training.learning_rate": job.rate,
        "training.seed": job.seed,
        "training.save_at": list(GRID_STEPS) if (job.task, job.seed) == (GRID_TASK, SEEDS[0]) else [],
        "data.cache": work / "cache",
        "output": work / job.task / job.side / f"lr-{job.rate:g}" / f"seed-{job.seed}",
    }
    given = [f"--{k}={v if isinstance(v, (str, Path)) else json.dumps(v)}" for k, v in own.items()]
    _, command = parse(["train", f"--config={HERE / 'control_tasks.yaml'}", *given, *flags])
    return only(Recipe, command)


class Study:
    """The runs below a folder.

    Args:
        flags: for every run, such as `--training.max_steps=20`.
        tasks: to train, in this order; all when None.
        sides: to train; all when None.
    """

    def __init__(
        self,
        work: Path,
        flags: Sequence[str] = (),
        tasks: Sequence[str] | None = None,
        sides: Sequence[str] | None = None,
    ):
        self.work, self.flags, self.seen = work, flags, dict[Job, RunRecord]()
        self.tasks = list(tasks if tasks is not None else TASKS)
        self.sides = list(sides if sides is not None else SIDES)

    def record(self, job: Job) -> RunRecord | None:
        """Of a run that is done."""
        if job not in self.seen:
            run = read_run(Path(recipe_of(job, self.work, self.flags).output))
            if run is None or not run.is_complete or run.fidelity is None:
                return None
            self.seen[job] = run
        return self.seen[job]

    def score(self, job: Job) -> float | None:
        """Mean fidelity over the curve of a run that is done."""
        record = self.record(job)
        return mean(record.fidelity.values) if record is not None and record.fidelity is not None else None

    def search(self, task: str, side: str) -> tuple[list[Job], float | None]:
        """The runs that the search asks for so far, and the rate that it has chosen once they are done."""
        rates = list(RATES)
        for widened in range(WIDENED + 1):
            runs = [Job(task, side, rate, SEARCHED) for rate in rates]
            scores = [self.score(job) for job in runs]
            if None in scores:
                return runs, None
            best = rates[scores.index(max(score for score in scores if score is not None))]
            if widened == WIDENED or best not in (rates[0], rates[-1]):
                break
            rates = [rates[0] / 2, *rates] if best == rates[0] else [*rates, 2 * rates[-1]]
        return runs, best

    def jobs(self) -> list[Job]:
        """What can be trained now: the searches first, then seed after seed."""
        found: list[Job] = []
        for task in self.tasks:
            for side in self.sides:
                runs, rate = self.search(task, side)
                found += runs if rate is None else [Job(task, side, rate, seed) for seed in SEEDS]
        found.sort(key=lambda job: (self.tasks.index(job.task), job.seed != SEARCHED, job.seed))
        return [job for job in found if self.record(job) is None]

    def work_through(self) -> None:
        """Train what is not trained; a second process shares it."""
        work_through(self.jobs, lambda job: train(recipe_of(job, self.work, self.flags)))

    def rows(self) -> list[dict[str, Any]]:
        """A row a run of the figures, of every side of a task whose runs are all done, where plain training's are."""
        found = []
        for task in TASKS:
            rows = {side: self._rows(task, side) for side in SIDES}
            found += [row for own in rows.values() for row in own] if rows["plain"] else []
        return found

    def _rows(self, task: str, side: str) -> list[dict[str, Any]]:
        """Of one side, with its search; none until each seed is done."""
        runs, rate = self.search(task, side)
        records = [self.record(Job(task, side, rate, seed)) for seed in SEEDS] if rate is not None else []
        curves = [record.fidelity for record in records if record is not None and record.fidelity is not None]
        if len(curves) < len(SEEDS):
            return []
        searched = {f"{job.rate:g}": self.score(job) for job in runs}
        name = {"target": task, "method": side, "learning_rate": rate, "searched": searched}
        return [name | {"seed": seed, "fidelity": curve.to_dict()} for seed, curve in zip(SEEDS, curves)]


def joined(earlier: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What an earlier collection holds beside a new one: other conditions, and other sides of the same.

    Raises:
        SystemExit: if they are of different models.
    """
    if earlier["model"] != new["model"]:
        raise SystemExit(
            f"the earlier rows are of the model {earlier['model']}, the new ones of {new['model']}; "
            "collect into another file."
        )
    rows = kept_and_new(earlier["rows"], new["rows"], lambda row: (row["target"], row["method"]))
    order, sides = list(TASKS), list(SIDES)
    rows.sort(key=lambda row: (order.index(row["target"]), sides.index(row["method"]), row["seed"]))
    return {**new, "rows": rows}


# --- figures --------------------------------------------------------------------------------------------------------


def first_reach(steps: list[int], values: list[float], level: float) -> float | None:
    """The first step at which the curve reaches `level` and stays there; None if it never does.

    A measurement counts if it is at or beyond the level and so is the mean of it and the next one: a single spike does
    not count unless it lies farther beyond the level than its successor falls short. The step is interpolated between
    that measurement and the one before.
    """
    s, v = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    held = np.flatnonzero((v[:-1] >= level) & (v[:-1] + v[1:] >= 2 * level))
    if not len(held):
        return None
    k = int(held[0])
    if k == 0:
        return float(s[0])
    share = (level - v[k - 1]) / (v[k] - v[k - 1])  # the one before is below, or it would have counted itself
    return float(s[k - 1] + share * (s[k] - s[k - 1]))


def half_way(steps: list[int], values: list[float], level: float) -> float | None:
    """When a curve that rises at all first reaches the level; a crossing before its rise is noise."""
    found = find_convergence(steps, values)
    if found is None:
        return None
    kept = [i for i, step in enumerate(steps) if step >= found.start]
    return first_reach([steps[i] for i in kept], [values[i] for i in kept], level)


def measured(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the steps to half-way, whether they were reached, and the mean of the curve and its end."""
    found = []
    for task in dict.fromkeys(row["target"] for row in rows):
        own = [(row, row["fidelity"]["figures"][row["fidelity"]["main"]]) for row in rows if row["target"] == task]
        without = mean(row["fidelity"]["without"][row["fidelity"]["main"]] for row, _ in own)
        ends = [mean(curve[-LAST:]) for row, curve in own if row["method"] == "plain"]
        level = (without + mean(ends)) / 2
        for row, curve in own:
            steps = row["fidelity"]["steps"]
            reached = half_way(steps, curve, level)
            figures = {"half_way": steps[-1] if reached is None else reached, "reached": reached is not None}
            figures |= {"mean": mean(curve), "end": mean(curve[-LAST:]), "without": without}
            found.append(row | figures | {"n_images": 0, "adapter": "controlnet"})
    return found


def table(result: dict[str, Any]) -> str:
    """Every condition and side, and the effects over the conditions with their intervals, as Markdown."""
    rows = measured(result["rows"])
    head = "condition | side | learning rate | steps to half-way | reached | fidelity, mean of the curve | in the end"
    lines = [f"| {head} |", "|---" * 7 + "|"]
    for task in dict.fromkeys(row["target"] for row in rows):
        for side in SIDES:
            own = [row for row in rows if (row["target"], row["method"]) == (task, side)]
            if not own:
                continue
            cells = [spread([row["half_way"] for row in own], "{:.0f}"), f"{sum(r['reached'] for r in own)}/{len(own)}"]
            cells += [spread([row[name] for row in own], "{:.3f}") for name in ("mean", "end")]
            name = f"{task} ({own[0]['without']:.2f}) | {SAID[side]} | {own[0]['learning_rate']:g}"
            lines.append(f"| {name} | {' | '.join(cells)} |")
    head = "against plain | steps to half-way | fidelity, mean of the curve | in the end"
    lines += ["", f"| {head} |", "|---" * 4 + "|"]
    for side in (side for side in SIDES if side != "plain"):
        parts = [effect(rows, side, "plain", name) for name in ("half_way", "mean", "end")]
        lines.append(f"| {SAID[side]} | {' | '.join(interval(part) for part in parts)} |")
    return "\n".join(lines)


def grid(study: Study, path: Path, count: int = 8) -> None:
    """Condition, true picture, and what plain training and the noise levels alone draw by step, first seed."""
    family, rows = load_family("embedded"), {}
    sides = ("plain", "levels")
    for side in sides:
        job = Job(GRID_TASK, side, study.search(GRID_TASK, side)[1] or 0.0, SEEDS[0])
        record, recipe = study.record(job), recipe_of(job, study.work, study.flags)
        if record is None:
            raise SystemExit(f"{study.work} has no finished run of {GRID_TASK}, {side}; run the study first.")
        run, data = Path(recipe.output), read_data(recipe)[1].sample(count)
        conditioner = Conditioner(ControlSpec.load(run / "controlnet"))
        control = conditions_of(conditioner, data, family.native_resolution, lambda n: None)
        prompts = [e.caption for e in data.examples]
        rows["condition"] = [Image.fromarray(c) for c in control.permute(0, 2, 3, 1).numpy()]
        rows["true picture"] = [e.load() for e in data.examples]
        settings = {"steps": 20, "guidance_scale": 2.0, "resolution": family.native_resolution, "seed": 0}
        for step in GRID_STEPS:
            with tuned_model(family, run, record, step) as tuned:
                rows[f"{IN_GRID[side]}, {step} steps"] = sample_pictures(tuned, prompts, **settings, control=control)
    later = [f"{IN_GRID[side]}, {step} steps" for step in GRID_STEPS for side in sides]
    save_grid(path, {name: rows[name] for name in ("condition", "true picture", *later)}, prompts, 96)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/control_tasks"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="to train, in this order")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES), help="to train")
    parser.add_argument("--table", type=Path, help="only print the tables of this file")
    parser.add_argument("--collect", type=Path, help="only add the rows of the finished runs to this file")
    parser.add_argument("--grid", type=Path, help="only draw the pictures by step")
    args, flags = parser.parse_known_args()  # what is left goes to every run: --training.max_steps=20
    if args.table is not None:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))))
    elif args.collect is not None:
        rows = Study(args.work, flags).rows()
        if not rows:
            raise SystemExit(f"{args.work} holds no condition of which plain training is searched and trained.")
        new = {"versions": versions(), "model": digest_of_model(), "rows": rows}
        write_json(args.collect, joined(json.loads(args.collect.read_text()), new) if args.collect.exists() else new)
    elif args.grid is not None:
        grid(Study(args.work, flags), args.grid)
    else:
        Study(args.work, flags, args.tasks, args.sides).work_through()


if __name__ == "__main__":
    main()
