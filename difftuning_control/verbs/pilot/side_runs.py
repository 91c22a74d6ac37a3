"""The training runs of a pilot's sides: searched, trained, judged at every length, and kept in the pilot's folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from difftuning_control.adapters.tuning import ControlNetTuning, FullTuning, result_of
from difftuning_control.errors import NonFiniteLossError, UserError
from difftuning_control.evaluation.band_losses import plain_losses
from difftuning_control.evaluation.figures import summarise
from difftuning_control.evaluation.metric_table import METRICS, lower_is_better
from difftuning_control.families.hub import free_memory
from difftuning_control.recipe.gates import GatesConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import PilotConfig
from difftuning_control.runs.finished import finished_run, tuned_model
from difftuning_control.runs.kept import read_kept_losses, step_folder
from difftuning_control.runs.pilot_files import kept_aside, settle
from difftuning_control.runs.record import RunRecord, read_run
from difftuning_control.system.durable import write_json
from difftuning_control.verbs.pilot.guidance_search import best_way, guidance_of_side
from difftuning_control.verbs.pilot.judge import SHOWN, Judge, save_pictures
from difftuning_control.verbs.pilot.outside_runs import outside_of_side
from difftuning_control.verbs.pilot.race import Row, race
from difftuning_control.verbs.pilot.settings import Clock, pilot_identity
from difftuning_control.verbs.pilot.side_tuning import beyond, side_bank, side_tuning
from difftuning_control.verbs.train import train

if TYPE_CHECKING:
    from difftuning_control.families.family import Family


@dataclass
class SideRuns:
    """Trains the runs of each side and judges them; what is done is read back and not done again.

    Args:
        recipe: of all sides.
        output: the pilot's folder.
        family: the pretrained model.
        judge: draws and judges a tuned model's pictures.
        primary: the figure by which learning rates and lengths are chosen.
        rates: candidates of the search.
        lengths: steps at which every run is judged, rising.
        schedule: file of the measured schedule.
        clock: notes the time that each run has taken.
        tell: told in words of what is being done.
    """

    recipe: Recipe
    config: PilotConfig
    output: Path
    family: Family
    judge: Judge
    primary: str
    rates: list[float]
    lengths: list[int]
    schedule: Path
    clock: Clock
    tell: Callable[[str], object]

    def side(self, name: str) -> dict[str, Any]:
        """The search, and what its winner gives."""
        chosen, tried, diverged = self.search_rates(name)
        for rate in {*tried, *diverged} - {chosen}:
            self._let_go(name, rate)
        rows = tried[chosen]
        best = self.best_length(rows)
        self.tell(f"      best: rate {chosen:g}, {best} steps")
        guidance = guidance_of_side(self, name, chosen, best) if self.config.guidance_scales else None
        if guidance is not None:
            scales = ", ".join(f"{way} {drawn['scale']:g}" for way, drawn in guidance["ways"].items())
            self.tell(f"      guidance: {scales}; {best_way(guidance)[0]} was best")
        outside = outside_of_side(self, name, chosen, best, guidance) if self.config.outside else None
        self._let_go(name, chosen)
        summary = {str(n): summarise([r for r in rows if r["steps"] == n]) for n in self.lengths}
        recipe = self.recipe_of(name, chosen, self.config.seeds[0]).to_dict()
        return {
            "name": name,
            "tuning": recipe["tuning"],
            "bank": recipe["bank"],
            "learning_rate": chosen,
            "search": [row for rate, trial in tried.items() for row in self._searched(rate, trial)],
            "diverged": list(diverged),
            "runs": rows,
            "summary": summary,
            "best_length": best,
            "guidance": guidance,
            "outside": outside,
            "all_runs": [row for trial in (*tried.values(), *diverged.values()) for row in trial],
        }

    def search_rates(self, name: str) -> tuple[float, dict[float, list[Row]], dict[float, list[Row]]]:
        """The learning rate that is best over all seeds, the rows of every one tried, and of those that diverged."""
        tried: dict[float, list[Row]] = {}
        diverged: dict[float, list[Row]] = {}
        rates, first, left = self.rates, self.config.seeds[0], self.config.widen
        while True:
            for rate in rates:
                rows = self._try(name, rate, first)
                (diverged if rows is None else tried)[rate] = list(rows or [])
            before = dict(tried)
            best = race(tried, self.config.seeds, self._figure, lambda rate, seed: self._try(name, rate, seed))
            diverged |= {rate: rows for rate, rows in before.items() if rate not in tried}
            if best is None:
                raise UserError(
                    f"{name} diverged at every learning rate ({', '.join(f'{r:g}' for r in diverged)}); give lower "
                    "ones with --pilot.learning_rates."
                )
            rates = beyond(best, [*tried, *diverged]) if left else []
            if not rates:
                return best, tried, diverged
            left -= 1

    def _figure(self, rows: Sequence[Row]) -> float:
        """Of a learning rate the mean over its seeds of the figure on the prompts of the search, at the best length.

        The lower the better; 0 where only one rate and one length are given, and nothing is searched.
        """
        figures = {n: [row["search"] for row in rows if row["steps"] == n] for n in self.lengths}
        if any(found is None for found in figures[self.lengths[-1]]):
            return 0.0
        sign = 1 if lower_is_better(self.primary) else -1
        return min(sign * fmean(found[self.primary] for found in of_length) for of_length in figures.values())

    def _searched(self, rate: float, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """A learning rate in the search, by length: means over the seeds that it was tried with."""
        searched = []
        for length in self.lengths:
            found = [row for row in rows if row["steps"] == length]
            if any(row["search"] is None for row in found):
                continue
            means = {
                name: fmean([row["search"][name] for row in found])
                for name in dict.fromkeys((self.primary, "kid", "domain_hit"))
            }
            about = {"learning_rate": rate, "steps": length, "seeds": len(found)}
            searched.append(about | {"target_loss": fmean([row["target_loss"] for row in found])} | means)
        return searched

    def best_length(self, rows: Sequence[Row]) -> int:
        """The length with the best figure, over the seeds, on prompts that the final figures do not use."""
        if len(self.lengths) == 1:
            return self.lengths[0]
        means = {
            length: fmean([row["search"][self.primary] for row in rows if row["steps"] == length])
            for length in self.lengths
        }
        return (min if lower_is_better(self.primary) else max)(means, key=means.__getitem__)

    def recipe_of(self, side: str, rate: float, seed: int) -> Recipe:
        """The recipe of one run, which has a folder of its own below the pilot's.

        All sides are measured with the same prompts on the bank, whatever each retains under.
        """
        tuning = side_tuning(side, self.recipe.tuning, self.schedule)
        training = replace(
            self.recipe.training,
            validation_prompts=self.recipe.measured_prompts,
            learning_rate=rate,
            seed=seed,
            save_at=self.lengths[:-1],
            sample_every=0,
            resume=True,
            validate_every=0,
        )
        output = str(self.output / side / f"lr-{rate:g}" / f"seed-{seed}")
        bank = side_bank(side, self.recipe.bank, self.output)
        return replace(self.recipe, tuning=tuning, bank=bank, training=training, gates=GatesConfig(), output=output)

    def _try(self, side: str, rate: float, seed: int) -> list[Row] | None:
        """The rows of a run of the search; None if its loss became infinite."""
        try:
            return self.train(side, rate, seed)
        except NonFiniteLossError:
            self.tell(f"      {side} diverged at learning rate {rate:g}")
            return None

    def train(self, side: str, rate: float, seed: int) -> list[Row]:
        """One run, judged at every length; read back where an earlier pilot in this folder has done it."""
        recipe = self.recipe_of(side, rate, seed)
        folder = Path(recipe.output)
        identity = pilot_identity(recipe, self.config)
        searching = len(self.lengths) > 1 or len(self.rates) > 1
        done = folder / "figures.json"
        if done.exists():
            kept = json.loads(done.read_text(encoding="utf-8"))
            if kept["identity"] == identity and not (searching and any(row["search"] is None for row in kept["rows"])):
                return kept["rows"]
        record = self._train(recipe)
        rows = []
        for length in self.lengths:
            last = length == self.lengths[-1]
            phases = self.clock.phases
            with (
                phases("sampling"),
                tuned_model(self.family, folder, record, None if last else length) as tuned,
                phases.counting(tuned.denoiser),
            ):
                search = self.judge.figures(tuned, seed, False)[0] if searching else None
                final, pictures = self.judge.figures(tuned, seed, True)
            save_pictures(pictures[:SHOWN], folder / f"pictures-{length}")
            losses = record.losses if last else read_kept_losses(folder / step_folder(length))
            if recipe.bank != self.recipe.bank:  # what the other sides forgot was measured on other samples
                losses = {role: change for role, change in losses.items() if role != "bank"}
            rows.append(
                {"seed": seed, "steps": length, "folder": folder.relative_to(self.output).as_posix()}
                | {"seconds": _seconds(record) * length / self.lengths[-1], "search": search, **final}
                | {f"{role}_loss": change.tuned.mean for role, change in losses.items()}
                | {"losses": plain_losses(losses)}
            )
        write_json(done, {"identity": identity, "rows": rows})
        self.tell(f"      rate {rate:g}, seed {seed}: {self.primary} {self._shown(rows)}")
        if not self.config.guidance_scales:  # which are tried on the weights of the best length
            self._drop_weights(recipe, keep_result=seed == self.config.seeds[0])
        self.clock.spent()
        return rows

    def _shown(self, rows: Sequence[Row]) -> str:
        """The primary figure by length: of the search where there is one."""
        form = METRICS[self.primary].form
        figures = [(row["search"] or row)[self.primary] for row in rows]
        return ", ".join(f"{form.format(v)} at {n} steps" for v, n in zip(figures, self.lengths, strict=True))

    def _let_go(self, side: str, rate: float) -> None:
        """What is kept of a rate's runs that are judged is settled, and the weights that nothing asks for go."""
        for seed in self.config.seeds:
            recipe = self.recipe_of(side, rate, seed)
            self._drop_weights(recipe, keep_result=seed == self.config.seeds[0])
            settle(Path(recipe.output))

    def _drop_weights(self, recipe: Recipe, keep_result: bool) -> None:
        """What was judged goes: of every run the weights of earlier lengths, and whole models, which are large."""
        for kept in Path(recipe.output).glob("step-*"):
            shutil.rmtree(kept)
        for name in () if keep_result else (FullTuning.result, ControlNetTuning.result):
            shutil.rmtree(Path(recipe.output) / name, ignore_errors=True)

    def with_weights(self, recipe: Recipe, step: int | None) -> RunRecord:
        """The record of a run whose weights at a step, or at its end, are there."""
        folder = Path(recipe.output)
        if (folder / (result_of(recipe) if step is None else step_folder(step))).exists():
            return finished_run(folder)
        return self._train(recipe)

    def _train(self, recipe: Recipe) -> RunRecord:
        """The run's record; it is trained again where its weights are gone but its figures are wanted."""
        folder = Path(recipe.output)
        weights = [folder / result_of(recipe)]
        weights += [folder / step_folder(step) for step in recipe.training.save_at]
        run = read_run(folder)
        gone = run is not None and run.is_complete and not all(p.exists() for p in weights)
        if gone:
            recipe = replace(recipe, training=replace(recipe.training, resume=False))
        device = self.family.device
        self.family.to("cpu")  # the run loads a model of its own
        try:
            with kept_aside(folder) if gone else nullcontext():
                return train(recipe, overwrite=gone).record
        finally:
            if device.type != "cpu":
                free_memory()  # of the run's model, before this one takes its place
            self.family.to(device)


def _seconds(record: RunRecord) -> float:
    """Of the training itself."""
    return (record.timings.training if record.timings is not None else None) or 0.0
