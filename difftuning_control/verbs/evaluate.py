"""`difftune evaluate`: figures of finished runs and their base on the same prompts, seeds, steps and guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from difftuning_control.data.bank import KnowledgeBank
from difftuning_control.data.bank_pictures import pictures_of_bank
from difftuning_control.data.bank_prompts import outside_prompts
from difftuning_control.data.conditions import conditions_of
from difftuning_control.data.control_spec import SUPPLIED, Conditioner, ControlSpec
from difftuning_control.data.embeddings import cached_embeddings
from difftuning_control.data.examples import ImageData
from difftuning_control.data.labels import bank_classes, begin_label_space, class_names
from difftuning_control.data.latents import part_of
from difftuning_control.data.prepare import cache_folder, hold_out, silent
from difftuning_control.errors import UserError
from difftuning_control.evaluation.curve import Curve
from difftuning_control.evaluation.features import Features, load_features
from difftuning_control.evaluation.fidelity import FidelityProbe
from difftuning_control.evaluation.figures import (
    MOST,
    build_reference,
    decoded,
    reconstructed,
)
from difftuning_control.evaluation.forgetting import relative_change, row_validator
from difftuning_control.evaluation.metrics import fid_warning
from difftuning_control.families.hub import best_device
from difftuning_control.families.loading import load_base
from difftuning_control.objective.noise import BANDS
from difftuning_control.pipelines.domain_guidance import check_domain_method
from difftuning_control.recipe.drawing import SeededDrawSettings
from difftuning_control.recipe.gates import GatesConfig
from difftuning_control.recipe.inputs import DataConfig
from difftuning_control.recipe.studies import Evaluation
from difftuning_control.runs.finished import check_base, finished_run, tuned_model, weights_of
from difftuning_control.runs.gates import judge
from difftuning_control.runs.places import need_places
from difftuning_control.runs.record import RunRecord
from difftuning_control.system.durable import write_json
from difftuning_control.system.terminal import progress
from difftuning_control.verbs.evaluated_pictures import judged_pictures
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
    if "base" in request.runs:
        raise UserError("a run is named base, as the pretrained model is among the figures; name it ./base.")
    records = {run: finished_run(run, request.moved) for run in request.runs}
    recipes = {run: record.recipe for run, record in records.items()}
    for run, its in recipes.items() if request.domain_guidance_scale is not None else ():
        check_domain_method(run, its.method)
    first = request.runs[0]
    recipe, resolution = recipes[first], records[first].data.resolution
    need_places(records[first], first, ("model", "data", "validation", "control", "control_validation"))
    for run, record in records.items():
        need_places(record, run, ("masks",))
    family = _base(records, recipes, first)
    request, features = family.suited(request), load_features(request.features, family.device)
    training, real = judged_pictures(request, records, recipes, tell)
    banks = _banks(family, records)
    largest = max((bank for bank, _ in banks), key=len, default=None)
    bank = begin_label_space(family, recipe, training, largest)
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
    unseen = _unseen(bank, recipe.training.validation_size, banks) if bank is not None else None
    if unseen is not None and probe is None:  # beside a ControlNet the model stays as it was
        for side, curve in zip(sides, _forgetting(family, records, recipe, unseen)):
            side["forgetting"] = {"u": curve.u, **curve.to_dict()}
    elif bank is not None and probe is None:
        tell(
            "note: no two samples of a bank are left that none of the runs trained on; what they forgot is not "
            "measured."
        )
    for run, side in zip(records, sides):
        gates = recipes[run].gates
        if gates.draws and not _draws_as(family.suited(gates), request):
            tell(
                f"note: the gates of {run} are for pictures of other settings (features, pictures, seeds, steps, "
                "guidance or data), and not judged here."
            )
        elif gates.limits:
            side["gates"] = judge(gates, side, records[run].losses).to_dict()
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
        data = dataclasses.replace(recipe.data, caption_column=DataConfig.caption_column)  # the run's is not its
        pictures = pictures_of_bank(request.source, data, has_classes=False)
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


def _draws_as(gates: GatesConfig, request: Evaluation) -> bool:
    """Whether pictures are drawn and judged here as the gates ask for."""
    alike = all(getattr(gates, f.name) == getattr(request, f.name) for f in dataclasses.fields(SeededDrawSettings))
    return alike and request.domain_guidance_scale is None and request.data is None


def _banks(family: Family, records: dict[str, RunRecord]) -> list[tuple[KnowledgeBank, int]]:
    """The banks of the runs that are still there, and how many of the first items of each were trained on."""
    kept = [record.bank for record in records.values() if record.bank is not None]
    there = [bank for bank in kept if (Path(bank.folder) / "manifest.json").exists()]
    return [(KnowledgeBank.load(bank.folder, base=family), bank.items) for bank in there]


def _unseen(bank: KnowledgeBank, size: int, trained: Sequence[tuple[KnowledgeBank, int]]) -> KnowledgeBank | None:
    """The last samples of a bank, none of which a run trained on; None of fewer than two."""
    start = first_unseen(bank, size, trained)
    left = len(bank) - start
    return bank.part(start, left) if left > 1 else None


def first_unseen(bank: KnowledgeBank, size: int, trained: Sequence[tuple[KnowledgeBank, int]]) -> int:
    """The first of a bank's items that is for validation alone and that none of these trained on.

    Args:
        size: how many validation takes at most.
        trained: banks, and how many of the first items of each were trained on. Those of one seed and the same prompts
            begin alike.
    """
    start = len(bank) - len(hold_out(bank, size)[1])
    for other, items in trained:
        seen, item = min(items, len(other), len(bank)), torch.tensor([start])
        if seen > start and torch.equal(other[item], bank[item]):
            start = seen
    return start


def _forgetting(family: Family, records: dict[str, RunRecord], recipe: Recipe, kept: KnowledgeBank) -> list[Curve]:
    """f(u) of every run on bank samples that none trained on, with the first one's prompts."""
    prompts = kept.retained_prompts(recipe.measured_prompts)
    embeddings = cached_embeddings(family, prompts, cache_folder(recipe.data), lambda count: None)
    rows = row_validator(family, part_of(kept, prompts), embeddings, len(kept), 1, BANDS, 0)
    base, curves = rows.rows(family.model), []
    for run, record in records.items():
        with tuned_model(family, run, record) as tuned:
            curves.append(relative_change(base, rows.rows(tuned.model), rows.centres))
    return curves
