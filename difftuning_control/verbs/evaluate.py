"""`difftune evaluate`: figures of finished runs and their base on the same prompts, seeds, steps and guidance."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from difftuning_control.data.bank import KnowledgeBank
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
from difftuning_control.evaluation.drawing import save_grid
from difftuning_control.evaluation.features import Features, load_features
from difftuning_control.evaluation.fidelity import FidelityProbe
from difftuning_control.evaluation.figures import (
    MOST,
    MOST_REAL,
    Reference,
    Sampling,
    build_reference,
    check_held_out,
    decoded,
    figures,
    reconstructed,
    summarise,
)
from difftuning_control.evaluation.forgetting import relative_change, row_validator
from difftuning_control.evaluation.metrics import diversity, fid_warning
from difftuning_control.families.hub import best_device
from difftuning_control.families.loading import load_base
from difftuning_control.objective.noise import BANDS
from difftuning_control.pipelines.domain_guidance import check_domain_method, domain_guided
from difftuning_control.recipe.studies import Evaluation
from difftuning_control.runs.finished import check_base, finished_run, tuned_model, weights_of
from difftuning_control.runs.gates import judge
from difftuning_control.runs.places import need_places
from difftuning_control.runs.record import RunRecord
from difftuning_control.system.durable import write_json
from difftuning_control.system.terminal import progress

if TYPE_CHECKING:
    from difftuning_control.families.family import Family
    from difftuning_control.recipe.recipe import Recipe

OUTSIDE = (
    "a photo of a dog",
    "a city street at night",
    "an oil painting of mountains",
    "a bowl of fruit on a table",
    "a portrait of an old man",
    "a red car",
    "a field of sunflowers",
    "a cup of coffee",
)
OUTSIDE_EMBEDDED = tuple(
    f"{style} emoji {name}" for name in ("red apple", "dog face", "pizza", "guitar") for style in ("noto", "twemoji")
)


def evaluate(request: Evaluation, tell: Callable[[str], object] = silent) -> dict[str, Any]:
    """Figures of the base and of every run, written to `evaluation.json`; what that file holds.

    Args:
        tell: is given lines on what was left out of the pictures.

    Raises:
        UserError: if runs and base do not belong together, there are too few pictures, or nothing stands for the old
            domain.
    """
    records = {run: finished_run(run, request.moved) for run in request.runs}
    recipes = {run: record.recipe for run, record in records.items()}
    domain = request.domain_guidance_scale
    for run, its in recipes.items() if domain is not None else ():
        check_domain_method(run, its.method)
    recipe, resolution = recipes[request.runs[0]], records[request.runs[0]].data.resolution
    roles = ("model", "data", "validation", "control", "control_validation")
    need_places(records[request.runs[0]], request.runs[0], roles)
    # as the first run's fingerprints were taken
    family = load_base(recipe)
    family.to(best_device())
    request = family.suited(request)
    family.encodes_in_step = any(r.adapter.text_encoder for r in recipes.values())
    for run, record in records.items():
        check_base(family, record, run)
        if record.data.resolution != resolution:
            raise UserError(f"{run} was tuned at another resolution than {request.runs[0]}; evaluate them apart.")
    features = load_features(request.features, family.device)
    training, held_out = read_data(recipe)
    real = held_out
    if request.data is not None:
        real = load_images(
            request.data, max_pixels=recipe.data.max_pixels, choice=Choice(None, FOR_JUDGING, "a folder")
        )
    for run, record in records.items():
        _check_data(run, record, request.runs[0], training, real)
        if recipes[run].tuning.label_space != recipe.tuning.label_space:
            raise UserError(f"{run} was tuned in another label space than {request.runs[0]}; evaluate them apart.")
    for line in real.notes:
        tell(line)
    check_held_out(real)
    real = real.sample(MOST_REAL)
    bank = begin_label_space(family, recipe, training, _bank(family, records))
    old = _old_domain(request, recipe, family, features, bank, resolution, tell)
    chosen = real.sample(request.pictures)
    with progress(3, f"{features.name} features of real pictures"):
        reference = build_reference(family, features, real=real, training=training, source=old, resolution=resolution)
    probe = _probe(records, chosen, family.device)
    outside = request.outside or _outside(family, recipe, training)
    drawing = _drawing(request, [e.caption for e in chosen.examples], outside, resolution, reference, probe)
    base, sides = _judge_all(request, family, records, drawing)
    measurable = bank is not None and len(hold_out(bank, recipe.training.validation_size)[1]) > 1
    if bank is not None and measurable and probe is None:  # beside a ControlNet the model stays as it was
        for side, curve in zip(sides, _forgetting(family, records, recipe, bank)):
            side["forgetting"] = {"u": curve.u, **curve.to_dict()}
    for run, side in zip(records, sides):
        if recipes[run].gates.limits:
            side["gates"] = judge(recipes[run].gates, {"losses": records[run].losses, **side})
    warning = fid_warning(len(reference.real), len(chosen), reference.real.shape[1])
    result: dict[str, Any] = {
        "status": "complete",
        "model": recipe.model.id,
        "settings": {
            "features": features.name,
            "pictures": len(chosen),
            "real": len(reference.real),
            "seeds": request.seeds,
            "steps": request.steps,
            "guidance_scale": request.guidance_scale,
            "domain_guidance_scale": domain,
            "unconditional_strength": request.unconditional_strength,
            "outside": outside,
        },
        "base": base,
        "sides": sides,
        "warnings": [warning] if warning else [],
    }
    _write(Path(request.output), result, drawing.grid, drawing.within.prompts[:8])
    return result


# --- pictures of every side -----------------------------------------------------------------------------------------


@dataclass
class _Drawing:
    """What every side draws, and what it is judged by; keeps what sides are compared by.

    Args:
        within: prompts of the new domain.
        outside: prompts outside it, of which the features alone are wanted.
        grid: the first pictures of each side.
        drawn: features of each side's pictures outside the domain.
    """

    within: Sampling
    outside: Sampling
    reference: Reference
    probe: FidelityProbe | None
    grid: dict[str, list[Image.Image]] = field(default_factory=dict)
    drawn: dict[str, Tensor] = field(default_factory=dict)

    def side(self, name: str, model: Family, scale: float, advance: Callable[[int], object]) -> dict[str, Any]:
        """Figures of a model's pictures by seed, and their summary."""
        features = self.reference.features
        pictures = replace(self.within, guidance_scale=scale).draw(model, advance)
        self.grid[name] = pictures[:8]
        self.drawn[name] = features(replace(self.outside, guidance_scale=scale).draw(model, advance))
        each, runs = len(self.within.prompts), []
        of_pictures = features(pictures)
        for i, seed in enumerate(self.within.seeds):
            rows = slice(i * each, (i + 1) * each)
            row = {"seed": seed} | figures(pictures[rows], self.within.prompts, self.reference, of_pictures[rows])
            runs.append(row | (self.probe.judge_pictures(pictures[rows]) if self.probe is not None else {}))
        within = diversity(of_pictures, self.within.repeated_prompts)
        return {"name": name, "runs": runs, "summary": summarise(runs), "diversity": within}

    def apart(self, name: str) -> float:
        """How far a side's pictures outside the domain are from the base's: the mean of 1 − cosine."""
        return float((1 - F.cosine_similarity(self.drawn["base"].double(), self.drawn[name].double())).mean())


def _drawing(
    request: Evaluation,
    captions: list[str],
    outside: list[str],
    resolution: int,
    reference: Reference,
    probe: FidelityProbe | None,
) -> _Drawing:
    control = probe.control if probe is not None else None
    blank = torch.zeros_like(control[:1]).expand(len(outside), -1, -1, -1) if control is not None else None
    within = Sampling(captions, request.seeds, *request.drawn, resolution, request.batch_size, control)
    far = replace(within, prompts=outside, seeds=request.seeds[:1], control=blank)
    return _Drawing(within, far, reference, probe)


def _judge_all(
    request: Evaluation, family: Family, records: dict[str, RunRecord], drawing: _Drawing
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The base, and every run."""
    domain, strength, sides = request.domain_guidance_scale, request.unconditional_strength or 0.0, []
    _, scale = request.drawn
    total = (len(records) + 1) * (len(drawing.within.repeated_prompts) + len(drawing.outside.prompts))
    with progress(total, "sampling") as advance:
        base = drawing.side("base", family, scale, advance)
        for run, record in records.items():
            with (
                tuned_model(family, run, record) as tuned,
                domain_guided(family, tuned, strength) if domain is not None else nullcontext(),
            ):
                side = drawing.side(run, tuned, scale if domain is None else domain, advance)
            sides.append(side | {"identity": record.identity, "outside": drawing.apart(run)})
    return base, sides


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


def _outside(family: Family, recipe: Recipe, training: ImageData) -> list[str]:
    """Prompts far from the new domain: of classes those that were not tuned on, or none where only these are left."""
    if not family.class_conditional:
        return list(OUTSIDE_EMBEDDED if recipe.model.id == "embedded" else OUTSIDE)
    tuned = class_names(training)
    others = [name for name in bank_classes(family, "classes") if name not in tuned]
    return others[:: -(-len(others) // 8)] if others else [""]


def _check_data(run: str, record: RunRecord, first: str, training: ImageData, real: ImageData) -> None:
    """Refuse runs of other pictures than the first one's as they are now, and real pictures that were tuned on.

    Raises:
        UserError: in these cases.
    """
    if record.fingerprints.data != training.fingerprint:
        what = "its pictures have changed since" if run == first else f"it was tuned on other pictures than {first}"
        raise UserError(f"{run} cannot be judged here: {what}; evaluate runs of the same unchanged pictures.")
    shared = {e.digest for e in training.examples} & {e.digest for e in real.examples}
    if shared:
        raise UserError(
            f"{len(shared)} of the {len(real)} pictures to judge with were tuned on; give pictures that were not, with "
            "--data."
        )


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
    """f(u) of every run on bank samples that it did not train on, with the prompts that the first run retains under."""
    kept = hold_out(bank, recipe.training.validation_size)[1]
    prompts = kept.retained_prompts(recipe.tuning.retention_prompts)
    embeddings = cached_embeddings(family, prompts, cache_folder(recipe.data), lambda count: None)
    rows = row_validator(family, part_of(kept, prompts), embeddings, len(kept), 1, BANDS, 0)
    base, curves = rows.rows(family.model), []
    for run, record in records.items():
        with tuned_model(family, run, record) as tuned:
            curves.append(relative_change(base, rows.rows(tuned.model), rows.centres))
    return curves


def _write(output: Path, result: dict[str, Any], grid: dict[str, list[Image.Image]], prompts: list[str]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    names = [Path(k).name for k in grid]
    labels = [name if name and names.count(name) == 1 else k for name, k in zip(names, grid)]
    save_grid(output / "grid.png", dict(zip(labels, grid.values())), prompts)
    write_json(output / "evaluation.json", result)
