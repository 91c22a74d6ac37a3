"""`difftune analyze`: the transfer gap by noise level, the schedule that follows, and what a run learnt and forgot."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftuning_control.data.labels import as_pretrained
from difftuning_control.data.latents import part_of
from difftuning_control.data.prepare import hold_out, silent
from difftuning_control.data.study_inputs import MEASURED, Materials, materials
from difftuning_control.errors import UserError
from difftuning_control.evaluation.features import Features, load_features
from difftuning_control.evaluation.figures import Sampling, check_held_out, figures, reference_of
from difftuning_control.evaluation.forgetting import (
    LEAST_ROWS,
    advice,
    fit_schedule,
    loss_rows,
    relative_change,
    row_validator,
    transfer_gap,
)
from difftuning_control.families.hub import best_device
from difftuning_control.families.loading import load_base
from difftuning_control.objective.noise import BANDS
from difftuning_control.pipelines.guidance import hand_over
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import AnalysisConfig
from difftuning_control.runs.finished import check_base, finished_run, tuned_model
from difftuning_control.runs.history import read_history
from difftuning_control.runs.places import need_places
from difftuning_control.runs.record import RunRecord
from difftuning_control.system.durable import write_json
from difftuning_control.system.terminal import progress

if TYPE_CHECKING:
    from difftuning_control.families.family import Family
    from difftuning_control.recipe.requests import Moved


def analyze(
    recipe: Recipe,
    config: AnalysisConfig,
    run: str | None = None,
    moved: Moved | None = None,
    tell: Callable[[str], object] = silent,
) -> dict[str, Any]:
    """Measure; returns what `analysis.json` holds.

    Args:
        recipe: model, data and bank; those of the run when one is given.
        run: a finished run, or a step that it kept, whose forgetting is measured too.
        moved: where the run's inputs lie now.
        tell: is given lines on what was left out of the data.

    Raises:
        UserError: if run and base do not belong together, or there are too few pictures.
    """
    started = time.time()
    record = finished_run(run, moved) if run is not None else None
    recipe = record.recipe if record is not None else recipe
    if record is not None and recipe.method == "controlnet":
        raise UserError(
            f"the run {run} is a ControlNet, beside which the model stays as it was: there is nothing that it forgot; "
            "judge its pictures with difftune evaluate."
        )
    if record is not None and run is not None:
        need_places(record, run, ("model", "data", "validation", "bank"))
    family = load_base(recipe).to(best_device())
    if record is not None and run is not None:
        check_base(family, record, run)
    family.encodes_in_step = recipe.adapter.text_encoder
    if config.staged and recipe.adapter.text_encoder:
        raise UserError(
            f"staged sampling hands over between two denoisers, but {run} tuned the text encoder too; leave out "
            "analysis.staged."
        )
    if config.staged and record is None:
        raise UserError("staged sampling hands over between a tuned model and its base; give --run.")
    features = load_features(config.features, family.device) if config.staged else None
    size = MEASURED
    if record is not None and record.bank is not None and record.bank.size is not None:  # the run's own
        recipe = replace(recipe, bank=replace(recipe.bank, path=record.bank.folder))
        size = record.bank.size
    inputs = materials(family, recipe, tell, size)
    if record is not None and record.fingerprints.data != inputs.data.fingerprint:
        raise UserError(
            f"the pictures that {run} was tuned on have changed since; an analysis needs them as they were."
        )
    if config.staged:
        check_held_out(inputs.held_out)
    result = measure(family, recipe, inputs, config)
    if record is not None and run is not None:
        result |= _of_run(family, recipe, inputs, config, run, record) | {"run": run}
        if features is not None:
            result["staged"] = staged_sampling(family, features, inputs, config, run, record)
    return result | {"status": "complete", "seconds": time.time() - started}


def measure(family: Family, recipe: Recipe, inputs: Materials, config: AnalysisConfig) -> dict[str, Any]:
    """The transfer gap of the pretrained model and the schedule that follows; None for what only a run has."""
    rows = loss_rows(
        family,
        inputs.target,
        part_of(inputs.bank, inputs.bank.prompts),
        inputs.embeddings,
        rows=config.rows,
        draws=config.draws,
        seed=config.seed,
    )
    with progress(1, "transfer gap"):
        gap, losses = transfer_gap(rows, family.model)
    return {
        "model": recipe.model.id,
        "data": {"path": recipe.data.path, "pictures": len(inputs.data), "resolution": inputs.resolution},
        "u": gap.u,
        "target": {"loss": losses["target"]},
        "bank": {"loss": losses["bank"]},
        "rows": {"target": len(rows.target.batch), "bank": len(rows.bank.batch)},
        "draws": config.draws,
        "gap": gap.to_dict(),
        "schedule": fit_schedule(gap.u, gap.mean).to_dict(),
        "advice": advice(gap),
        **dict.fromkeys(("run", "forgetting", "learnt", "staged", "multipliers", "budget")),
    }


def _of_run(
    family: Family,
    recipe: Recipe,
    inputs: Materials,
    config: AnalysisConfig,
    run: str,
    record: RunRecord,
) -> dict[str, Any]:
    """What a run forgot on the bank, with the prompts that it is measured with, and learnt on held-out pictures."""
    kept = hold_out(inputs.bank, recipe.training.validation_size)[1]  # what the run did not train on
    if len(kept) < 2:
        raise UserError(
            f"the run {run} held out {len(kept)} sample of its bank, and what it forgot is measured on 2 at least; run "
            "it with a larger bank.size or training.validation_size."
        )
    prompts = kept.retained_prompts(recipe.measured_prompts)
    fresh = inputs.fresh if len(inputs.fresh.prompts) >= LEAST_ROWS else inputs.target
    parts = {"bank": part_of(kept, prompts), "target": fresh}
    rows = {
        role: row_validator(family, part, inputs.embeddings, config.rows, config.draws, BANDS, config.seed)
        for role, part in parts.items()
    }
    with progress(2, "forgetting") as advance:
        base = {role: validator.rows(family.model) for role, validator in rows.items()}
        advance(1)
        with tuned_model(family, run, record) as tuned:
            after = {role: validator.rows(tuned.model) for role, validator in rows.items()}
        advance(1)
    u = rows["bank"].centres
    forgot, rise = (relative_change(base[role], after[role], u) for role in ("bank", "target"))
    learnt = {
        "mean": [-v for v in rise.mean],
        "low": [-v for v in rise.high],
        "high": [-v for v in rise.low],
    }
    budget = record.budget
    return {
        "forgetting": forgot.to_dict() | {"u": u, "budget": budget.allowed if budget is not None else None},
        "learnt": learnt | {"u": u, "held_out": fresh is inputs.fresh},
        "budget": budget.to_dict() if budget is not None else None,
        "multipliers": read_multipliers(Path(run)) if budget is not None else None,
    }


def read_multipliers(run: Path) -> dict[str, Any] | None:
    """The multipliers of a budgeted run over its steps, from `metrics.jsonl`."""
    rows = [row for row in read_history(run) if "multiplier/0" in row]
    if not rows:
        return None
    values = [[row[f"multiplier/{b}"] for b in range(BANDS)] for row in rows]
    return {
        "step": [row["step"] for row in rows],
        "values": values,
        "u": [(b + 0.5) / BANDS for b in range(BANDS)],
    }


def write_analysis(result: dict[str, Any], output: Path, language: str) -> Path:
    """`analysis.json`, `schedule.json` for `schedule: {kind: measured, path: …}`, and `report.html`."""
    from difftuning_control.evaluation.report.analysis import write_analysis_report  # saves the templates for a pilot

    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "analysis.json", result)
    write_json(output / "schedule.json", result["schedule"] | {"gap": result["gap"], "advice": result["advice"]})
    return write_analysis_report(result, output, language)


STAGED = ("kid", "domain_hit", "pair_similarity")  # the figures of staged sampling


def staged_sampling(
    family: Family,
    features: Features,
    inputs: Materials,
    config: AnalysisConfig,
    run: str,
    record: RunRecord,
) -> dict[str, Any]:
    """{u0, tuned_above: {metric: [...]}, tuned_below: {...}}, every point with the same prompts and seeds.

    Raises:
        UserError: with fewer than 6 held-out pictures.
    """
    reference = reference_of(family, features, inputs)
    captions = [e.caption for e in inputs.held_out.sample(config.pictures).examples]
    prompts = [captions[i % len(captions)] for i in range(config.pictures)]
    sampling = Sampling(prompts, [config.seed], *family.suited(config).drawn, inputs.resolution, config.batch_size)
    result: dict[str, Any] = {"u0": config.u0, "tuned_above": {}, "tuned_below": {}, "pictures": len(prompts)}
    with (
        progress(2 * len(config.u0) * len(prompts), "staged sampling") as advance,
        as_pretrained(family, record.classes),
        tuned_model(family, run, record) as tuned,
    ):
        base = family.denoiser if tuned is not family else None
        for key, above in (("tuned_above", True), ("tuned_below", False)):
            for u0 in config.u0:
                with hand_over(tuned, u0, tuned_above=above, base=base):
                    quality = figures(sampling.draw(tuned, advance), prompts, reference)
                for metric in STAGED:
                    result[key].setdefault(metric, []).append(quality[metric])
    return result
