"""`difftune pilot`: plain fine-tuning compared with other settings on the data at hand, as a folder with a report.

Every side trains the same steps on the same data with the same seeds. Its learning rate is chosen by the same search,
on prompts that the final figures do not use: each rate is tried with the first seed, and the best two with all of them.
Of several lengths the best one is chosen on those prompts too, over all seeds. The measured schedule comes from one
analysis of the pretrained model at the start.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from difftuning_control.data.buckets import describe, into_buckets
from difftuning_control.data.control_spec import Conditioner
from difftuning_control.data.framing import Framing
from difftuning_control.data.prepare import copies_held_out, read_data, resolution_of
from difftuning_control.data.study_inputs import Materials, materials
from difftuning_control.errors import UserError
from difftuning_control.evaluation.band_losses import losses_of
from difftuning_control.evaluation.features import load_features
from difftuning_control.evaluation.fidelity import main_figure
from difftuning_control.evaluation.figures import check_held_out, summarise, through_autoencoder
from difftuning_control.evaluation.pilot_figures import PictureRow, PilotPictures, outside_rows, picture_rows
from difftuning_control.families.hub import best_device
from difftuning_control.families.loading import few_steps_of, load_base
from difftuning_control.pipelines.domain_guidance import check_domain_family, check_mixed_family
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import AnalysisConfig, PilotConfig, retains_general
from difftuning_control.runs import audit
from difftuning_control.runs.audit import Session, clear_but_audit
from difftuning_control.runs.folder import refuse_places, refuse_unwritable
from difftuning_control.runs.identity import describe_device, versions
from difftuning_control.runs.pilot_files import VOUCHED, write_pilot
from difftuning_control.runs.pilot_record import SETTINGS, PilotCost, PilotRecord, read_settings
from difftuning_control.runs.record import COMPLETE, read_run
from difftuning_control.system.digests import digest_of_file
from difftuning_control.system.durable import is_empty, write_json
from difftuning_control.training.control_inputs import build_spec
from difftuning_control.training.phases import added, spent_line
from difftuning_control.verbs.analyze import measure
from difftuning_control.verbs.pilot.budget import kept_budget
from difftuning_control.verbs.pilot.checks import check_analysis, check_pilot, lengths_of
from difftuning_control.verbs.pilot.judge import SHOWN, Judge, halves_of, judge_of, save_pictures
from difftuning_control.verbs.pilot.outside_runs import outside_judge, outside_of_base
from difftuning_control.verbs.pilot.settings import Clock, check_inputs, pilot_identity, refuse_changed_inputs
from difftuning_control.verbs.pilot.side_runs import SideRuns

PRIMARY = "kid"


class Pilot:
    """One pilot in one folder; what is done is kept and not done again.

    Args:
        recipe: model, data, bank, adapter and training of all sides.
        output: the pilot's folder.
        tell: told in words of what is being done.
    """

    def __init__(self, recipe: Recipe, config: PilotConfig, output: Path, tell: Callable[[str], object] = print):
        check_pilot(recipe, config)
        self.config, self.output, self.tell = config, output, tell
        self.clock = Clock(output)
        self.lengths = lengths_of(recipe, config)
        self.rates = config.learning_rates or [recipe.training.learning_rate * f for f in (0.5, 1.0, 2.0)]
        bank = replace(recipe.bank, path=recipe.bank.path or str(output / "bank"))
        self.recipe = replace(recipe, bank=bank)
        self.schedule = output / "schedule.json"
        self.features = load_features(config.features, best_device())
        data, held_out = read_data(recipe, tell)
        self.data, self.held_out = data.fingerprint, held_out.fingerprint
        check_held_out(held_out)
        self.is_analysed = check_analysis(recipe, config, len(data))
        if copies := copies_held_out(data, held_out):
            raise UserError(
                f"{copies[0]}, or name other pictures with --data.validation_path: a pilot is "
                "judged on pictures that were not tuned on."
            )
        self.family = load_base(recipe).to(best_device())
        self.config = self.family.suited(config)
        if config.guidance_scales:
            check_domain_family(self.family, "pilot.guidance_scales")
        if config.unconditional_strength is not None:
            check_mixed_family(self.family, "pilot.unconditional_strength")
        if config.outside == "general" and self.family.class_conditional:
            raise UserError("pilot.outside is general, but this model is told classes and no prompts; name classes.")
        if (general := next((s for s in config.sides if retains_general(s)), None)) and self.family.class_conditional:
            raise UserError(f"{general} retains general prompts, but this model is told classes; leave that side out.")
        self.conditioner, self.primary = None, PRIMARY
        if recipe.method == "controlnet":
            spec = build_spec(recipe, self.family, resolution_of(self.family, recipe.data))
            self.conditioner, self.primary = Conditioner(spec, self.family.device), main_figure(spec)

    def run(self) -> PilotRecord:
        """All of it; returns its record, which is written."""
        self.clock.go_on()
        self.tell(f"[1/{len(self.config.sides) + 2}] bank, analysis and reference")
        phases = self.clock.phases
        with phases("bank"), phases.counting(self.family.denoiser):
            inputs = materials(self.family, self.recipe)
        check_inputs(self.output, inputs, self.family.fingerprint)
        judge = judge_of(self.config, self.family, self.features, self.conditioner, inputs)
        with phases("sampling"), phases.counting(self.family.denoiser):
            judge = replace(judge, outside=outside_judge(self.config, self.family, judge, self.output, self.tell))
        trained = self.side_runs(judge)
        with phases("analysis"), phases.counting(self.family.denoiser):
            analysis = self._analyze(inputs)
        with phases("sampling"), phases.counting(self.family.denoiser):
            base, pictures = self._base(inputs, judge)
            if judge.outside is not None:
                base["outside"] = outside_of_base(self.family, judge.outside, self.output, self.config.seeds)
        sides = []
        for number, side in enumerate(self.config.sides, start=2):
            self.tell(f"[{number}/{len(self.config.sides) + 2}] {side}")
            sides.append(trained.side(side))
        cost = self._cost(sides)
        self.tell(spent_line(cost.phases or {}))
        for side in reversed(sides):  # one that retains general prompts has no loss on the pilot's bank
            losses = losses_of(side["runs"][0])
            base |= {f"{role}_loss": change.base.mean for role, change in losses.items()}
        outside = None
        if judge.outside is not None:
            prompts = judge.outside.sampling.prompts[:SHOWN]
            outside = PilotPictures(prompts=prompts, rows=outside_rows(sides, len(prompts)))
        record = PilotRecord(
            status=COMPLETE,
            command=audit.command(),
            created=time.strftime("%Y-%m-%d %H:%M"),
            model=self.recipe.model.id,
            data=self._data(inputs),
            settings=self._settings(),
            primary=self.primary,
            cost=cost,
            versions=versions(),
            recipe_values=self.recipe.to_dict(),
            base=base,
            sides=[{k: v for k, v in s.items() if k != "all_runs"} for s in sides],
            analysis=analysis,
            pictures=PilotPictures(
                prompts=judge.final.prompts[:SHOWN],
                rows=pictures + picture_rows(sides, min(SHOWN, len(judge.final.prompts))),
            ),
            outside=outside,
            budget=kept_budget(sides, self.output),
        )
        write_pilot(record, self.output)
        return record

    def side_runs(self, judge: Judge) -> SideRuns:
        """What trains and judges the sides."""
        return SideRuns(
            self.recipe,
            self.config,
            self.output,
            self.family,
            judge,
            self.primary,
            self.rates,
            self.lengths,
            self.schedule,
            self.clock,
            self.tell,
        )

    def _data(self, inputs: Materials) -> dict[str, Any]:
        found = {"path": self.recipe.data.path, "pictures": len(inputs.data), "resolution": inputs.resolution}
        return found | {"held_out": len(inputs.held_out), "buckets": self._buckets(inputs)}

    def _buckets(self, inputs: Materials) -> dict[str, Any] | None:
        """How the sides frame their pictures, where that is not in squares."""
        config = self.recipe.data
        if not config.buckets:
            return None
        return describe(into_buckets(self.family, config, inputs.data, Framing.of(config, inputs.resolution)))

    def _cost(self, sides: list[dict[str, Any]]) -> PilotCost:
        rows = [row for side in sides for row in side["all_runs"]]
        folders = sorted({row["folder"] for row in rows})
        spent = [run.phases or {} for folder in folders if (run := read_run(self.output / folder)) is not None]
        return PilotCost(
            seconds=self.clock.spent(),
            phases=added(self.clock.phases.costs(), *spent),
            training_seconds=sum(row["seconds"] for row in rows if row["steps"] == self.lengths[-1]),
            runs=len(folders),
            device=describe_device(self.family.device),
        )

    def _settings(self) -> dict[str, Any]:
        config, training = self.config, self.recipe.training
        steps, scale = config.drawn
        return {
            "method": self.recipe.method,
            "steps": training.max_steps,
            "lengths": self.lengths,
            "batch_size": training.batch_size,
            "seeds": config.seeds,
            "learning_rates": self.rates,
            "pictures": config.pictures,
            "guidance_scale": scale,
            "sampling_steps": steps,
            "features": config.features,
            "guidance_scales": config.guidance_scales,
            "unconditional_strength": config.unconditional_strength,
        }

    # --- what all sides share ---------------------------------------------------------------------------------------

    def _analyze(self, inputs: Materials) -> dict[str, Any] | None:
        """Where this model must learn; None of too few pictures, which no side's schedule then comes from."""
        path = self.output / "analysis.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        if not self.is_analysed:
            self.tell("      too few pictures to analyse where this model must learn; that is left out")
            return None
        config = AnalysisConfig(seed=self.config.seeds[0])
        analysis = measure(self.family, self.recipe, inputs, config) | {"status": "complete"}
        write_json(self.schedule, analysis["schedule"])
        write_json(path, analysis)
        return analysis

    def _base(self, inputs: Materials, judge: Judge) -> tuple[dict[str, Any], list[PictureRow]]:
        """Figures of the pretrained model, and the rows of true and base pictures."""
        folder = self.output / "base"
        runs, rows = [], []
        for seed in self.config.seeds:
            path = folder / f"seed-{seed}.json"
            if not path.exists():
                row, pictures = judge.figures(self.family, seed, True)
                save_pictures(pictures[:SHOWN], folder / f"seed-{seed}")
                write_json(path, row | {"seed": seed})
            runs.append(json.loads(path.read_text(encoding="utf-8")))
        prompts = judge.final.prompts[:SHOWN]
        chosen = replace(inputs.held_out, examples=halves_of(self.config, inputs.held_out)[1][:SHOWN])
        save_pictures(through_autoencoder(self.family, chosen, inputs.resolution), self.output / "truth")
        for name, place in (("truth", "truth"), ("base", f"base/seed-{self.config.seeds[0]}")):
            rows.append(PictureRow(name=name, files=[f"{place}/{i}.png" for i in range(len(prompts))]))
        return {name: value["mean"] for name, value in summarise(runs).items()} | {"runs": runs}, rows


def pilot(
    recipe: Recipe, config: PilotConfig, language: str, overwrite: bool, tell: Callable[[str], object] = print
) -> PilotRecord:
    """Run the pilot in the recipe's output and write `pilot.json` and `report.html`.

    Raises:
        UserError: if the output holds something else, or another pilot without `overwrite`.
    """
    from difftuning_control.evaluation.report.pilot import write_pilot_report  # read at its end, after the runs

    output = Path(recipe.output)
    recipe.data.captioning.refuse_secrets()
    refuse_places(recipe, overwrite, clears_all=True)
    few = few_steps_of(recipe.model.id)
    config = config.for_model(None if few is None else few.drawn)
    marker, identity = output / SETTINGS, pilot_identity(recipe, config)
    refuse_unwritable(output)
    if output.exists() and not is_empty(output):
        if not marker.exists():
            raise UserError(f"the output {output} is not empty and holds no pilot; choose another folder.")
        if read_settings(output).identity != identity and not overwrite:
            raise UserError(
                f"the output {output} holds a pilot with other settings; give --overwrite to replace it, or another "
                "--output."
            )
    torch.manual_seed(recipe.training.seed)
    job = Pilot(recipe, config, output, tell)
    if overwrite:
        clear_but_audit(output)
    base = None if job.family.class_conditional else job.family.fingerprint  # which gets classes with the bank
    refuse_changed_inputs(output, job.data, job.held_out, base=base)  # before a bank is drawn
    with Session(output) as session:
        replace(read_settings(output), identity=identity).write(output)
        session.begin()
        result = job.run()
        tell(f"report: {write_pilot_report(result, output, language)}")
        session.artefacts = {name: digest_of_file(output / name) for name in VOUCHED if (output / name).exists()}
    return result
