"""`difftune evaluate`: figures of finished runs and their base on the same prompts, seeds, steps and guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from difftuning_control.data.bank import KnowledgeBank
from difftuning_control.data.bank_prompts import outside_prompts
from difftuning_control.data.conditions import conditions_of
from difftuning_control.data.control_spec import SUPPLIED, Conditioner, ControlSpec
from difftuning_control.data.datasets import Choice
from difftuning_control.data.embeddings import cached_embeddings
from difftuning_control.data.examples import ImageData
from difftuning_control.data.labels import bank_classes, begin_label_space, class_names
from difftuning_control.data.latents import part_of
from difftuning_control.data.prepare import cache_folder, hold_out, read_data, silent
from difftuning_control.data.sources import load_images
from difftuning_control.data.splits import FOR_JUDGING
from difftuning_control.errors import UserError
from difftuning_control.evaluation.curve import Curve
from difftuning_control.evaluation.features import Features, load_features
from difftuning_control.evaluation.fidelity import FidelityProbe
from difftuning_control.evaluation.figures import (
    LEAST_REAL,
    MOST,
    MOST_REAL,
    build_reference,
    check_held_out,
    decoded,
    reconstructed,
)
from difftuning_control.evaluation.forgetting import relative_change, row_validator
from difftuning_control.evaluation.metrics import fid_warning
from difftuning_control.families.hub import best_device
from difftuning_control.families.loading import load_base
from difftuning_control.objective.noise import BANDS
from difftuning_control.pipelines.domain_guidance import check_domain_method
from difftuning_control.recipe.studies import Evaluation
from difftuning_control.runs.finished import check_base, finished_run, tuned_model, weights_of
from difftuning_control.runs.gates import judge
from difftuning_control.runs.places import need_places
from difftuning_control.runs.record import RunRecord
from difftuning_control.system.durable import write_json
from difftuning_control.system.terminal import progress
from difftuning_control.verbs.evaluated_sides import judge_sides, side_drawing

if TYPE_CHECKING:
    from difftuning_control.families.family import Family
    from difftuning_control.recipe.recipe import Recipe


def evaluate(request: Evaluation, tell: Callable[[str], object] = silent) -> dict[str, Any]:
    """Figures of the base and of every run, written to `evaluation.json`; what that file holds.

    Where too few pictures were held out to judge the new domain by, the figures are those that need none: what is drawn
    for other prompts, and what was forgotten.

    Args:
        tell: is given lines on what was left out of the pictures, and on what is not judged.

    Raises:
        UserError: if runs and base do not belong together, too few pictures were named, or are held out where
            ControlNets or gates need them, or nothing stands for the old domain.
    """
    records = {run: finished_run(run, request.moved) for run in request.runs}
    recipes = {run: record.recipe for run, record in records.items()}
    for run, its in recipes.items() if request.domain_guidance_scale is not None else ():
        check_domain_method(run, its.method)
    first = request.runs[0]
    recipe, resolution = recipes[first], records[first].data.resolution
    need_places(records[first], first, ("model", "data", "validation", "masks", "control", "control_validation"))
    family = _base(records, recipes, first)
    request, features = family.suited(request), load_features(request.features, family.device)
    training, real = _pictures(request, records, recipes, tell)
    bank = begin_label_space(family, recipe, training, _bank(family, records))
    reference, chosen = None, real.sample(request.pictures)
    if len(chosen):
        old = _old_domain(request, recipe, family, features, bank, resolution, tell)
        with progress(3, f"{features.name} features of real pictures"):
            reference = build_reference(
                family, features, real=real, training=training, source=old, resolution=resolution
            )
    probe = _probe(records, chosen, family.device)
    outside = request.outside or _outside(family, training)
    captions = [e.caption for e in chosen.examples]
    drawing = side_drawing(request, captions, outside, resolution, features, reference, probe)
    base, sides = judge_sides(request, family, records, drawing)
    measurable = bank is not None and len(hold_out(bank, recipe.training.validation_size)[1]) > 1
    if bank is not None and measurable and probe is None:  # beside a ControlNet the model stays as it was
        for side, curve in zip(sides, _forgetting(family, records, recipe, bank)):
            side["forgetting"] = {"u": curve.u, **curve.to_dict()}
    for run, side in zip(records, sides):
        if recipes[run].gates.limits:
            side["gates"] = judge(recipes[run].gates, side, records[run].losses).to_dict()
    real_rows, size = reference.real.shape if reference is not None else (0, 0)
    warning = fid_warning(real_rows, len(chosen), size) if real_rows else None
    result: dict[str, Any] = {
        "status": "complete",
        "model": recipe.model.id,
        "settings": _settings(request, features, len(chosen), real_rows, outside),
        "base": base,
        "sides": sides,
        "warnings": [warning] if warning else [],
    }
    output = Path(request.output)
    output.mkdir(parents=True, exist_ok=True)
    drawing.save_grid(output / "grid.png")
    write_json(output / "evaluation.json", result)
    return result


def _settings(
    request: Evaluation, features: Features, pictures: int, real: int, outside: Sequence[str]
) -> dict[str, Any]:
    """What all sides have in common, as `evaluation.json` holds it."""
    return {
        "features": features.name,
        "pictures": pictures,
        "real": real,
        "seeds": request.seeds,
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "domain_guidance_scale": request.domain_guidance_scale,
        "unconditional_strength": request.unconditional_strength,
        "outside": outside,
    }


# --- the runs and their base ----------------------------------------------------------------------------------------


def _base(records: dict[str, RunRecord], recipes: dict[str, Recipe], first: str) -> Family:
    """The model that all runs tuned, loaded as the first one's fingerprints were taken.

    Raises:
        UserError: if a run tuned another one, or at another resolution.
    """
    family = load_base(recipes[first])
    family.to(best_device())
    family.encodes_in_step = any(r.adapter.text_encoder for r in recipes.values())
    for run, record in records.items():
        check_base(family, record, run)
        if record.data.resolution != records[first].data.resolution:
            raise UserError(f"{run} was tuned at another resolution than {first}; evaluate them apart.")
    return family


def _pictures(
    request: Evaluation, records: dict[str, RunRecord], recipes: dict[str, Recipe], tell: Callable[[str], object]
) -> tuple[ImageData, ImageData]:
    """The pictures that the runs were tuned on, and real ones that they were not: those given, or those held out; none
    where these are too few and nothing asks for them.

    Raises:
        UserError: if the runs were tuned on different pictures or labels, or too few are left for what must be judged.
    """
    first = request.runs[0]
    recipe = recipes[first]
    training, real = read_data(recipe)
    if request.data is not None:
        read = {name: getattr(recipe.data, name) for name in ("default_caption", "trigger", "max_pixels")}
        real = load_images(request.data, **read, choice=Choice(None, FOR_JUDGING, "a folder"))
    for run, record in records.items():
        masked_alike = recipes[run].data.masking == recipe.data.masking
        own = training if masked_alike else read_data(recipes[run])[0]
        _check_data(run, record, first, own, training, real)
        if recipes[run].tuning.label_space != recipe.tuning.label_space:
            raise UserError(f"{run} was tuned in another label space than {first}; evaluate them apart.")
    for line in real.notes:
        tell(line)
    if len(real) < LEAST_REAL and request.data is None and not any(_needs_pictures(r) for r in recipes.values()):
        tell(
            f"note: too few pictures were held out to judge the new style by ({len(real)}, {LEAST_REAL} are needed); "
            "only what is drawn for other prompts and what was forgotten is judged; name others with --data."
        )
        return training, real.sample(0)
    check_held_out(real)
    return training, real.sample(MOST_REAL)


def _needs_pictures(recipe: Recipe) -> bool:
    """Whether a run cannot be judged without held-out pictures: of their conditions, or by its gates."""
    return recipe.method == "controlnet" or recipe.gates.draws


def _check_data(run: str, record: RunRecord, first: str, own: ImageData, training: ImageData, real: ImageData) -> None:
    """Refuse runs of other pictures than the first one's as they are now, and real pictures that were tuned on.

    Args:
        own, training: the run's pictures and the first one's; their masks may differ.

    Raises:
        UserError: in these cases.
    """
    if (record.fingerprints.data, own.unmasked.fingerprint) != (own.fingerprint, training.unmasked.fingerprint):
        what = "its pictures have changed since" if run == first else f"it was tuned on other pictures than {first}"
        raise UserError(f"{run} cannot be judged here: {what}; evaluate runs of the same unchanged pictures.")
    shared = {e.digest for e in training.examples} & {e.digest for e in real.examples}
    if shared:
        raise UserError(
            f"{len(shared)} of the {len(real)} pictures to judge with were tuned on; give pictures that were not, with "
            "--data."
        )


# --- what they are judged by ----------------------------------------------------------------------------------------


def _old_domain(
    request: Evaluation,
    recipe: Recipe,
    family: Family,
    features: Features,
    bank: KnowledgeBank | None,
    resolution: int,
    tell: Callable[[str], object],
) -> Tensor:
    """Features of pictures that stand for the old domain: those given, or the decoded bank.

    Raises:
        UserError: if there are neither.
    """
    if bank is None and request.source is None:
        raise UserError(
            "no run here has a knowledge bank of the base's samples (or it is no longer there), so nothing stands for "
            "the old domain; give --source, a folder of pictures as the base draws them, add a run with a bank, or say "
            "where it was moved with --moved.bank."
        )
    if request.source is not None:
        pictures = load_images(
            request.source,
            need_captions=False,
            max_pixels=recipe.data.max_pixels,
            choice=Choice(option="another folder"),
        )
        for line in pictures.notes:
            tell(line)
        return reconstructed(family, features, pictures.sample(MOST), resolution)
    assert bank is not None
    return features(decoded(family, bank.latents[:MOST]))


def _outside(family: Family, training: ImageData) -> list[str]:
    """Prompts far from the new domain: of classes those that were not tuned on, or none where only these are left."""
    if not family.class_conditional:
        return outside_prompts(family)
    tuned = class_names(training)
    others = [name for name in bank_classes(family, "classes") if name not in tuned]
    return others[:: -(-len(others) // 8)] if others else [""]


def _probe(records: dict[str, RunRecord], chosen: ImageData, device: torch.device) -> FidelityProbe | None:
    """What shows ControlNets the conditions of the chosen pictures and judges how they are followed.

    Raises:
        UserError: if only some runs are ControlNets, or their conditions are made in different ways.
    """
    places = {run: weights_of(run, "controlnet") for run, r in records.items() if r.method == "controlnet"}
    if not places:
        return None
    specs = {run: ControlSpec.load(place) for run, place in places.items()}
    first = next(iter(specs))
    other = next((run for run in records if specs.get(run) != specs[first]), None)
    if other is not None:
        raise UserError(
            f"{other} takes no condition, or makes it in another way than {first}; evaluate only ControlNets of one "
            "kind together."
        )
    conditioner, side = Conditioner(specs[first], device), specs[first].resolution
    lacking = next((e.name for e in chosen.examples if e.load_condition is None), None)
    if specs[first].annotator == SUPPLIED and lacking is not None:
        raise UserError(f"{lacking} has no supplied condition; evaluate on the pictures that {first} held out.")
    with progress(len(chosen), "annotating") as advance:
        rows = conditions_of(conditioner, chosen, side, advance)
    return FidelityProbe.build(conditioner, chosen, rows, {})


def _bank(family: Family, records: dict[str, RunRecord]) -> KnowledgeBank | None:
    """The first run's bank that is still there."""
    for record in records.values():
        folder = Path(record.bank.folder) if record.bank is not None else None
        if folder is not None and (folder / "manifest.json").exists():
            return KnowledgeBank.load(folder, base=family)
    return None


def _forgetting(family: Family, records: dict[str, RunRecord], recipe: Recipe, bank: KnowledgeBank) -> list[Curve]:
    """f(u) of every run on bank samples that it did not train on, with the first one's prompts."""
    kept = hold_out(bank, recipe.training.validation_size)[1]
    prompts = kept.retained_prompts(recipe.measured_prompts)
    embeddings = cached_embeddings(family, prompts, cache_folder(recipe.data), lambda count: None)
    rows = row_validator(family, part_of(kept, prompts), embeddings, len(kept), 1, BANDS, 0)
    base, curves = rows.rows(family.model), []
    for run, record in records.items():
        with tuned_model(family, run, record) as tuned:
            curves.append(relative_change(base, rows.rows(tuned.model), rows.centres))
    return curves
