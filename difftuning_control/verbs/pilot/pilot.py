"""`difftune pilot`: is Diff-Tuning better than plain fine-tuning on these data, and with which setting?

Every side trains the same steps on the same data with the same seeds. Its learning rate is chosen by the same search:
all candidates with the first seed, judged on prompts that the final figures do not use; the other seeds then train with
the winner. The measured schedule comes from one analysis of the pretrained model at the start.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from difftuning_control.adapters.tuning import ControlNetTuning, FullTuning, result_of
from difftuning_control.data.buckets import describe, into_buckets
from difftuning_control.data.control_spec import Conditioner
from difftuning_control.data.framing import Framing
from difftuning_control.data.prepare import Materials, copies_held_out, materials, read_data, resolution_of
from difftuning_control.errors import NonFiniteLossError, UserError
from difftuning_control.evaluation.comparison import LOWER_IS_BETTER
from difftuning_control.evaluation.features import load_features
from difftuning_control.evaluation.fidelity import main_figure
from difftuning_control.evaluation.figures import check_held_out, summarise, through_autoencoder
from difftuning_control.families.hub import best_device
from difftuning_control.families.loading import load_base
from difftuning_control.objective.budget import spread_budget
from difftuning_control.pipelines.domain_guidance import check_domain_family
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import POWER, AnalysisConfig, PilotConfig
from difftuning_control.recipe.training import GatesConfig, ScheduleConfig, TuningConfig
from difftuning_control.runs.audit import Session, clear_but_audit
from difftuning_control.runs.finished import finished_run, tuned_model
from difftuning_control.runs.folder import data_places, refuse_among_data, refuse_unwritable, written_places
from difftuning_control.runs.pilot_files import RESULT, SETTINGS, VOUCHED, manifest_of, settle
from difftuning_control.runs.record import deciding_settings, describe_device, read_run, versions
from difftuning_control.system.digests import digest_of, digest_of_file
from difftuning_control.system.durable import is_empty, write_json
from difftuning_control.training.control_inputs import build_spec
from difftuning_control.verbs.analyze import measure, read_multipliers
from difftuning_control.verbs.pilot.judge import best_scales, guidance_of, judge_of, judge_scales, search_scales
from difftuning_control.verbs.train import train

PRIMARY = "kid"
SHOWN = 8
BUDGET, ALLOWED = "difftuning_budget", 0.1


def side_tuning(side: str, base: TuningConfig, schedule: Path) -> TuningConfig:
    """A side's objective: the recipe's with another schedule; for plain without a bank.

    Args:
        schedule: file of the measured schedule.
    """
    allowed, base = base.forgetting_budget, replace(base, forgetting_budget=None)
    if side == "plain":
        return replace(base, schedule=ScheduleConfig("constant"), retention_ratio=0.0, retention_weight=0.0)
    if side == "prior":
        return replace(base, schedule=ScheduleConfig("constant", xi=1.0))
    if side == "difftuning_measured":
        return replace(base, schedule=ScheduleConfig("measured", path=str(schedule)))
    if (match := POWER.fullmatch(side)) is not None:
        return replace(base, schedule=ScheduleConfig("power", tau=float(match[1])))
    return replace(
        base, schedule=ScheduleConfig("constant", xi=1.0), forgetting_budget=ALLOWED if allowed is None else allowed
    )


class Pilot:
    """One pilot in one folder; what is done is kept and not done again.

    Args:
        recipe: model, data, bank, adapter and training of all sides.
        output: the pilot's folder.
        tell: told in words of what is being done.
    """

    def __init__(self, recipe: Recipe, config: PilotConfig, output: Path, tell: Callable[[str], object] = print):
        training = recipe.training
        if not recipe.uses_bank:
            raise UserError(
                "the recipe's tuning.retention_ratio and retention_weight are 0, so every side would be plain "
                "fine-tuning; set both above 0 (a pilot leaves them out of plain by itself)."
            )
        if recipe.method == "controlnet" and BUDGET in config.sides:
            raise UserError(f"{BUDGET} bounds what a denoiser forgets, and a ControlNet's stays the same; omit it.")
        if config.guidance_scales and recipe.method == "controlnet":
            raise UserError(
                "pilot.guidance_scales try Domain Guidance, but a ControlNet's denoiser is the pretrained one; leave "
                "them out."
            )
        if recipe.training.stop_when is not None:
            raise UserError("a pilot compares runs of equal length; leave out training.stop_when.")
        self.clock = time.time()
        self.config, self.output, self.tell = config, output, tell
        self.lengths = sorted(config.lengths or [training.max_steps])
        if len(self.lengths) > 1 and training.lr_scheduler in ("cosine", "linear"):
            raise UserError(
                f"pilot.lengths are read off one run, but training.lr_scheduler {training.lr_scheduler} ends with it; "
                "use constant with an ema_decay, or one length."
            )
        if self.lengths[-1] != training.max_steps:
            raise UserError(
                f"pilot.lengths ends with {self.lengths[-1]}, training.max_steps is {training.max_steps}; make "
                "them equal."
            )
        self.rates = config.learning_rates or [training.learning_rate * f for f in (0.5, 1.0, 2.0)]
        bank = replace(recipe.bank, path=recipe.bank.path or str(output / "bank"))
        self.recipe = replace(recipe, bank=bank)
        self.schedule = output / "schedule.json"
        self.features = load_features(config.features, best_device())
        data, held_out = read_data(recipe, tell)
        check_held_out(held_out)
        if copies_held_out(data, held_out):
            raise UserError(
                f"{copies_held_out(data, held_out)[0]}, or name other pictures with --data.validation_path: a pilot is "
                "judged on pictures that were not tuned on."
            )
        self.family = load_base(recipe).to(best_device())
        if config.guidance_scales:
            check_domain_family(self.family, "pilot.guidance_scales")
        self.conditioner, self.primary = None, PRIMARY
        if recipe.method == "controlnet":
            spec = build_spec(recipe, self.family, resolution_of(self.family, recipe.data))
            self.conditioner, self.primary = Conditioner(spec, self.family.device), main_figure(spec)

    def run(self) -> dict[str, Any]:
        """All of it; returns what `pilot.json` holds."""
        self.tell(f"[1/{len(self.config.sides) + 2}] bank, analysis and reference")
        found = materials(self.family, self.recipe)
        self._check_inputs(found)
        self.judge = judge_of(self.config, self.family, self.features, self.conditioner, found)
        analysis = self._analyze(found)
        base, pictures = self._base(found)
        sides = []
        for number, side in enumerate(self.config.sides, start=2):
            self.tell(f"[{number}/{len(self.config.sides) + 2}] {side}")
            sides.append(self.side(side))
        losses = sides[0]["runs"][0]["losses"]
        base |= {f"{role}_loss": _mean(bands["base"]["loss"]) for role, bands in losses.items()}
        result = {
            "status": "complete",
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "created": time.strftime("%Y-%m-%d %H:%M"),
            "model": self.recipe.model.id,
            "data": analysis["data"] | {"held_out": len(found.held_out), "buckets": self._buckets(found)},
            "settings": self._settings(),
            "primary": self.primary,
            "cost": {
                "seconds": self._spent(),
                "training_seconds": sum(
                    r["seconds"] for s in sides for r in s["all_runs"] if r["steps"] == self.lengths[-1]
                ),
                "runs": sum(len({r["folder"] for r in s["all_runs"]}) for s in sides),
                "device": describe_device(self.family.device),
            },
            "versions": versions(),
            "recipe": self.recipe.to_dict(),
            "base": base,
            "sides": [{k: v for k, v in s.items() if k != "all_runs"} for s in sides],
            "analysis": analysis,
            "pictures": {"prompts": self.judge.final.prompts[:SHOWN], "rows": pictures + self._shown(sides)},
            "budget": self._budget(sides),
        }
        write_json(self.output / RESULT, result | manifest_of(self.output))
        return result

    def _buckets(self, found: Materials) -> dict[str, Any] | None:
        """How the sides frame their pictures, where that is not in squares."""
        config = self.recipe.data
        if not config.buckets:
            return None
        return describe(into_buckets(self.family, config, found.data, Framing.of(config, found.resolution)))

    def _settings(self) -> dict[str, Any]:
        config, training = self.config, self.recipe.training
        return {
            "method": self.recipe.method,
            "steps": training.max_steps,
            "lengths": self.lengths,
            "batch_size": training.batch_size,
            "seeds": config.seeds,
            "learning_rates": self.rates,
            "pictures": config.pictures,
            "guidance_scale": config.guidance_scale,
            "sampling_steps": config.steps,
            "features": config.features,
            "guidance_scales": config.guidance_scales,
        }

    # --- what all sides share ---------------------------------------------------------------------------------------

    def _check_inputs(self, found: Materials) -> None:
        """Refuse to go on with other data, another bank or another base than those that the pilot began with."""
        parts = [found.data.fingerprint, found.held_out.fingerprint, found.bank.fingerprint, self.family.fingerprint]
        marker = _marker(self.output)
        if marker.setdefault("inputs", parts) != parts:
            raise UserError(
                f"the data, the bank or the base have changed since the pilot in {self.output} began; start afresh "
                "with --overwrite, or choose another --output."
            )
        write_json(self.output / SETTINGS, marker)

    def _spent(self) -> float:
        """Seconds of this and of all earlier sessions of the pilot; the clock starts anew."""
        marker = _marker(self.output)
        now = time.time()
        marker["seconds"] = marker.get("seconds", 0.0) + now - self.clock
        self.clock = now
        write_json(self.output / SETTINGS, marker)
        return marker["seconds"]

    def _analyze(self, found: Materials) -> dict[str, Any]:
        path = self.output / "analysis.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        config = AnalysisConfig(seed=self.config.seeds[0])
        analysis = measure(self.family, self.recipe, found, config) | {"status": "complete"}
        write_json(self.schedule, analysis["schedule"])
        write_json(path, analysis)
        return analysis

    def _base(self, found: Materials) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Figures of the pretrained model, and the rows of true and base pictures."""
        folder = self.output / "base"
        runs, rows = [], []
        for seed in self.config.seeds:
            path = folder / f"seed-{seed}.json"
            if not path.exists():
                row, pictures = self.judge.figures(self.family, seed, True)
                _save(pictures[:SHOWN], folder / f"seed-{seed}")
                write_json(path, row | {"seed": seed})
            runs.append(json.loads(path.read_text(encoding="utf-8")))
        prompts = self.judge.final.prompts[:SHOWN]
        true = {e.caption: e for e in found.held_out.examples}
        chosen = replace(found.held_out, examples=[true[p] for p in prompts])
        _save(through_autoencoder(self.family, chosen, found.resolution), self.output / "truth")
        for name, place in (("truth", "truth"), ("base", f"base/seed-{self.config.seeds[0]}")):
            rows.append({"name": name, "files": [f"{place}/{i}.png" for i in range(len(prompts))]})
        return {name: value["mean"] for name, value in summarise(runs).items()} | {"runs": runs}, rows

    def _budget(self, sides: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Of the side with a forgetting budget: was it kept, and what did it cost on the target against plain."""
        found = {s["name"]: s for s in sides}
        if BUDGET not in found:
            return None
        side, length = found[BUDGET], found[BUDGET]["best_length"]
        rows = [r for r in side["runs"] if r["steps"] == length]
        bands = [[r["losses"]["bank"][k]["loss"] for k in ("base", "tuned")] for r in rows]
        rises = [[after / before - 1 for before, after in zip(*pair)] for pair in bands]
        loss, plain = (found[n]["summary"][str(length)]["target_loss"]["mean"] for n in (BUDGET, "plain"))
        return {
            "side": BUDGET,
            "allowed": spread_budget(side["tuning"]["forgetting_budget"]),
            "rise": [_mean(list(column)) for column in zip(*rises)],
            "multipliers": read_multipliers(self.output / rows[0]["folder"]),
            "target_cost": loss / plain - 1,
        }

    def _shown(self, sides: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = []
        for side in sides:
            run = next(r for r in side["runs"] if r["steps"] == side["best_length"])
            place = f"{run['folder']}/pictures-{run['steps']}"
            count = min(SHOWN, len(self.judge.final.prompts))
            rows.append({"name": side["name"], "files": [f"{place}/{i}.png" for i in range(count)]})
        return rows

    # --- a side -----------------------------------------------------------------------------------------------------

    def side(self, name: str) -> dict[str, Any]:
        """The search, and the final runs with the winner."""
        first, *others = self.config.seeds
        tried = {rate: rows for rate in self.rates if (rows := self._try(name, rate, first)) is not None}
        if not tried:
            raise UserError(
                f"{name} diverged at every learning rate ({', '.join(f'{r:g}' for r in self.rates)}); give lower "
                "ones with --pilot.learning_rates."
            )
        chosen = next(iter(tried))
        if len(tried) > 1:
            found = [(rate, row["search"][self.primary]) for rate, trial in tried.items() for row in trial]
            chosen = self._best(found, lambda pair: pair[1])[0]
        rows = list(tried[chosen])
        guided = [self._guided(name, chosen, first, None)] if self.config.guidance_scales else []
        for seed in others:
            rows += self.train(name, chosen, seed)
            if guided:
                guided.append(self._guided(name, chosen, seed, guided[0]["scales"]))
            self._drop_weights(self._recipe(name, chosen, seed))
        for rate, seed in [*((r, first) for r in tried), *((chosen, s) for s in others)]:
            settle(Path(self._recipe(name, rate, seed).output))
        search = [
            {"learning_rate": rate, "steps": row["steps"], "target_loss": row["target_loss"]}
            | {k: row["search"][k] for k in dict.fromkeys((self.primary, "kid", "domain_hit"))}
            for rate, trial in tried.items()
            for row in trial
            if row["search"] is not None
        ]
        summary = {str(n): summarise([r for r in rows if r["steps"] == n]) for n in self.lengths}
        best = self._best(self.lengths, lambda n: summary[str(n)][self.primary]["mean"])
        return {
            "name": name,
            "tuning": self._recipe(name, chosen, first).to_dict()["tuning"],
            "learning_rate": chosen,
            "search": search,
            "diverged": [rate for rate in self.rates if rate not in tried],
            "runs": rows,
            "summary": summary,
            "best_length": best,
            "guidance": guidance_of(guided) if guided else None,
            "all_runs": rows + [r for rate in tried if rate != chosen for r in tried[rate]],
        }

    def _best(self, candidates: Iterable[Any], value: Callable[[Any], Any]) -> Any:
        """The candidate whose value of the primary figure is the best."""
        return (min if self.primary in LOWER_IS_BETTER else max)(candidates, key=value)

    def _recipe(self, side: str, rate: float, seed: int) -> Recipe:
        training = replace(
            self.recipe.training,
            learning_rate=rate,
            seed=seed,
            save_at=self.lengths[:-1],
            sample_every=0,
            resume=True,
            validate_every=0,
        )
        tuning = side_tuning(side, self.recipe.tuning, self.schedule)
        output = str(self.output / side / f"lr-{rate:g}" / f"seed-{seed}")
        return replace(self.recipe, tuning=tuning, training=training, gates=GatesConfig(), output=output)

    def _try(self, side: str, rate: float, seed: int) -> list[dict[str, Any]] | None:
        """The rows of a run of the search; None if its loss became infinite."""
        try:
            return self.train(side, rate, seed)
        except NonFiniteLossError:
            self.tell(f"      {side} diverged at learning rate {rate:g}")
            return None

    def train(self, side: str, rate: float, seed: int) -> list[dict[str, Any]]:
        """One run, judged at every length; read back where an earlier pilot in this folder has done it."""
        recipe = self._recipe(side, rate, seed)
        folder = Path(recipe.output)
        identity = _identity(recipe, self.config)
        done = folder / "figures.json"
        if done.exists():
            kept = json.loads(done.read_text(encoding="utf-8"))
            if kept["identity"] == identity:
                return kept["rows"]
        record = self._train(recipe)
        rows = []
        for length in self.lengths:
            last = length == self.lengths[-1]
            with tuned_model(self.family, folder, record, None if last else length) as tuned:
                searching = len(self.rates) > 1 and seed == self.config.seeds[0]
                search = self.judge.figures(tuned, seed, False)[0] if searching else None
                final, pictures = self.judge.figures(tuned, seed, True)
            _save(pictures[:SHOWN], folder / f"pictures-{length}")
            kept = folder / f"step-{length:06d}" / "losses.json"
            losses = record["losses"] if last else json.loads(kept.read_text(encoding="utf-8"))
            rows.append(
                {"seed": seed, "steps": length, "folder": str(folder.relative_to(self.output))}
                | {"seconds": record["timings"]["training"] * length / self.lengths[-1], "search": search, **final}
                | {f"{role}_loss": _mean(bands["tuned"]["loss"]) for role, bands in losses.items()}
                | {"losses": losses}
            )
        write_json(done, {"identity": identity, "rows": rows})
        for kept in folder.glob("step-*"):
            shutil.rmtree(kept)
        self._spent()
        return rows

    def _drop_weights(self, recipe: Recipe) -> None:
        """Whole models that were judged are large; those of the first seed stay."""
        for name in (FullTuning.result, ControlNetTuning.result):
            shutil.rmtree(Path(recipe.output) / name, ignore_errors=True)

    def _guided(self, side: str, rate: float, seed: int, scales: dict[str, float] | None) -> dict[str, Any]:
        """Figures of a run's final weights under each way of guidance at its scale; without scales they are sought."""
        recipe = self._recipe(side, rate, seed)
        folder = Path(recipe.output)
        done, identity = folder / "guidance.json", [_identity(recipe, self.config), scales]
        if done.exists():
            kept = json.loads(done.read_text(encoding="utf-8"))
            if kept["identity"] == identity:
                return kept
        if not (folder / result_of(recipe)).exists():
            (folder / "figures.json").unlink()  # or it would not be trained and judged again
            self.train(side, rate, seed)
        with tuned_model(self.family, folder, finished_run(folder)) as tuned:
            searched = []
            if scales is None:
                searched = search_scales(self.judge, self.family, tuned, seed, self.config.guidance_scales)
            chosen = scales or best_scales(searched)
            ways = judge_scales(self.judge, self.family, tuned, seed, chosen)
        found = {"identity": identity, "search": searched, "scales": chosen, "ways": ways}
        write_json(done, found)
        self._spent()
        return found

    def _train(self, recipe: Recipe) -> dict[str, Any]:
        """The run's record; it is trained again where its weights are gone but its figures are wanted."""
        folder = Path(recipe.output)
        weights = [folder / result_of(recipe)]
        weights += [folder / f"step-{step:06d}" for step in recipe.training.save_at]
        run = read_run(folder)
        gone = run is not None and run["status"] == "complete" and not all(p.exists() for p in weights)
        if gone:
            recipe = replace(recipe, training=replace(recipe.training, resume=False))
        device = self.family.device
        self.family.to("cpu")  # the run loads a model of its own
        try:
            return train(recipe, overwrite=gone)
        finally:
            self.family.to(device)


def _identity(recipe: Recipe, config: PilotConfig) -> str:
    """A digest of the settings that the figures depend on: not of where they lie, nor of what only watches."""
    return digest_of([deciding_settings(recipe), vars(config)])


def _marker(output: Path) -> dict[str, Any]:
    path = output / SETTINGS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _save(pictures: list[Image.Image], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i}.png")


def pilot(
    recipe: Recipe, config: PilotConfig, language: str, overwrite: bool, tell: Callable[[str], object] = print
) -> dict[str, Any]:
    """Run the pilot in the recipe's output and write `pilot.json` and `report.html`.

    Raises:
        UserError: if the output holds something else, or another pilot without `overwrite`.
    """
    from difftuning_control.evaluation.report.pages import write_pilot_report

    output = Path(recipe.output)
    for option, place in written_places(recipe).items():
        refuse_among_data(place, data_places(recipe), option)
    marker, identity = output / SETTINGS, _identity(recipe, config)
    refuse_unwritable(output)
    if output.exists() and not is_empty(output):
        if not marker.exists():
            raise UserError(f"the output {output} is not empty and holds no pilot; choose another folder.")
        if _marker(output)["identity"] != identity and not overwrite:
            raise UserError(
                f"the output {output} holds a pilot with other settings; give --overwrite to replace it, or another "
                "--output."
            )
    torch.manual_seed(recipe.training.seed)
    job = Pilot(recipe, config, output, tell)
    if overwrite:
        clear_but_audit(output)
    with Session(output) as session:
        write_json(marker, _marker(output) | {"identity": identity})
        session.begin()
        result = job.run()
        tell(f"report: {write_pilot_report(result, output, language)}")
        session.artefacts = {name: digest_of_file(output / name) for name in VOUCHED}
    return result
