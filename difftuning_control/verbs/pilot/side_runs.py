"""The training runs of a pilot's sides: searched, trained, judged at every length, and kept in the pilot's folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from difftuning_control.adapters.tuning import ControlNetTuning, FullTuning, result_of
from difftuning_control.errors import NonFiniteLossError, UserError
from difftuning_control.evaluation.band_losses import plain_losses
from difftuning_control.evaluation.figures import summarise
from difftuning_control.evaluation.metric_table import lower_is_better
from difftuning_control.families.hub import free_memory
from difftuning_control.recipe.gates import GatesConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import PilotConfig
from difftuning_control.runs.finished import finished_run, tuned_model
from difftuning_control.runs.kept import read_kept_losses, step_folder
from difftuning_control.runs.pilot_files import kept_aside, settle
from difftuning_control.runs.record import RunRecord, read_run
from difftuning_control.system.durable import write_json
from difftuning_control.verbs.pilot.judge import (
    SHOWN,
    Judge,
    best_scales,
    guidance_of,
    judge_scales,
    save_pictures,
    search_scales,
)
from difftuning_control.verbs.pilot.outside_runs import outside_of_side
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
        """The search, and the final runs with the winner."""
        first, *others = self.config.seeds
        tried, diverged = self.search_rates(name, first)
        chosen = self._winner(tried)
        rows = list(tried[chosen])
        for seed in others:
            rows += self.train(name, chosen, seed)
        best = self.best_length(rows)
        guided: list[dict[str, Any]] = []
        for seed in self.config.seeds if self.config.guidance_scales else []:
            guided.append(self._guided(name, chosen, seed, best, guided[0]["scales"] if guided else None))
        guidance = guidance_of(guided) if guided else None
        outside = outside_of_side(self, name, chosen, best, guidance) if self.config.outside else None
        for rate, seed in [*((r, first) for r in tried), *((chosen, s) for s in others)]:
            recipe = self.recipe_of(name, rate, seed)
            self._drop_weights(recipe, keep_result=seed == first)
            settle(Path(recipe.output))
        search = [
            {"learning_rate": rate, "steps": row["steps"], "target_loss": row["target_loss"]}
            | {k: row["search"][k] for k in dict.fromkeys((self.primary, "kid", "domain_hit"))}
            for rate, trial in tried.items()
            for row in trial
            if row["search"] is not None
        ]
        summary = {str(n): summarise([r for r in rows if r["steps"] == n]) for n in self.lengths}
        return {
            "name": name,
            "tuning": self.recipe_of(name, chosen, first).to_dict()["tuning"],
            "learning_rate": chosen,
            "search": search,
            "diverged": diverged,
            "runs": rows,
            "summary": summary,
            "best_length": best,
            "guidance": {"steps": best} | guidance if guidance is not None else None,
            "outside": outside,
            "all_runs": rows + [r for rate in tried if rate != chosen for r in tried[rate]],
        }

    def search_rates(self, name: str, seed: int) -> tuple[dict[float, list[dict[str, Any]]], list[float]]:
        """The rows of every learning rate tried with one seed, and the rates that diverged."""
        tried: dict[float, list[dict[str, Any]]] = {}
        rates, diverged, more = list(self.rates), [], self.config.widen
        while rates:
            rate = rates.pop(0)
            rows = self._try(name, rate, seed)
            if rows is None:
                diverged.append(rate)
            else:
                tried[rate] = rows
            if not rates and tried and more:
                rates, more = beyond(self._winner(tried), [*tried, *diverged]), more - 1
        if not tried:
            raise UserError(
                f"{name} diverged at every learning rate ({', '.join(f'{r:g}' for r in diverged)}); give lower "
                "ones with --pilot.learning_rates."
            )
        return tried, diverged

    def _winner(self, tried: dict[float, list[dict[str, Any]]]) -> float:
        """The learning rate with the best figure on the prompts of the search, at whichever length."""
        if len(tried) == 1:
            return next(iter(tried))
        figures = [(rate, row["search"][self.primary]) for rate, trial in tried.items() for row in trial]
        return self._best(figures, lambda pair: pair[1])[0]

    def best_length(self, rows: list[dict[str, Any]]) -> int:
        """The length with the best figure, over the seeds, on prompts that the final figures do not use."""
        if len(self.lengths) == 1:
            return self.lengths[0]
        means = {
            length: fmean([row["search"][self.primary] for row in rows if row["steps"] == length])
            for length in self.lengths
        }
        return self._best(means, means.__getitem__)

    def _best(self, candidates: Iterable[Any], value: Callable[[Any], Any]) -> Any:
        """The candidate whose value of the primary figure is the best."""
        return (min if lower_is_better(self.primary) else max)(candidates, key=value)

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

    def _try(self, side: str, rate: float, seed: int) -> list[dict[str, Any]] | None:
        """The rows of a run of the search; None if its loss became infinite."""
        try:
            return self.train(side, rate, seed)
        except NonFiniteLossError:
            self.tell(f"      {side} diverged at learning rate {rate:g}")
            return None

    def train(self, side: str, rate: float, seed: int) -> list[dict[str, Any]]:
        """One run, judged at every length; read back where an earlier pilot in this folder has done it."""
        recipe = self.recipe_of(side, rate, seed)
        folder = Path(recipe.output)
        identity = pilot_identity(recipe, self.config)
        searching = len(self.lengths) > 1 or (len(self.rates) > 1 and seed == self.config.seeds[0])
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
        if not self.config.guidance_scales:  # which are tried on the weights of the best length
            self._drop_weights(recipe, keep_result=seed == self.config.seeds[0])
        self.clock.spent()
        return rows

    def _drop_weights(self, recipe: Recipe, keep_result: bool) -> None:
        """What was judged goes: of every run the weights of earlier lengths, and whole models, which are large."""
        for kept in Path(recipe.output).glob("step-*"):
            shutil.rmtree(kept)
        for name in () if keep_result else (FullTuning.result, ControlNetTuning.result):
            shutil.rmtree(Path(recipe.output) / name, ignore_errors=True)

    def _guided(
        self, side: str, rate: float, seed: int, length: int, scales: dict[str, float] | None
    ) -> dict[str, Any]:
        """Figures of a run's weights at a length, each way of guidance at its scale; without scales they are sought."""
        recipe = self.recipe_of(side, rate, seed)
        folder, step = Path(recipe.output), None if length == self.lengths[-1] else length
        done, identity = folder / "guidance.json", [pilot_identity(recipe, self.config), scales, length]
        if done.exists():
            kept = json.loads(done.read_text(encoding="utf-8"))
            if kept["identity"] == identity:
                return kept
        record, phases = self.with_weights(recipe, step), self.clock.phases
        with (
            phases("sampling"),
            tuned_model(self.family, folder, record, step) as tuned,
            phases.counting(tuned.denoiser),
        ):
            searched = []
            if scales is None:
                searched = search_scales(self.judge, self.family, tuned, seed, self.config.guidance_scales)
            chosen = scales or best_scales(searched)
            ways = judge_scales(self.judge, self.family, tuned, seed, chosen)
        guidance = {"identity": identity, "search": searched, "scales": chosen, "ways": ways}
        write_json(done, guidance)
        self.clock.spent()
        return guidance

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
