"""ControlNets on the embedded model: plain training against Diff-Tuning, for three conditions and three seeds.

    python examples/emoji/controlnet.py --work build/controlnet    # train; a second process shares the work
    python examples/emoji/controlnet.py --work build/controlnet --collect examples/emoji/controlnet.json
    python examples/emoji/controlnet.py --table examples/emoji/controlnet.json           # the README's tables
    python examples/emoji/controlnet.py --work build/controlnet --grid grid.png          # pictures by step
    python examples/emoji/controlnet.py --chart examples/emoji/controlnet.json chart.png # fidelity by step

A run that is done is not done again, and one that was interrupted goes on. In a cell every side has the same data,
steps, batch and seeds. Under edges each side's learning rate is the one of two with the best mean fidelity over the
curve of the first seed; the other cells have a fixed one: `canny, slower` the rate that the search rejected, where
convergence is late as it is on large models, icons and lineart the one that it chose for all sides. All figures are on
pictures that were not trained on, and the search looks at the same ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from common import spread, work_through
from PIL import Image

from difftuning_control.data.conditions import conditions_of
from difftuning_control.data.control_spec import SUPPLIED, Conditioner, ControlSpec
from difftuning_control.data.prepare import read_data
from difftuning_control.evaluation import metrics
from difftuning_control.evaluation.convergence import find_convergence
from difftuning_control.evaluation.drawing import sample_pictures, save_grid
from difftuning_control.evaluation.features import load_features
from difftuning_control.evaluation.fidelity import FidelityProbe
from difftuning_control.evaluation.figures import Sampling, through_autoencoder
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
SIDES: dict[str, dict[str, Any]] = {
    "plain": {"tuning.schedule": {"kind": "constant", "tau": None}, **NONE},
    "τ = 1": {"tuning.schedule": {"kind": "power", "tau": 1.0}},
    "τ = 0.3": {"tuning.schedule": {"kind": "power", "tau": 0.3}},
    "τ = 1, no bank": {"tuning.schedule": {"kind": "power", "tau": 1.0}, **NONE},
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is compared: a recipe, sides, steps, and the learning rate where it is not searched for."""

    recipe: str
    sides: tuple[str, ...]
    steps: int
    rate: float | None = None


CELLS = {
    "canny": Cell("canny", ("plain", "τ = 1"), 240),
    "canny, slower": Cell("canny", tuple(SIDES), 480, 7.0e-4),
    "icons": Cell("icons", ("plain", "τ = 1"), 240, 1.5e-3),
    "lineart": Cell("lineart", ("plain", "τ = 1"), 480, 1.5e-3),
}
RATES = (7.0e-4, 1.5e-3)
SEEDS = (0, 1, 2)
GRID_CELL, GRID_STEPS = "lineart", (120, 280, 480)
LABELS = {"plain": "plain", "τ = 1": "Diff-Tuning"}  # the grid's font has no Greek
STYLES = ("noto", "twemoji")
JUDGED = 64  # pictures of each kind that quality is judged on
LAST = 5  # measurements that "at the end" is the mean of


def recipe_of(condition: str, side: str, rate: float, seed: int, work: Path) -> Recipe:
    name = side.replace(" = ", "").replace(", ", "-").replace(" ", "-").replace("τ", "tau")
    output = work / condition.replace(", ", "-") / name / f"lr-{rate:g}" / f"seed-{seed}"
    kept = GRID_STEPS if (condition, seed) == (GRID_CELL, SEEDS[0]) else ()
    training = {
        "max_steps": CELLS[condition].steps,
        "learning_rate": rate,
        "seed": seed,
        "resume": True,
        "validate_every": 0,
        "sample_every": 0,
        "save_at": kept,
    }
    flags = {**SIDES[side], **{f"training.{k}": v for k, v in training.items()}, "data.cache": work / "cache"}
    flags["output"] = output
    given = [f"--{k}={v if isinstance(v, (str, Path)) else json.dumps(v)}" for k, v in flags.items()]
    _, command = parse(["train", f"--config={HERE / f'controlnet_{CELLS[condition].recipe}.yaml'}", *given])
    return only(Recipe, command)


def finished(condition: str, side: str, rate: float, seed: int, work: Path) -> RunRecord | None:
    run = read_run(Path(recipe_of(condition, side, rate, seed, work).output))
    return run if run is not None and run.is_complete else None


def chosen_rate(condition: str, side: str, work: Path) -> float | None:
    """The cell's, or the candidate with the best mean fidelity under edges of the first seed; None until known."""
    if CELLS[condition].rate is not None:
        return CELLS[condition].rate
    runs = {rate: finished("canny", side, rate, SEEDS[0], work) for rate in RATES}
    if any(run is None for run in runs.values()):
        return None
    curve = {r: run.fidelity.values for r, run in runs.items() if run is not None and run.fidelity is not None}
    return max(RATES, key=lambda rate: mean(curve[rate]))


def jobs(work: Path) -> list[tuple[str, str, float, int]]:
    """What can be trained now: the search first, then what it chose."""
    found = [("canny", side, rate, SEEDS[0]) for side in CELLS["canny"].sides for rate in RATES]
    for condition, cell in CELLS.items():
        found += [
            (condition, side, rate, seed)
            for seed in SEEDS
            for side in cell.sides
            if (rate := chosen_rate(condition, side, work)) is not None
        ]
    found.sort(key=lambda job: job[1] not in ("plain", "τ = 1"))  # the main comparison first
    return [job for job in dict.fromkeys(found) if finished(*job, work) is None]


# --- figures at the end ---------------------------------------------------------------------------------------------


class Judge:
    """Draws with a trained ControlNet: the data's style under held-out conditions, and the base's under its own."""

    def __init__(self, condition: str, work: Path):
        recipe = recipe_of(condition, "plain", RATES[0], SEEDS[0], work)
        self.family, self.features = load_family(recipe.model.id), load_features("lite0", torch.device("cpu"))
        held_out = read_data(recipe)[1].sample(JUDGED)
        self.real = self.features(through_autoencoder(self.family, held_out, self.family.native_resolution))
        self.data, self.source = held_out, condition != "icons"
        names = (HERE / "bank_prompts.txt").read_text(encoding="utf-8").split("\n")
        prompts = [f"{STYLES[i % 2]} emoji {name}" for i, name in enumerate(filter(None, names))][:JUDGED]
        self.settings = {"steps": 12, "guidance_scale": 2.0, "resolution": self.family.native_resolution}
        if self.source:
            self.prompts = prompts
            self.drawn = sample_pictures(self.family, prompts, seed=1000, **self.settings)
            self.own = self.features(self.drawn + sample_pictures(self.family, prompts, seed=1001, **self.settings))

    def figures(self, run: Path, record: RunRecord | None, seed: int) -> dict[str, float]:
        """KID to the data's real pictures and to the base's own; `record` None for the base without control."""
        if record is None:
            return self._draw(self.family, None, seed)
        spec = ControlSpec.load(run / "controlnet")
        with tuned_model(self.family, run, record) as tuned:
            return self._draw(tuned, Conditioner(spec), seed)

    def _draw(self, family: Any, conditioner: Conditioner | None, seed: int) -> dict[str, float]:
        side = self.settings["resolution"]
        control = conditions_of(conditioner, self.data, side, lambda n: None) if conditioner is not None else None
        prompts = [e.caption for e in self.data.examples]
        pictures = Sampling(prompts, [seed], control=control, **self.settings).draw(family)
        found = {"kid": metrics.kid(self.real, self.features(pictures))[0]}
        if control is not None and conditioner is not None:
            found |= FidelityProbe.build(conditioner, self.data, control, {}).judge_pictures(pictures)
        if self.source:
            asked = None
            if conditioner is not None and conditioner.spec.annotator != SUPPLIED:
                arrays = [conditioner.condition(np.asarray(p)) for p in self.drawn]
                asked = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
            kept = Sampling(self.prompts, [2000 + seed], control=asked, **self.settings).draw(family)
            found["kid_base_style"] = metrics.kid(self.own, self.features(kept))[0]
            hits, _ = metrics.domain_hit_rate(self.own, self.real, self.features(kept))
            found["style_taken_on"] = hits
        return found


def rows_of(condition: str, work: Path) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """Every finished run of a cell with its curve, figures of those with the chosen rate, and the base's figures."""
    judge, rows = None, []
    for side in CELLS[condition].sides:
        rate = chosen_rate(condition, side, work)
        for candidate, seed in ((c, s) for c in RATES for s in SEEDS):
            record = finished(condition, side, candidate, seed, work)
            if record is None:
                continue
            run = Path(record.recipe_values["output"])
            row = {
                "condition": condition,
                "side": side,
                "learning_rate": candidate,
                "seed": seed,
                "chosen": candidate == rate,
                "steps_per_second": round(record.steps_per_second or 0.0, 3),
                "fidelity": record.fidelity.to_dict() if record.fidelity is not None else None,
            }
            if row["chosen"]:
                done = run / "figures.json"
                if not done.exists():
                    judge = judge or Judge(condition, work)
                    write_json(done, judge.figures(run, record, seed))
                row |= json.loads(done.read_text(encoding="utf-8"))
            rows.append(row)
    done = work / condition.replace(", ", "-") / "base.json"
    if not done.exists() and rows:
        judge = judge or Judge(condition, work)
        write_json(done, [judge.figures(Path(), None, seed) for seed in SEEDS])
    return rows, json.loads(done.read_text(encoding="utf-8")) if rows else []


def collect(work: Path) -> dict[str, Any]:
    """All cells."""
    cells = {condition: rows_of(condition, work) for condition in CELLS}
    rows, bases = [row for found, _ in cells.values() for row in found], {k: base for k, (_, base) in cells.items()}
    if not rows:
        raise SystemExit(f"{work} holds no finished run; train first.")
    recipe = recipe_of("canny", "τ = 1", RATES[0], SEEDS[0], work).to_dict()
    settings = {k: recipe[k] for k in ("data", "tuning", "bank", "training")} | {"rates": RATES, "seeds": SEEDS}
    settings["data"].pop("cache")
    return {"settings": settings, "versions": versions(), "base": bases, "rows": rows}


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


def table(result: dict[str, Any]) -> str:
    """Steps to half of plain's rise, the change point, and figures at the end, as Markdown."""
    head = (
        "condition",
        "side",
        "steps to half-way",
        "change point",
        "fidelity, mean of the curve",
        "at the end",
        "KID × 1000",
        "KID × 1000 to the base's style",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for condition in CELLS:
        rows = [r for r in result["rows"] if r["condition"] == condition and r["chosen"]]
        if not rows:
            continue
        base, plain = result["base"][condition], [r for r in rows if r["side"] == "plain"]
        without = mean(main(r)[1] for r in rows)
        level = (without + mean(mean(main(r)[0][-LAST:]) for r in plain)) / 2
        kids = [spread([1000 * b[k] for b in base], "{:.0f}") if k in base[0] else "" for k in FIGURES]
        lines.append(f"| {condition} | without control | | | {without:.2f} | {without:.2f} | {' | '.join(kids)} |")
        for side in CELLS[condition].sides:
            found = [r for r in rows if r["side"] == side]
            if not found:
                continue
            curves = [(r["fidelity"]["steps"], main(r)[0]) for r in found]
            reached = [half_way(*c, level) for c in curves]
            points = [p.step if (p := find_convergence(*c)) is not None else None for c in curves]
            cells = [
                spread([s for s in steps if s is not None], "{:.0f}")
                if None not in steps
                else f"{sum(s is not None for s in steps)} of {len(steps)} runs"
                for steps in (reached, points)
            ]
            cells += [
                spread([mean(v) for _, v in curves], "{:.3f}"),
                spread([mean(v[-LAST:]) for _, v in curves], "{:.3f}"),
            ]
            cells += [spread([1000 * r[k] for r in found], "{:.0f}") if k in found[0] else "" for k in FIGURES]
            lines.append(f"| {condition} | {side} (lr {found[0]['learning_rate']:g}) | {' | '.join(cells)} |")
    return "\n".join(lines)


FIGURES = ("kid", "kid_base_style")


def main(row: dict[str, Any]) -> tuple[list[float], float]:
    """The main figure over the steps, and its level without control."""
    curve = row["fidelity"]
    return curve["figures"][curve["main"]], curve["without"][curve["main"]]


def grid(work: Path, path: Path, sides: tuple[str, str] = ("plain", "τ = 1"), count: int = 8) -> None:
    """Condition, truth and both sides by step, for held-out pictures of the first seed."""
    family, rows = load_family("embedded"), {}
    for side in sides:
        rate = chosen_rate(GRID_CELL, side, work)
        assert rate is not None
        recipe = recipe_of(GRID_CELL, side, rate, SEEDS[0], work)
        record = finished(GRID_CELL, side, rate, SEEDS[0], work)
        assert record is not None
        run, data = Path(recipe.output), read_data(recipe)[1].sample(count)
        conditioner = Conditioner(ControlSpec.load(run / "controlnet"))
        control = conditions_of(conditioner, data, family.native_resolution, lambda n: None)
        prompts = [e.caption for e in data.examples]
        rows["condition"] = [Image.fromarray(c) for c in control.permute(0, 2, 3, 1).numpy()]
        rows["true picture"] = [e.load() for e in data.examples]
        settings = {"steps": 20, "guidance_scale": 2.0, "resolution": family.native_resolution, "seed": 0}
        rows["without control"] = sample_pictures(family, prompts, **settings)
        for step in GRID_STEPS:
            with tuned_model(family, run, record, step) as tuned:
                rows[f"{LABELS[side]}, {step} steps"] = sample_pictures(tuned, prompts, **settings, control=control)
    first = ("condition", "true picture", "without control")
    later = [f"{LABELS[side]}, {step} steps" for step in GRID_STEPS for side in sides]
    save_grid(path, {name: rows[name] for name in (*first, *later)}, prompts, 96)


def chart(result: dict[str, Any], path: Path, condition: str = "canny, slower") -> None:
    """Fidelity over the steps: every seed as a thin line, their mean as a thick one."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["font.size"] = 9
    figure = Figure(figsize=(6.4, 3.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for side, colour in zip(CELLS[condition].sides, ("#d1495b", "#0072b2", "#d98e04", "#00876c")):
        rows = [r for r in result["rows"] if (r["condition"], r["side"]) == (condition, side) and r["chosen"]]
        if not rows:
            continue
        steps, curves = rows[0]["fidelity"]["steps"], [main(r)[0] for r in rows]
        for curve in curves:
            axes.plot(steps, curve, color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(steps, [mean(v) for v in zip(*curves)], color=colour, linewidth=2, label=side)
    without = next(main(r)[1] for r in result["rows"] if r["condition"] == condition)
    axes.axhline(without, color="#6b7680", linestyle="--", linewidth=1, label="without control")
    axes.set(xlabel="optimizer steps", ylabel="edge F1 on held-out conditions")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path)


def command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/controlnet"))
    parser.add_argument("--judge", nargs="+", choices=CELLS, help="only take the figures of these cells' finished runs")
    parser.add_argument("--table", type=Path, help="only print the table of this file")
    parser.add_argument("--collect", type=Path, help="only write the rows of the finished runs to this file")
    parser.add_argument("--grid", type=Path, help="only draw the pictures by step")
    parser.add_argument("--chart", type=Path, nargs=2, help="only draw the curves of this file into that picture")
    args = parser.parse_args()
    if args.table is not None:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))))
    elif args.judge is not None:
        for condition in args.judge:
            rows_of(condition, args.work)
    elif args.collect is not None:
        write_json(args.collect, collect(args.work))
    elif args.grid is not None:
        grid(args.work, args.grid)
    elif args.chart is not None:
        chart(json.loads(args.chart[0].read_text(encoding="utf-8")), args.chart[1])
    else:
        work_through(lambda: jobs(args.work), lambda job: train(recipe_of(*job, args.work)))


if __name__ == "__main__":
    command()
